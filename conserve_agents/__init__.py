"""ConServe's client layer: names each conversation, so that it can be served as one.

Standard library only. ``conserve_agents.openai`` has drop-in OpenAI clients (extra ``openai``),
``langchain_conserve`` a chat model for LangChain and LangGraph (extra ``langgraph``).

The modules, each on those before it: ``wire`` (header names) · ``errors`` · ``gateway`` (its own
small API) · ``counting`` (first-turn length) · ``turns`` · ``context`` · ``conversation`` ·
``openai``.
"""

from conserve_agents.context import current_conversation, propagate
from conserve_agents.conversation import Conversation, conversation, headers_for
from conserve_agents.counting import BytesTokenCounter, ServerTokenCounter, TokenCounter
from conserve_agents.errors import (
    ConServeError,
    ConversationIdError,
    ConversationStateError,
    GatewayError,
    GatewayResponseError,
    GatewayUnreachableError,
    GatewayUrlError,
    TokenCountError,
)
from conserve_agents.gateway import Gateway
from conserve_agents.turns import TurnReport

__all__ = [
    "BytesTokenCounter",
    "ConServeError",
    "Conversation",
    "ConversationIdError",
    "ConversationStateError",
    "Gateway",
    "GatewayError",
    "GatewayResponseError",
    "GatewayUnreachableError",
    "GatewayUrlError",
    "ServerTokenCounter",
    "TokenCountError",
    "TokenCounter",
    "TurnReport",
    "conversation",
    "current_conversation",
    "headers_for",
    "propagate",
]
