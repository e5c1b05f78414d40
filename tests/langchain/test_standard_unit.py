"""LangChain's standard unit tests for chat models.

``test_serdes`` skips itself: ``ChatConServe`` says that it cannot be serialized, and why.
"""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_conserve import ChatConServe


class TestChatConServe(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatConServe

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "fake-model"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return (
            {"CONSERVE_BASE_URL": "http://gateway:1/v1", "CONSERVE_API_KEY": "key"},
            {"model": "fake-model"},
            {"openai_api_base": "http://gateway:1/v1", "openai_api_key": "key"},
        )
