"""What one turn says of itself: the request's tag, the response's report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conserve_agents import wire
from conserve_agents.counting import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnReport:
    """What the gateway said about a turn in its response headers; None where it said nothing.

    Attributes:
        identity_source: which of the request's marks named the conversation.
        turn_index: 1 for the conversation's first turn, as the gateway counts.
        cached_tokens: prompt tokens whose KV was found; only on replies that are not streamed.
        transfers: KV transfers of the conversation so far, this turn's included.
        reason: why the turn was placed where it was.
        overhead_ms: time spent in the gateway before the turn was sent upstream.
        placement: opaque; echoed on the next turn.
    """

    conversation_id: str | None = None
    identity_source: str | None = None
    turn_index: int | None = None
    prefill_engine: str | None = None
    decode_engine: str | None = None
    cached_tokens: int | None = None
    transfers: int | None = None
    reason: str | None = None
    overhead_ms: float | None = None
    placement: str | None = None


def read_report(headers: Mapping[str, str]) -> TurnReport:
    """The report in a response's headers, whatever the case of their names and however odd."""
    lower = {name.lower(): value for name, value in headers.items()}

    def text(name: str) -> str | None:
        return lower.get(name.lower()) or None

    return TurnReport(
        conversation_id=text(wire.CONVERSATION_ID),
        identity_source=text(wire.IDENTITY_SOURCE),
        turn_index=_whole(text(wire.TURN_INDEX)),
        prefill_engine=text(wire.PREFILL_ENGINE),
        decode_engine=text(wire.DECODE_ENGINE),
        cached_tokens=_whole(text(wire.CACHED_TOKENS)),
        transfers=_whole(text(wire.TRANSFERS)),
        reason=text(wire.REASON),
        overhead_ms=_number(text(wire.OVERHEAD_MS)),
        placement=_echoable(text(wire.PLACEMENT)),
    )


def opening(messages: Prompt) -> tuple[int, Prompt]:
    """How many turns a prompt shows to have been answered, and what the first of them asked.

    A conversation whose id was given may have begun in another process: its history tells.

    Returns:
        The number of the assistant's messages, and the messages before the first of them (all,
        when there is none).
    """
    if isinstance(messages, str):
        return 0, messages
    answered = [i for i, message in enumerate(messages) if _role(message) == "assistant"]
    return len(answered), messages[: answered[0]] if answered else messages


def _role(message: Any) -> object:
    if isinstance(message, Mapping):
        return message.get("role")
    return getattr(message, "role", None)


def _echoable(value: str | None) -> str | None:
    """A token that can go back in a header; no client could send another."""
    return value if value is not None and value.isascii() and value.isprintable() else None


def _whole(value: str | None) -> int | None:
    return int(value) if value is not None and value.isdecimal() else None


def _number(value: str | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None
