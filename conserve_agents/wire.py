"""The wire vocabulary shared by clients and the gateway: header names, their encoding and limits.

This module is the only place where a header name is spelled. The gateway imports it; the client
layer imports it; nothing here imports anything outside the standard library.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

# --- request headers -------------------------------------------------------------------------
CONVERSATION_ID: Final = "X-ConServe-Conversation-ID"
PARENT_ID: Final = "X-ConServe-Parent-ID"
#: One id per logical call; every retry of the call carries the same one.
TURN_ID: Final = "X-ConServe-Turn-ID"
#: 1 for the first turn of a conversation.
TURN_INDEX: Final = "X-ConServe-Turn-Index"
#: Input length of the conversation's first turn in tokens; frozen at turn 1, sent on every turn.
FIRST_TURN_TOKENS: Final = "X-ConServe-First-Turn-Tokens"
#: Who counted it: ``bytes/4``, ``server``, ``token-ids`` (the prompt was ids) or ``hf:<name>``.
TOKEN_COUNTER: Final = "X-ConServe-Token-Counter"  # noqa: S105 - a header's name
#: Opaque, signed; the gateway sets it on responses and the client echoes it on the next turn.
PLACEMENT: Final = "X-ConServe-Placement"
#: ``1`` when this is the conversation's last turn: the gateway ends it once the turn has finished.
FINAL: Final = "X-ConServe-Final"

# --- response headers (CONVERSATION_ID, TURN_INDEX and PLACEMENT come back as well) ---------
IDENTITY_SOURCE: Final = "X-ConServe-Identity-Source"
#: How the prompt stands to the conversation's previous one: new, extend, replay, fork, rewrite.
RELATION: Final = "X-ConServe-Relation"
PREFILL_ENGINE: Final = "X-ConServe-Prefill-Engine"
DECODE_ENGINE: Final = "X-ConServe-Decode-Engine"
#: Only where it is known before the body: replies that are not streamed.
CACHED_TOKENS: Final = "X-ConServe-Cached-Tokens"
#: KV transfers of this conversation so far, this turn's included.
TRANSFERS: Final = "X-ConServe-Transfers"
#: Why this turn was placed where it was (a value of the scheduler's ``Reason``).
REASON: Final = "X-ConServe-Reason"
#: Time this turn spent in the gateway itself before it was sent upstream, in milliseconds.
OVERHEAD_MS: Final = "X-ConServe-Overhead-Ms"

#: The key our clients send where a library insists on one and none was given: no credentials.
NO_API_KEY: Final = "conserve"

MAX_ID_LENGTH: Final = 200
_LEGAL_ID: Final = re.compile(r"[\x21-\x7e]{1,200}\Z")


def is_legal_id(value: str) -> bool:
    """Whether ``value`` may travel as a conversation id: 1–200 visible ASCII characters."""
    return _LEGAL_ID.match(value) is not None


def safe_id(value: str) -> str:
    """``value`` itself when it is legal, else a stable legal id derived from it.

    Args:
        value: any non-empty string, as an application names its thread or session.

    Returns:
        The same string, or ``sha256-<hex>`` of its UTF-8 bytes: equal inputs give equal ids.

    Raises:
        ValueError: ``value`` is empty.
    """
    if not value:
        raise ValueError("conversation id is empty: pass a non-empty string or let one be made")
    if is_legal_id(value):
        return value
    digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
    return f"sha256-{digest}"
