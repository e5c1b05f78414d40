"""What is simulated, and what came of it: conversations as token counts, turns as times."""

from __future__ import annotations

from dataclasses import dataclass

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
        predicted_output_tokens: what a predictor says of ``output_tokens`` before the turn runs;
            None: nothing was predicted. Only told to the scheduler, never used here.
    """

    prompt_tokens: int
    new_tokens: int
    output_tokens: int
    gap_s: float = 0.0
    predicted_output_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedConversation:
    """A closed loop: turn n + 1 arrives when turn n has finished and its gap has passed.

    Attributes:
        id: unique in a run.
        arrival_s: virtual time of the first turn.
        turns: at least one.
        shared_prefix: ``(name, tokens)``: the first prompt begins with the first ``tokens`` tokens
            of a stream of that name, which other conversations may begin with, too (a system
            prompt); None: nothing is shared.
        parent: the conversation this one was forked from; only told to the scheduler.
        foreseen_tokens: all KV this conversation will ever hold, for an oracle; None: not told.
    """

    id: ConversationId
    arrival_s: float
    turns: tuple[SimulatedTurn, ...]
    shared_prefix: tuple[str, int] | None = None
    parent: ConversationId | None = None
    foreseen_tokens: int | None = None


@dataclass(slots=True, kw_only=True)
class TurnResult:
    """What became of a turn. Times are virtual seconds since the start; None: did not happen.

    Attributes:
        index: 1 for the conversation's first turn.
        arrived_s: when the client sent it (for the first time, if it was refused and sent again).
        reason, transfer, prefiller, decoder: of the newest placement, or of the refusal.
        placements: plans it was given; more than one after a failure.
        refusals: times it was refused and sent again.
        prompt_tokens, new_tokens, output_tokens: as in ``SimulatedTurn``; ``output_tokens`` is
            what the engine generated.
        cached_tokens: prompt tokens that its decoder did not compute, wherever they came from.
        restored_tokens: of them, those that came back from the decoder's host memory.
        moved_tokens: KV that crossed a link between engines for it.
        recomputed_tokens: context kept from the turn before that was computed again, on the
            engine that computed the prompt.
        placed_s: first placement. From ``arrived_s`` on it was held.
        prefill_began_s: the request that computes the prompt was admitted by its engine.
        prefilled_s: its prompt was computed.
        handed_s: its KV was at the decoder (only where KV crossed a link).
        first_token_s, finished_s: first and last token.
    """

    conversation: ConversationId
    index: int
    arrived_s: float
    prompt_tokens: int = 0
    new_tokens: int = 0
    output_tokens: int = 0
    outcome: Outcome | None = None
    reason: Reason | None = None
    transfer: TransferReason | None = None
    prefiller: EngineId | None = None
    decoder: EngineId | None = None
    placements: int = 0
    refusals: int = 0
    cached_tokens: int = 0
    restored_tokens: int = 0
    moved_tokens: int = 0
    recomputed_tokens: int = 0
    placed_s: float | None = None
    prefill_began_s: float | None = None
    prefilled_s: float | None = None
    handed_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
