"""Requests shaped like those of clients in use: each is one conversation, found where it says.

Header names, body shapes and quirks are the clients' own (docs/identity.md lists them). Every
client takes two turns, the second with a longer history, as it would send it.
"""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

from conserve_agents import Gateway

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
#: How a stream that went well ends.
ENDS = {CHAT: b"data: [DONE]", MESSAGES: b'"message_stop"', RESPONSES: b'"response.incomplete"'}
ID = "8f14e45f-ceea-467f-a8f0-2b1d3c4e5f60"
PARENT = "0cc175b9-c0f1-46b6-831c-399e26977266"
FUNCTION = {
    "name": "bash",
    "description": "Run a command.",
    "parameters": {
        "type": "object",
        "properties": {"command": {"type": "string"}},
        "required": ["command"],
    },
}


def chat(turn: int, **fields: Any) -> dict[str, Any]:
    """A chat completion of turn 1 or 2, as agents stream it."""
    messages: list[Any] = [
        {"role": "system", "content": "You are an agent."},
        {"role": "user", "content": "list the files"},
    ]
    if turn == 2:
        call = {"id": "call_1", "type": "function"}
        call["function"] = {"name": "bash", "arguments": '{"command":"ls"}'}  # type: ignore[assignment]
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "a.py b.py"},
        ]
    return {
        "messages": messages,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "auto",
        "max_tokens": 8,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }


def claude_code(turn: int, **fields: Any) -> dict[str, Any]:
    """Claude Code's body; its note on billing differs in every request."""
    cache = {"cache_control": {"type": "ephemeral"}}
    note = f"x-anthropic-billing-header: cc_version=2.1.0; cc_entrypoint=cli; cch={turn:05};"
    system = [
        {"type": "text", "text": note},
        {"type": "text", "text": "You are Claude Code.", **cache},
    ]
    ask = [
        {"type": "text", "text": "<system-reminder>be good</system-reminder>"},
        {"type": "text", "text": "list the files", **(cache if turn == 1 else {})},
    ]
    messages: list[Any] = [{"role": "user", "content": ask}]
    if turn == 2:
        use = {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"}}
        thought = {"type": "thinking", "thinking": "I should look.", "signature": "c2ln"}
        result = [{"type": "text", "text": "a.py b.py"}]
        messages += [
            {"role": "assistant", "content": [thought, {"type": "text", "text": "Let me"}, use]},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": result, **cache}
                ],
            },
        ]
    tool = {"name": "Bash", "description": "Run.", "input_schema": FUNCTION["parameters"]}
    return {
        "max_tokens": 8,
        "system": system,
        "messages": messages,
        "tools": [tool],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "someone"},
        "stream": True,
        **fields,
    }


def codex(turn: int, **fields: Any) -> dict[str, Any]:
    """Codex's body: stateless, the whole history as items, a web search nobody here offers."""

    def said(role: str, kind: str, text: str) -> dict[str, Any]:
        return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}

    items: list[Any] = [
        said("developer", "input_text", "<permissions>all</permissions>"),
        said("user", "input_text", "<environment_context>linux</environment_context>"),
        said("user", "input_text", "list the files"),
    ]
    if turn == 2:
        items += [
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "c2ln"},
            {
                "type": "function_call",
                "name": "bash",
                "arguments": '{"command":"ls"}',
                "call_id": "call_1",
            },
            {"type": "function_call_output", "call_id": "call_1", "output": "a.py b.py"},
        ]
    return {
        "instructions": "You are Codex.",
        "input": items,
        "tools": [
            {"type": "function", "strict": False, **FUNCTION},
            {
                "type": "custom",
                "name": "apply_patch",
                "description": "Edit files.",
                "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
            },
            {"type": "web_search", "external_web_access": False},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "text": {"verbosity": "low"},
        "client_metadata": {"x-codex-installation-id": "abc"},
        "max_output_tokens": 8,
        **fields,
    }


Body = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Client:
    """How one client asks, and what is to be found."""

    name: str
    path: str
    body: Body
    headers: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    source: str = "lineage"
    conversation: str | None = ID
    parent: str | None = None


CLIENTS = [
    Client(
        "ConServe's own layer beats everything else",
        CHAT,
        chat,
        {"X-ConServe-Conversation-ID": ID, "X-ConServe-Parent-ID": PARENT, "X-Session-ID": "x"},
        {"prompt_cache_key": "y"},
        source="conserve",
        parent=PARENT,
    ),
    Client(
        "Claude Code",
        MESSAGES,
        claude_code,
        {
            "x-api-key": "conserve",
            "anthropic-version": "2023-06-01",
            "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
            "x-app": "cli",
            "user-agent": "claude-cli/2.1.286 (external, cli)",
            "x-claude-code-session-id": ID,
            "x-client-request-id": "{new}",
        },
        source="header:x-claude-code-session-id",
    ),
    Client(
        "Claude Code, a sub-agent of a sub-agent",
        MESSAGES,
        claude_code,
        {
            "x-api-key": "conserve",
            "x-claude-code-session-id": ID,
            "x-claude-code-agent-id": "a2",
            "x-claude-code-parent-agent-id": "a1",
        },
        source="header:x-claude-code-session-id",
        conversation=f"{ID}/a2",
        parent=f"{ID}/a1",
    ),
    Client(
        "Claude Code before it had a header",
        MESSAGES,
        claude_code,
        {"x-api-key": "conserve"},
        {"metadata": {"user_id": f"user_{'0a' * 32}_account_{PARENT}_session_{ID}"}},
        source="body:metadata.user_id",
    ),
    Client(
        "Claude Code with a user's id in JSON",
        MESSAGES,
        claude_code,
        {"x-api-key": "conserve"},
        {"metadata": {"user_id": json.dumps({"device_id": "d", "session_id": ID})}},
        source="body:metadata.user_id",
    ),
    Client(
        "Codex, a sub-agent: its session is its parent's, its thread its own",
        RESPONSES,
        codex,
        {
            "originator": "codex_cli_rs",
            "user-agent": "codex_cli_rs/0.159.3 (Debian 12; x86_64)",
            "session-id": PARENT,
            "thread-id": ID,
            "x-client-request-id": ID,
            "x-codex-window-id": f"{ID}:0",
            "x-openai-subagent": "collab_spawn",
            "x-codex-parent-thread-id": PARENT,
        },
        {"prompt_cache_key": ID},
        source="header:thread-id",
        parent=PARENT,
    ),
    Client(
        "Codex of old",
        RESPONSES,
        codex,
        {"originator": "codex_cli_rs", "session_id": ID, "openai-beta": "responses=experimental"},
        {"prompt_cache_key": ID},
        source="header:session_id",
    ),
    Client(
        "Codex behind a proxy that drops its headers",
        RESPONSES,
        codex,
        {},
        {"prompt_cache_key": ID},
        source="body:prompt_cache_key",
    ),
    Client(
        "OpenCode, a sub-agent",
        CHAT,
        chat,
        {
            "user-agent": "opencode/1.4.2",
            "x-session-affinity": ID,
            "x-session-id": ID,
            "x-parent-session-id": PARENT,
        },
        source="header:x-session-affinity",
        parent=PARENT,
    ),
    Client(
        "OpenCode's gateway",
        CHAT,
        chat,
        {"x-opencode-session": ID},
        source="header:x-opencode-session",
    ),
    Client("Amp", CHAT, chat, {"x-amp-thread-id": ID}, source="header:x-amp-thread-id"),
    Client("xAI's clients", CHAT, chat, {"x-grok-conv-id": ID}, source="header:x-grok-conv-id"),
    Client(
        "LiteLLM's proxy, forwarding headers",
        CHAT,
        chat,
        {"x-litellm-session-id": ID, "x-litellm-trace-id": "{new}"},
        source="header:x-litellm-session-id",
    ),
    Client(
        "LiteLLM's SDK",
        CHAT,
        chat,
        {},
        {"litellm_session_id": ID},
        source="body:litellm_session_id",
    ),
    Client(
        "LiteLLM with metadata",
        CHAT,
        chat,
        {},
        {"metadata": {"session_id": ID, "user_api_key_hash": "x"}},
        source="body:metadata.session_id",
    ),
    Client(
        "LangGraph over an unmodified ChatOpenAI",
        CHAT,
        chat,
        {"user-agent": "OpenAI/Python 3.54.0", "x-stainless-retry-count": "0"},
        {"user": "someone", "safety_identifier": "someone"},
        conversation=None,
    ),
    Client(
        "NVIDIA Dynamo, a sub-agent",
        CHAT,
        chat,
        {"X-Dynamo-Session-ID": ID, "X-Dynamo-Parent-Session-ID": PARENT},
        {"nvext": {"agent_hints": {"priority": 5}}},
        source="header:x-dynamo-session-id",
        parent=PARENT,
    ),
    Client(
        "SGLang's gateway",
        CHAT,
        chat,
        {"X-SMG-Routing-Key": ID},
        {"session_params": {"id": "other"}},
        source="header:x-smg-routing-key",
    ),
    Client(
        "SGLang with a session",
        CHAT,
        chat,
        {},
        {"session_params": {"id": ID}},
        source="body:session_params.id",
    ),
    Client(
        "vLLM's production stack, and fields that vLLM alone knows",
        CHAT,
        chat,
        {"X-Session-ID": ID, "X-Request-Id": "{new}"},
        {"cache_salt": "s", "top_k": 20, "chat_template_kwargs": {"enable_thinking": False}},
        source="header:x-session-id",
    ),
    Client(
        "Helicone", CHAT, chat, {"Helicone-Session-Id": ID}, source="header:helicone-session-id"
    ),
    Client(
        "OpenTelemetry's baggage",
        CHAT,
        chat,
        {"baggage": f"a=b,session.id={ID};c"},
        source="baggage",
    ),
    Client(
        "an id that is no legal one",
        CHAT,
        chat,
        {"X-Session-ID": "é" * 300},
        source="header:x-session-id",
        conversation="sha256-",
    ),
]


class Wire:
    """One HTTP connection to the gateway."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc)

    def ask(self, path: str, body: Any, headers: dict[str, str]) -> tuple[Any, bytes]:
        """Headers and body of the answer, which must be a good one."""
        sent = {
            name: value.replace("{new}", str(uuid.uuid4())).encode("utf-8")
            for name, value in headers.items()
        }
        sent.setdefault("authorization", b"Bearer conserve")
        if "x-api-key" in sent:
            del sent["authorization"]
        self._connection.request(
            "POST", path, json.dumps(body), {"content-type": "application/json", **sent}
        )
        response = self._connection.getresponse()
        answer = response.read()
        assert response.status == 200, answer
        return response.headers, answer

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def wire(cluster: str) -> Any:
    made = Wire(cluster)
    yield made
    made.close()


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_clients_two_turns_are_one_conversation(
    wire: Wire, gateway: Gateway, model_name: str, client: Client
) -> None:
    seen = []
    salt = client.name + str(uuid.uuid4())  # so that no other test's messages are these
    for turn in (1, 2):
        body = {"model": model_name, **client.body(turn, **client.fields)}
        _salted(body, salt)
        headers, answer = wire.ask(client.path, body, client.headers)
        assert ENDS[client.path] in answer.strip().splitlines()[-1]
        seen.append(headers)
    first, second = seen
    assert first["x-conserve-identity-source"] == client.source
    assert second["x-conserve-identity-source"] == client.source
    found = first["x-conserve-conversation-id"]
    assert second["x-conserve-conversation-id"] == found
    if client.conversation is not None:
        assert found.startswith(client.conversation)
    assert int(second["x-conserve-turn-index"]) == int(first["x-conserve-turn-index"]) + 1
    assert second["x-conserve-decode-engine"] == first["x-conserve-decode-engine"]
    assert second["x-conserve-relation"] == "extend"
    known = gateway.conversation(found)
    assert known["parent"] == client.parent
    gateway.end_conversation(found)


def _salted(body: dict[str, Any], salt: str) -> None:
    """Make the first words differ from test to test."""
    if "instructions" in body:
        body["instructions"] += salt
    elif isinstance(body.get("system"), list):
        body["system"][-1] = {**body["system"][-1], "text": salt}
    else:
        body["messages"][0] = {**body["messages"][0], "content": salt}


@pytest.mark.parametrize("header", ["X-Dynamo-Session-Final", "X-ConServe-Final"])
def test_end_of_session_signals(wire: Wire, gateway: Gateway, model_name: str, header: str) -> None:
    name = f"ends-{header}"
    for turn, final in ((1, "0"), (2, "1")):
        headers = {"X-Dynamo-Session-ID": name, header: final}
        wire.ask(CHAT, {"model": model_name, **chat(turn)}, headers)
        state = gateway.conversation(name)["state"]
        assert state == ("ended" if final == "1" else "open")


def test_one_key_is_one_tenant_in_all_apis(wire: Wire, gateway: Gateway, model_name: str) -> None:
    """Claude's clients send it in X-API-Key, OpenAI's as a bearer token."""
    named = {"X-Session-ID": "shared-by-apis"}
    wire.ask(CHAT, {"model": model_name, **chat(1)}, named)
    wire.ask(MESSAGES, {"model": model_name, **claude_code(1)}, {**named, "x-api-key": "conserve"})
    wire.ask(RESPONSES, {"model": model_name, **codex(1)}, named)
    assert gateway.conversation("shared-by-apis")["turns"] == 3


def test_people_are_no_conversations(wire: Wire, model_name: str) -> None:
    ids = set()
    for number in range(2):
        body = {"model": model_name, **chat(1, user="ada", safety_identifier="ada")}
        body["messages"][0]["content"] = f"task {number} {uuid.uuid4()}"
        headers, _ = wire.ask(CHAT, body, {"x-user-id": "ada"})
        assert headers["x-conserve-identity-source"] == "lineage"
        ids.add(headers["x-conserve-conversation-id"])
    assert len(ids) == 2
