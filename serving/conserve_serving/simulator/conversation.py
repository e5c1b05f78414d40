"""What is simulated, and what came of it: conversations as token counts, turns as times."""

from __future__ import annotations

from dataclasses import dataclass, field

from conserve_serving.core.types import (
    ConversationId,
    EngineId,
    Outcome,
    Reason,
    TransferReason,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedTurn:
    """One turn of a conversation.

    Attributes:
        prompt_tokens: the whole prompt.
        new_tokens: how many of them are not in the context of the turn before.
        output_tokens: what will be generated.
        gap_s: time between the end of the turn before and this turn's arrival.
    """

    prompt_tokens: int
    new_tokens: int
    output_tokens: int
    gap_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedConversation:
    """A closed loop: turn n + 1 arrives when turn n has finished and its gap has passed."""

    id: ConversationId
    arrival_s: float
    turns: tuple[SimulatedTurn, ...]


@dataclass(slots=True, kw_only=True)
class TurnResult:
    """What became of a turn. Times are virtual seconds since the start; None: did not happen."""

    conversation: ConversationId
    index: int
    arrived_s: float
    outcome: Outcome | None = None
    reason: Reason | None = None
    transfer: TransferReason | None = None
    prefiller: EngineId | None = None
    decoder: EngineId | None = None
    placements: int = 0
    cached_tokens: int = 0
    first_token_s: float | None = None
    finished_s: float | None = None
    notes: list[str] = field(default_factory=list)
