"""Decisions: commands the scheduler gives its driver, in the order they are to be carried out."""

from __future__ import annotations

from dataclasses import dataclass

from conserve_serving.core.types import (
    ConversationId,
    EngineId,
    Outcome,
    Reason,
    TransferReason,
    TurnId,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Run the turn: a complete plan, which replaces any earlier plan of the same turn.

    Attributes:
        plan: increases with every plan of the scheduler; events about the turn quote it.
        prefiller: prefill there and hand the KV over first; None: ``decoder`` prefills.
        source: engine that has the KV of the conversation's context, to be copied from there to
            where the prompt is computed: the home of a tail turn that is prefilled elsewhere, or
            the former home of a conversation that moves. None: there is none, or it is there.
        transfer: why KV will cross a link (set exactly when ``prefiller`` or ``source`` is).
        turn_index: 1 for the conversation's first turn.
        expected_cached_tokens: context the decoder should find, for the check of cached tokens:
            resident or parked KV there, or the whole prompt when it is handed over.
        priority: larger runs first where an engine supports it (tail turns before first turns).
    """

    turn: TurnId
    conversation: ConversationId
    plan: int
    decoder: EngineId
    prefiller: EngineId | None
    reason: Reason
    transfer: TransferReason | None
    turn_index: int
    expected_cached_tokens: int
    priority: int
    source: EngineId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Keep the turn waiting until ``waits_for`` happens, at latest until ``until_s``."""

    turn: TurnId
    conversation: ConversationId
    reason: Reason
    waits_for: str
    until_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """Refuse the turn; ``retry_after_s`` says when a retry could succeed (None: never)."""

    turn: TurnId
    conversation: ConversationId
    reason: Reason
    retry_after_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseTurn:
    """The turn has ended, exactly once, with this outcome."""

    turn: TurnId
    conversation: ConversationId
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Park:
    """Let the engine move this idle conversation's KV to its host tier."""

    conversation: ConversationId
    engine: EngineId
    tokens: int
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Free this conversation's KV on this engine."""

    conversation: ConversationId
    engine: EngineId
    tokens: int
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class WakeAt:
    """Send ``TimerFired`` at ``at_s``; replaces any earlier wish."""

    at_s: float


Decision = Place | Hold | Reject | CloseTurn | Park | Release | WakeAt
