"""ConServe's client layer: names each conversation, so that it can be served as one.

Standard library only. ``conserve_agents.openai`` has drop-in OpenAI clients (extra ``openai``),
``langchain_conserve`` a chat model for LangChain and LangGraph (extra ``langgraph``),
``litellm_conserve`` a provider for LiteLLM (extra ``litellm``).

The modules, each on those before it: ``wire`` (header names) · ``errors`` · ``gateway`` (its own
small API) · ``turns`` (numbers, prompts, reports) · ``counting`` (first-turn length) · ``context``
(what is current) · ``handover`` (tokens) · ``telemetry`` (OpenTelemetry) · ``tags`` (what
its calls say) · ``conversation`` (its life) · ``propagation`` (threads, processes) · ``store`` ·
``report`` · ``hooks`` (single HTTP requests) · with something installed ``openai``, ``crewai``
and ``huggingface`` (a local counter).
"""

from conserve_agents.context import current_conversation, propagate
from conserve_agents.conversation import Conversation, conversation, headers_for, resume
from conserve_agents.counting import BytesTokenCounter, ServerTokenCounter, TokenCounter
from conserve_agents.errors import (
    ArgumentError,
    ConServeError,
    ConversationIdError,
    ConversationStateError,
    GatewayError,
    GatewayResponseError,
    GatewayUnreachableError,
    GatewayUrlError,
    HandoverError,
    TokenCountError,
)
from conserve_agents.gateway import Gateway
from conserve_agents.propagation import ContextExecutor, in_conversation, run_in_executor
from conserve_agents.store import ConversationStore
from conserve_agents.telemetry import ConversationSpanProcessor
from conserve_agents.turns import TurnReport

__all__ = [
    "ArgumentError",
    "BytesTokenCounter",
    "ConServeError",
    "ContextExecutor",
    "Conversation",
    "ConversationIdError",
    "ConversationSpanProcessor",
    "ConversationStateError",
    "ConversationStore",
    "Gateway",
    "GatewayError",
    "GatewayResponseError",
    "GatewayUnreachableError",
    "GatewayUrlError",
    "HandoverError",
    "ServerTokenCounter",
    "TokenCountError",
    "TokenCounter",
    "TurnReport",
    "conversation",
    "current_conversation",
    "headers_for",
    "in_conversation",
    "propagate",
    "resume",
    "run_in_executor",
]
