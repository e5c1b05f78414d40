"""Which conversation a request belongs to, from what any client already sends.

``X-ConServe-Conversation-ID`` (must be legal) always comes first; what follows, and in which order,
says ``identity.order`` (see ``sources``). The first source that names something wins.

Ids of others that are too long or not printable are hashed; ids are scoped by tenant and model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import msgspec
from msgspec import Raw

from conserve_agents import wire
from conserve_serving.core.types import ConversationId
from conserve_serving.gateway.errors import InvalidRequestError
from conserve_serving.gateway.sources import (
    BAGGAGE,
    BODY,
    DEFAULT_ORDER,
    HEADER,
    LINEAGE,
    PREVIOUS_RESPONSE,
    expand,
)

Headers = Sequence[tuple[bytes, bytes]]

#: A sub-agent's own id and its parent's, which go with their session's header.
_CLAUDE_SESSION: Final = "header:x-claude-code-session-id"
_CLAUDE_AGENT: Final = b"x-claude-code-agent-id"
_CLAUDE_PARENT: Final = b"x-claude-code-parent-agent-id"
#: What names the parent of a conversation, in the order it is believed.
_PARENTS: Final = (
    b"x-dynamo-parent-session-id",
    b"x-codex-parent-thread-id",
    b"x-parent-session-id",
)
#: Claude Code names its session within its user's id, as text or as JSON.
_SESSION_OF_USER: Final = re.compile(r"_session_([0-9A-Za-z-]{8,})\Z")
_BAGGAGE: Final = b"baggage"
_AUTH: Final = (b"authorization", b"api-key", b"x-api-key")
_BEARER: Final = b"bearer "
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
        source: what named it: ``conserve`` or a source of ``sources``.
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
        sources: single sources in the order they are believed (see ``sources.expand``).

    Attributes:
        lineage: whether a request that nothing names is looked up by its messages.
    """

    def __init__(self, sources: Sequence[str] = tuple(expand(DEFAULT_ORDER))) -> None:
        self._rank: dict[bytes, tuple[int, str]] = {}
        self._others: list[tuple[int, str]] = []
        for rank, source in enumerate(sources):
            if source.startswith(HEADER):
                self._rank[_key(source.removeprefix(HEADER))] = (rank, source)
            elif source != LINEAGE:
                self._others.append((rank, source))
        self._last = len(sources)
        self.lineage = LINEAGE in sources
        self._parents = _PARENTS if self._rank else ()
        self._takes_final = b"x-dynamo-session-id" in self._rank
        self._tenants: dict[bytes, str] = {}

    def tenant(self, headers: Headers) -> str:
        """Short hash of the credentials in ``headers``; ``""`` without any."""
        for name, value in headers:
            if name in _AUTH and value:
                return self._tenant(value)
        return ""

    def resolve(
        self,
        headers: Headers,
        body_fields: Callable[[], dict[str, Raw]],
        *,
        previous: str | None = None,
    ) -> Tags:
        """Read everything the request says about its conversation.

        Args:
            headers: request headers, names in lower case.
            body_fields: gives the body's identity fields, raw; asked only if it comes to them.
            previous: the conversation of the response that this one continues, if it names one.

        Raises:
            InvalidRequestError: one of our own headers is illegal.
        """
        tags = Tags()
        best, other, source = self._last, b"", ""
        agent = agent_parent = baggage = b""
        parents: dict[bytes, bytes] = {}
        ranks = self._rank
        for name, value in headers:
            if name.startswith(b"x-conserve-"):
                self._own(tags, name, value)
                continue
            if name in ranks:
                rank, label = ranks[name]
                if rank < best and value.strip():
                    best, other, source = rank, value, label
            if name in _AUTH:
                if value and not tags.tenant:
                    tags.tenant = self._tenant(value)
            elif name == _BAGGAGE:
                baggage = value
            elif name in self._parents:
                parents[name] = value.strip()
            elif name == _CLAUDE_AGENT:
                agent = value.strip()
            elif name == _CLAUDE_PARENT:
                agent_parent = value.strip()
            elif name == _DYNAMO_FINAL and self._takes_final:
                tags.final = tags.final or value.strip().lower() in (b"1", b"true")
        if tags.conversation is None:
            self._named(tags, best, body_fields, baggage, previous)
            if tags.conversation is None and other:
                tags.conversation, tags.source = _legal(other), source
                if source == _CLAUDE_SESSION and agent:
                    self._sub_agent(tags, other.strip(), agent, agent_parent)
        if tags.parent is None:
            tags.parent = next((_legal(parents[p]) for p in self._parents if parents.get(p)), None)
        if tags.parent == tags.conversation:
            tags.parent = None
        return tags

    def _named(
        self,
        tags: Tags,
        best: int,
        body_fields: Callable[[], dict[str, Raw]],
        baggage: bytes,
        previous: str | None,
    ) -> None:
        """Look at what stands before the best header that was found."""
        fields: dict[str, Raw] | None = None
        for rank, source in self._others:
            if rank > best:
                return
            found: tuple[str, str] | None = None
            if source == PREVIOUS_RESPONSE:
                found = None if previous is None else (previous, source)
            elif source == BAGGAGE:
                found = _in_baggage(baggage)
            else:
                fields = body_fields() if fields is None else fields
                name = source.removeprefix(BODY)
                found = _in_body(name, fields[name]) if name in fields else None
            if found is not None:
                tags.conversation, tags.source = found
                return

    def _sub_agent(self, tags: Tags, session: bytes, agent: bytes, parent: bytes) -> None:
        """Claude Code's sub-agents share their session's id; each is a conversation of its own."""
        if tags.parent is None:
            tags.parent = _legal(session + b"/" + parent if parent else session)
        tags.conversation = _legal(session + b"/" + agent)

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

    def _tenant(self, credentials: bytes) -> str:
        if credentials[: len(_BEARER)].lower() == _BEARER:  # the same key as in X-API-Key
            credentials = credentials[len(_BEARER) :].strip()
        tenant = self._tenants.get(credentials)
        if tenant is None:
            if len(self._tenants) >= _MAX_TENANTS:
                self._tenants.clear()
            tenant = hashlib.blake2b(credentials, digest_size=8, person=b"conserve").hexdigest()
            self._tenants[credentials] = tenant
        return tenant


def _in_body(field: str, raw: Raw) -> tuple[str, str] | None:
    """An id in one field of the body, and what to call where it was."""
    try:
        value: Any = msgspec.json.decode(raw)
    except msgspec.DecodeError:  # the body as a whole was decoded before: cannot happen
        return None
    label = BODY + field
    if isinstance(value, dict):
        if field == "metadata":
            return _in_metadata(value)
        for inner in {"session_params": ("id", "session_id"), "conversation": ("id",)}.get(
            field, ()
        ):
            if isinstance(id := value.get(inner), str) and id:
                return wire.safe_id(id), f"{label}.{inner}"
        return None
    return (wire.safe_id(value), label) if isinstance(value, str) and value else None


def _in_metadata(metadata: dict[str, Any]) -> tuple[str, str] | None:
    session = metadata.get("session_id")
    if isinstance(session, str) and session:
        return wire.safe_id(session), "body:metadata.session_id"
    user = metadata.get("user_id")
    if not isinstance(user, str):
        return None
    named = _SESSION_OF_USER.search(user)
    if named is not None:
        return named[1], "body:metadata.user_id"
    if user.startswith("{"):
        try:
            inner = msgspec.json.decode(user, type=_UserId)
        except (msgspec.DecodeError, RecursionError):
            return None
        if inner.session_id:
            return wire.safe_id(inner.session_id), "body:metadata.user_id"
    return None  # a person's, not a conversation's


class _UserId(msgspec.Struct):
    session_id: str = ""


def _in_baggage(baggage: bytes) -> tuple[str, str] | None:
    for member in baggage.decode("latin-1").split(","):
        name, _, value = member.partition(";")[0].partition("=")
        if name.strip() == "session.id" and value.strip():
            return wire.safe_id(unquote(value.strip())), BAGGAGE
    return None


def _legal(value: bytes) -> str:
    return wire.safe_id(value.strip().decode("utf-8", "replace"))


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
