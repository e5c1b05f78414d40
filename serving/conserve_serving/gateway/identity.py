"""Which conversation a request belongs to, from what any client already sends.

Looked at in this order; the first that is there wins:

1. ``X-ConServe-Conversation-ID`` (must be legal), then the aliases of the configuration
2. headers of known routers and agents, then generic session headers
3. fields of the body
4. W3C ``baggage`` ``session.id``
5. nothing: the caller falls back to message lineage

``user`` and ``safety_identifier`` are never used: they name people, not conversations. Ids of
others that are too long or not printable are hashed; ids are scoped by tenant and model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import msgspec
from msgspec import Raw

from conserve_agents import wire
from conserve_serving.core.types import ConversationId
from conserve_serving.gateway.errors import InvalidRequestError

Headers = Sequence[tuple[bytes, bytes]]

#: Headers of routers, agents and gateways in use, in the order they are believed. Not among them:
#: X-Correlation-ID and X-Client-Request-ID, which many clients make anew for every request.
KNOWN_HEADERS: Final = (
    "x-dynamo-session-id",
    "x-smg-routing-key",
    "x-claude-code-session-id",
    "session-id",
    "session_id",
    "thread-id",
    "thread_id",
    "x-session-affinity",
    "x-opencode-session",
    "x-amp-thread-id",
    "x-grok-conv-id",
    "x-session-id",
    "x-litellm-session-id",
    "x-litellm-trace-id",
    "helicone-session-id",
    "agent-session-id",
)
#: A sub-agent's own id, which goes with its session's header.
_SUB_AGENT: Final = b"x-claude-code-agent-id"
_PARENTS: Final = (
    "x-dynamo-parent-session-id",
    "x-codex-parent-thread-id",
    "x-parent-session-id",
)
_BAGGAGE: Final = b"baggage"
_AUTH: Final = (b"authorization", b"api-key", b"x-api-key")
_MAX_TENANTS: Final = 10_000


def _key(name: str) -> bytes:
    return name.lower().encode("latin-1")


CONVERSATION_ID: Final = _key(wire.CONVERSATION_ID)
PARENT_ID: Final = _key(wire.PARENT_ID)
TURN_ID: Final = _key(wire.TURN_ID)
TURN_INDEX: Final = _key(wire.TURN_INDEX)
FIRST_TURN_TOKENS: Final = _key(wire.FIRST_TURN_TOKENS)
TOKEN_COUNTER: Final = _key(wire.TOKEN_COUNTER)
PLACEMENT: Final = _key(wire.PLACEMENT)
FINAL: Final = _key(wire.FINAL)
_DYNAMO_FINAL: Final = b"x-dynamo-session-final"


@dataclass(slots=True, kw_only=True)
class Tags:
    """What a request's headers say about its conversation and turn.

    Attributes:
        tenant: short hash of the credentials, ``""`` without any.
        conversation: its id, legal; None when nothing named one.
        source: what named it: ``conserve``, ``header:<name>``, ``body:<field>``, ``baggage``.
    """

    tenant: str = ""
    conversation: str | None = None
    source: str = ""
    parent: str | None = None
    turn_id: str | None = None
    turn_index: int | None = None
    first_turn_tokens: int | None = None
    token_counter: str | None = None
    placement: str | None = None
    final: bool = False

    @property
    def counted_exactly(self) -> bool:
        """Whether the client counted its first turn with the model's own tokenizer."""
        return self.token_counter is not None and self.token_counter.startswith(("server", "hf:"))


def scoped(tenant: str, model: str, conversation: str) -> ConversationId:
    """The id the scheduler knows a conversation by: scoped, so that tenants cannot collide."""
    return ConversationId(f"{tenant}\x1f{model}\x1f{conversation}")


class IdentityResolver:
    """Reads `Tags` from headers and body.

    Args:
        aliases: further headers that carry a conversation id, believed before the known ones.
        headers, body, baggage: which places are looked at beside ``X-ConServe-*``.
    """

    def __init__(
        self,
        *,
        aliases: Iterable[str] = (),
        headers: bool = True,
        body: bool = True,
        baggage: bool = True,
    ) -> None:
        names = [*aliases, *(KNOWN_HEADERS if headers else ())]
        self._rank = {_key(name): (rank, name.lower()) for rank, name in enumerate(names)}
        self._parents = {_key(name) for name in _PARENTS} if headers else set()
        self._headers = headers
        self._body = body
        self._baggage = baggage
        self._tenants: dict[bytes, str] = {}

    def tenant(self, headers: Headers) -> str:
        """Short hash of the credentials in ``headers``; ``""`` without any."""
        for name, value in headers:
            if name in _AUTH and value:
                return self._tenant(value)
        return ""

    def resolve(self, headers: Headers, body_fields: Callable[[], dict[str, Raw]]) -> Tags:
        """Read everything the request says about its conversation.

        Args:
            headers: request headers, names in lower case.
            body_fields: gives the body's identity fields, raw; asked only if it comes to them.

        Raises:
            InvalidRequestError: one of our own headers is illegal.
        """
        tags = Tags()
        best = len(self._rank)
        other = agent = other_parent = baggage = b""
        other_name = ""
        ranks = self._rank
        for name, value in headers:
            if name.startswith(b"x-conserve-"):
                self._own(tags, name, value)
            elif name in ranks:
                rank, text = ranks[name]
                if rank < best and value.strip():
                    best, other, other_name = rank, value, text
            elif name in _AUTH:
                if value and not tags.tenant:
                    tags.tenant = self._tenant(value)
            elif name == _BAGGAGE:
                baggage = value
            elif name in self._parents:
                other_parent = value
            elif self._headers and name == _SUB_AGENT:
                agent = value
            elif self._headers and name == _DYNAMO_FINAL:
                tags.final = value.strip().lower() in (b"1", b"true")
        if tags.conversation is None and other:
            tags.conversation = _legal(other)
            tags.source = f"header:{other_name}"
            if agent.strip() and other_name == "x-claude-code-session-id":
                tags.parent = tags.parent or tags.conversation
                tags.conversation = _legal(other.strip() + b"/" + agent.strip())
        if tags.parent is None and other_parent.strip():
            tags.parent = _legal(other_parent)
        if tags.conversation is None and self._body:
            self._from_body(tags, body_fields())
        if tags.conversation is None and self._baggage and baggage:
            self._from_baggage(tags, baggage)
        if tags.parent == tags.conversation:
            tags.parent = None
        return tags

    def _own(self, tags: Tags, name: bytes, value: bytes) -> None:
        text = value.decode("latin-1").strip()
        if name == CONVERSATION_ID:
            id = _own_id(wire.CONVERSATION_ID, text)
            if tags.conversation not in (None, id):
                raise InvalidRequestError(
                    f"two different {wire.CONVERSATION_ID} headers: send one",
                    param=wire.CONVERSATION_ID,
                )
            tags.conversation = id
            tags.source = "conserve"
        elif name == PARENT_ID:
            tags.parent = _own_id(wire.PARENT_ID, text)
        elif name == TURN_ID:
            tags.turn_id = _own_id(wire.TURN_ID, text)
        elif name == TURN_INDEX:
            tags.turn_index = _number(wire.TURN_INDEX, text, least=1)
        elif name == FIRST_TURN_TOKENS:
            tags.first_turn_tokens = _number(wire.FIRST_TURN_TOKENS, text, least=0)
        elif name == TOKEN_COUNTER:
            tags.token_counter = text[:64]
        elif name == PLACEMENT:
            tags.placement = text
        elif name == FINAL:
            tags.final = text.lower() in ("1", "true")

    def _from_body(self, tags: Tags, fields: dict[str, Raw]) -> None:
        for name, raw in fields.items():
            try:
                value: Any = msgspec.json.decode(raw)
            except msgspec.DecodeError:  # the body as a whole was decoded before: cannot happen
                continue
            label = name
            if isinstance(value, dict):
                inner = {"session_params": "id", "conversation": "id", "metadata": "session_id"}
                if name not in inner:
                    continue
                label = f"{name}.{inner[name]}"
                value = value.get(inner[name]) or (
                    value.get("session_id") if name == "session_params" else None
                )
            if isinstance(value, str) and value:
                tags.conversation = wire.safe_id(value)
                tags.source = f"body:{label}"
                return

    def _from_baggage(self, tags: Tags, baggage: bytes) -> None:
        for member in baggage.decode("latin-1").split(","):
            name, _, value = member.partition(";")[0].partition("=")
            if name.strip() == "session.id" and value.strip():
                tags.conversation = wire.safe_id(unquote(value.strip()))
                tags.source = "baggage"
                return

    def _tenant(self, credentials: bytes) -> str:
        tenant = self._tenants.get(credentials)
        if tenant is None:
            if len(self._tenants) >= _MAX_TENANTS:
                self._tenants.clear()
            tenant = hashlib.blake2b(credentials, digest_size=8, person=b"conserve").hexdigest()
            self._tenants[credentials] = tenant
        return tenant


def _legal(value: bytes) -> str:
    return wire.safe_id(value.decode("utf-8", "replace").strip())


def _own_id(header: str, text: str) -> str:
    if not wire.is_legal_id(text):
        raise InvalidRequestError(
            f"{header} must be 1 to {wire.MAX_ID_LENGTH} visible ASCII characters: "
            "shorten or hash it",
            param=header,
        )
    return text


def _number(header: str, text: str, *, least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and int(text) >= least):
        raise InvalidRequestError(f"{header} must be an integer of at least {least}", param=header)
    return int(text)
