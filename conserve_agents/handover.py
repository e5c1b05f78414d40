"""Tokens that hand a conversation to another process: what this one knows of it, as one string.

Opaque to everybody in between, without secrets, safe in a header, an environment variable or a
queue. Nothing at the gateway depends on it: a false one costs accuracy, never another's data.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from conserve_agents import wire
from conserve_agents.errors import HandoverError

_PREFIX: Final = "conserve1."
_COUNTS: Final = ("turns", "examples", "first_turn_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """What travels.

    Attributes:
        turns: tagged so far.
        examples: answers in the first prompt that are no turns; None: not known yet.
        first_turn_tokens, counter: the frozen length and who counted it; None: not counted yet.
        placement: the gateway's own token, echoed on the next turn.
    """

    id: str
    parent_id: str | None = None
    turns: int = 0
    examples: int | None = None
    first_turn_tokens: int | None = None
    counter: str | None = None
    placement: str | None = None

    def encode(self) -> str:
        """The token: visible ASCII."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        raw = json.dumps(known, separators=(",", ":")).encode()
        return _PREFIX + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode(token: str) -> Handover:
    """Read a token.

    Raises:
        HandoverError: it is not one, or was damaged on its way.
    """
    data = token.removeprefix(_PREFIX) if isinstance(token, str) else token
    if not isinstance(token, str) or data == token:
        raise HandoverError(f"hand-over token {token!r}: pass what handover() returned")
    try:
        raw = json.loads(base64.urlsafe_b64decode(data + "=" * (-len(data) % 4)))
    except (binascii.Error, ValueError) as error:
        raise HandoverError(f"hand-over token is damaged: {error}") from error
    return Handover(**_checked(raw))


def _checked(raw: Any) -> dict[str, Any]:
    names = {field.name for field in fields(Handover)}
    if not isinstance(raw, dict) or not set(raw) <= names or not _id(raw.get("id")):
        raise HandoverError("hand-over token holds something else: pass what handover() returned")
    for name, value in raw.items():
        good = _count(value) if name in _COUNTS else _sendable(value)
        if not good or (name in ("parent_id", "counter") and not _id(value)):
            raise HandoverError(f"hand-over token: {name} is {value!r}; make a new one")
    return raw


def _id(value: object) -> bool:
    return isinstance(value, str) and wire.is_legal_id(value)


def _sendable(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and value.isprintable()


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9
