"""LangChain's standard integration tests, through the gateway, over real SGLang engines.

Those that do not depend on what the model says. The others are listed with the reason; they run
against emulated engines, whose script can call tools (tests/langchain).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests

from conserve_agents import conversation
from langchain_conserve import ChatConServe

_CALLS = "the model must call a tool: a model of random weights never does"
_GRAMMAR = "tool_choice needs a grammar back end, which the test bed's engines run without"
_SCHEMA = "the model must answer in a given JSON schema"
_MEDIA = "pictures, sound and documents: not claimed, and the model reads text only"

#: What is not run here, and why.
OTHERS = {
    "test_agent_loop": _CALLS,
    "test_tool_calling": _CALLS,
    "test_tool_calling_async": _CALLS,
    "test_tool_calling_with_no_arguments": _CALLS,
    "test_bind_runnables_as_tools": _CALLS,
    "test_unicode_tool_call_integration": _CALLS,
    "test_tool_choice": _GRAMMAR,
    "test_structured_few_shot_examples": _GRAMMAR,
    "test_structured_output": _SCHEMA,
    "test_structured_output_async": _SCHEMA,
    "test_structured_output_optional_param": _SCHEMA,
    "test_structured_output_pydantic_2_v1": _SCHEMA,
    "test_json_mode": _SCHEMA,
    "test_image_inputs": _MEDIA,
    "test_image_tool_message": _MEDIA,
    "test_audio_inputs": _MEDIA,
    "test_pdf_inputs": _MEDIA,
    "test_pdf_tool_message": _MEDIA,
    "test_anthropic_inputs": "Anthropic's content blocks: not claimed",
    "test_stream_time": "replays a recording, which there is none of",
}


@pytest.mark.sglang
class TestChatConServeOverSglang(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _at(self, request: pytest.FixtureRequest) -> Iterator[None]:
        reason = OTHERS.get(request.node.originalname)
        if reason is not None:
            pytest.skip(reason)
        self.base_url = request.getfixturevalue("module_gateway").url + "/v1"
        with conversation(gateway=self.base_url):
            yield

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatConServe

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # The model would go on for as long as it is let.
        return {"model": "tiny", "base_url": self.base_url, "max_tokens": 40}

    @property
    def model_override_value(self) -> str:
        return "tiny"  # one gateway serves one model


@pytest.mark.sglang
def test_the_list_of_others_names_tests_there_are() -> None:
    assert [name for name in OTHERS if not hasattr(ChatModelIntegrationTests, name)] == []
