"""Events: facts, in the past tense, that a driver tells the scheduler.

Frozen, slotted, keyword-only; times in seconds, sizes in tokens or bytes. An event may arrive
late, twice or out of order: ``epoch`` names an engine's incarnation and ``plan`` the placement an
event belongs to, so the scheduler can tell a stale fact from a current one and ignore it.
"""

from __future__ import annotations

from dataclasses import dataclass

from conserve_serving.core.types import (
    ConversationId,
    EngineId,
    EngineSpeeds,
    Fallback,
    Link,
    Tier,
    TurnId,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJoined:
    """An engine is alive and may be used. A higher ``epoch`` means it restarted: its KV is gone.

    Attributes:
        speeds_guessed: nobody has said how fast it is. Until it has shown it, it is taken to be
            like the engines of its tier that have.
    """

    engine: EngineId
    epoch: int
    tier: Tier
    kv_capacity_tokens: int
    host_capacity_tokens: int
    page_tokens: int
    max_context_tokens: int
    speeds: EngineSpeeds
    link: Link
    speeds_guessed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Sums over the steps an engine ran since its previous report; zeros where it ran none.

    Attributes:
        prefill_tokens, prefill_s: uncached tokens computed in prefill, and time spent on them.
        decode_steps, decode_s, decode_kv_tokens: steps without prefill, their time, and the sum
            over those steps of the KV tokens read.
        mixed_steps, mixed_s, mixed_kv_tokens, mixed_prefill_tokens: the same for decode steps
            that shared the device with prefill, and the prompt tokens prefilled beside them.
    """

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_s: float = 0.0
    decode_kv_tokens: int = 0
    mixed_steps: int = 0
    mixed_s: float = 0.0
    mixed_kv_tokens: int = 0
    mixed_prefill_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReported:
    """What an engine said of itself. ``kv_held_tokens`` is used + evictable (device only)."""

    engine: EngineId
    epoch: int
    kv_held_tokens: int | None = None
    running_requests: int = 0
    queued_requests: int = 0
    steps: StepTimes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDraining:
    """An engine takes no new conversations; those it holds leave at their next turn."""

    engine: EngineId
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLost:
    """An engine is gone, and all KV on it."""

    engine: EngineId
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementHint:
    """A pin that outlived the scheduler's memory (a client's token, a pin store)."""

    engine: EngineId
    epoch: int
    context_tokens: int
    turns: int
    transfers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnArrived:
    """A turn arrived.

    Attributes:
        prompt_tokens: whole prompt; an estimate unless ``prompt_exact``.
        reusable_tokens: how much of the conversation's previous context this prompt extends,
            None when it extends all of it (0: the history was rewritten).
        max_output_tokens: the request's own limit, None when it has none.
        hint: where the conversation lived, for a conversation the scheduler does not know.
        predicted_output_tokens: somebody's guess at this turn's output, for policies that predict;
            room is then reserved for it in place of what has been observed.
        foreseen_tokens: all the KV the conversation will ever hold, for an oracle; 0: not known.
    """

    turn: TurnId
    conversation: ConversationId
    prompt_tokens: int
    prompt_exact: bool = False
    reusable_tokens: int | None = None
    max_output_tokens: int | None = None
    parent: ConversationId | None = None
    hint: PlacementHint | None = None
    predicted_output_tokens: int | None = None
    foreseen_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillFinished:
    """The prefiller has computed the prompt; its KV is on its way. ``prompt_tokens`` is exact."""

    turn: TurnId
    plan: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffFinished:
    """The KV that was to move has moved: the decoder can read it, or ``fallback`` says why not.

    The end of a hand-off from a prefiller, and of a copy from a conversation's former home. With a
    fallback nothing was moved and the decoder prefills by itself; the plan goes on.
    """

    turn: TurnId
    plan: int
    moved_tokens: int
    duration_s: float
    fallback: Fallback | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFinished:
    """The turn's last token left the decoder. All counts are the engine's own."""

    turn: TurnId
    plan: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFailed:
    """The turn broke upstream; ``retryable``: nothing has reached the client, it may run again."""

    turn: TurnId
    plan: int
    engine: EngineId
    retryable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnAborted:
    """The client left."""

    turn: TurnId


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationIdled:
    """The conversation waits for a person rather than for a tool: its KV may be parked first."""

    conversation: ConversationId


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationEnded:
    """The conversation is over: its KV may be freed once its running turns have ended."""

    conversation: ConversationId


@dataclass(frozen=True, slots=True, kw_only=True)
class TimerFired:
    """The time named by a ``WakeAt`` has come."""


Event = (
    EngineJoined
    | EngineReported
    | EngineDraining
    | EngineLost
    | TurnArrived
    | PrefillFinished
    | HandoffFinished
    | TurnFinished
    | TurnFailed
    | TurnAborted
    | ConversationIdled
    | ConversationEnded
    | TimerFired
)
