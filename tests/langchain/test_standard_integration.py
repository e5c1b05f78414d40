"""LangChain's standard integration tests against the real gateway over emulated engines.

Skipped by the suite itself, for ChatConServe does not claim them: pictures, sound, PDF and
Anthropic's blocks as input (``test_image_inputs`` would download a picture, too), and timing
with a recorded cassette (``test_stream_time``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests

from conserve_agents import Gateway, conversation
from langchain_conserve import ChatConServe


class TestChatConServe(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _at(self, cluster: str) -> Iterator[None]:
        self.base_url = cluster
        self.served = Gateway(cluster).models()[0]
        # Every test is a conversation, so that its turns are tagged as an agent's would be.
        with conversation(gateway=cluster):
            yield

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
