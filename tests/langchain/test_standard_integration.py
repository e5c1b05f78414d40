"""LangChain's standard integration tests against the real gateway over emulated engines.

All fifty pass. What the suite would download to show it to the model is replaced by a few bytes:
an engine that only counts does not look. ``test_stream_time``, which wants a recording, measures
the gateway on this machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests

from conserve_agents import Gateway, conversation
from langchain_conserve import ChatConServe

#: Stands for a picture, a recording and a document.
DOWNLOAD = b"a few bytes that no engine on this machine looks at"


class TestChatConServe(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _at(self, cluster: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        self.base_url = cluster
        self.served = Gateway(cluster).models()[0]
        # The suite offers nothing to inject: it calls httpx.get by name.
        monkeypatch.setattr(httpx, "get", lambda *_, **__: SimpleNamespace(content=DOWNLOAD))
        monkeypatch.setenv("LANGCHAIN_TESTS_USER_AGENT", "nobody is asked")
        # Every test is a conversation, so that its turns are tagged as an agent's would be.
        with conversation(gateway=cluster):
            yield

    @pytest.fixture
    def vcr(self) -> Any:
        """In place of a recording: what is "replayed" is the gateway on this machine."""
        return SimpleNamespace(responses=["the gateway's"])

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatConServe

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": self.served, "base_url": self.base_url}

    @property
    def model_override_value(self) -> str:
        return self.served  # one gateway serves one model

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def supports_image_urls(self) -> bool:
        return True

    @property
    def supports_image_tool_message(self) -> bool:
        return True

    @property
    def supports_pdf_inputs(self) -> bool:
        return True

    @property
    def supports_pdf_tool_message(self) -> bool:
        return True

    @property
    def supports_audio_inputs(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def enable_vcr_tests(self) -> bool:
        return True
