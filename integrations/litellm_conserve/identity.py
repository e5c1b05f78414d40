"""Whose conversation a LiteLLM call is. Looked at in this order; the first that is there wins:

1. an ``X-ConServe-Conversation-ID`` among the call's own headers, which are left alone
2. the current ``conserve_agents.conversation()``
3. behind a proxy: the headers in which its client names a session; they are passed on as they are,
   for the gateway knows the agents and their sub-agents' headers
4. ``litellm_session_id``, ``metadata["session_id"]``, with ``metadata["parent_session_id"]``
5. nothing: the call goes untagged, and the gateway goes by the messages
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote

from conserve_agents import Conversation, current_conversation, wire

#: A client's headers that may say whose call it is: a session, thread or conversation, its agent,
#: its parent; no secrets. The gateway decides which of them do.
_SPEAKS_OF_SESSIONS: Final = re.compile(
    r"x-conserve-|baggage$|(?!.*(token|secret|auth|cookie))"
    r".*(session|thread|conv-id|conversation|agent-id|routing-key|trace-id)"
)
#: How LiteLLM marks a session id that it made up for one request (its ``missing_session_id``).
_MADE_UP: Final = "litellm_session_id_generated"
_TAG: Final = wire.CONVERSATION_ID.lower()
_TURN: Final = wire.TURN_ID.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who speaks. At most one of the three is there.

    Attributes:
        conversation: a current one.
        session_id, parent_id: names of one, as LiteLLM's caller gave them.
        headers: a proxied client's own.
    """

    conversation: Conversation | None = None
    session_id: str | None = None
    parent_id: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


def is_tagged(headers: Mapping[str, Any]) -> bool:
    """Whether headers name a conversation in ConServe's own way."""
    return any(name.lower() == _TAG for name in headers)


def identify(headers: Mapping[str, Any], litellm_params: Mapping[str, Any]) -> Identity:
    """Read a call's origin: at once, in the context of the caller, before anything yields.

    Args:
        headers: the call's own.
        litellm_params: as a custom provider gets them, or the body of a proxied request.
    """
    if is_tagged(headers):
        return Identity()
    current = current_conversation()
    if current is not None:
        return Identity(conversation=current)
    metadata = _metadata(litellm_params)
    session = _session(litellm_params, metadata)
    proxied = _proxied(litellm_params)
    # LiteLLM takes session ids from headers too; only one that stands elsewhere says more.
    if session is None or is_tagged(proxied) or _says(proxied, session):
        return Identity(headers=_with_turn(proxied, litellm_params.get("litellm_call_id")))
    parent = metadata.get("parent_session_id")
    return Identity(session_id=session, parent_id=None if parent in (None, "") else str(parent))


def _metadata(params: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("litellm_metadata", "metadata"):
        value = params.get(name)
        if isinstance(value, Mapping):
            found |= value
    return found


def _session(params: Mapping[str, Any], metadata: Mapping[str, Any]) -> str | None:
    if metadata.get(_MADE_UP):
        return None
    named = metadata.get("session_id")
    session = params.get("litellm_session_id") or named
    if not session or (session == metadata.get("trace_id") and session != named):
        return None  # LiteLLM falls back on the trace, and that may be one request's
    return str(session)


def _proxied(params: Mapping[str, Any]) -> dict[str, str]:
    request = params.get("proxy_server_request")
    headers = request.get("headers") if isinstance(request, Mapping) else None
    if not isinstance(headers, Mapping):
        return {}
    return {
        name: value
        for name, value in headers.items()
        if isinstance(value, str) and _SPEAKS_OF_SESSIONS.match(name.lower())
    }


def _with_turn(headers: dict[str, str], call_id: Any) -> dict[str, str]:
    """A client's headers with a turn id, unless it has one: a proxy has one call id per request,
    whatever its Router does with it."""
    known = any(name.lower() == _TURN for name in headers)
    if not headers or known or not isinstance(call_id, str) or not wire.is_legal_id(call_id):
        return headers
    return {**headers, wire.TURN_ID: call_id}


def _says(headers: Mapping[str, str], session: str) -> bool:
    values = [value for name, value in headers.items() if name.lower() != "baggage"]
    for name, value in headers.items():
        if name.lower() == "baggage":
            members = (member.partition("=")[2].partition(";")[0] for member in value.split(","))
            values += [unquote(member) for member in members]
    return any(value.strip() == session for value in values)
