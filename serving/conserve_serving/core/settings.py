"""Settings of the scheduler: plain data. The configuration file's model is the gateway's."""

from __future__ import annotations

from dataclasses import dataclass

from conserve_serving.core.types import TierMode


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """How the scheduler behaves, whatever the policy.

    Attributes:
        tier_mode: whether the prefill tier also holds conversations.
        handoff_min_tokens: first turns shorter than this stay on their decoder; None: the length
            at which prefilling costs the decoder more time than the hand-off takes, from the
            costs measured so far.
        handoff_floor_tokens: shorter first turns are never handed over by cost, because engines
            compute short hits in the store instead of loading them (SGLang's
            ``prefetch_threshold``, 256).
        max_waiting_turns: new conversations' turns held at once before further ones are refused,
            and turns of one conversation held behind its first.
        max_hold_s: longest time a turn is held before it is refused.
        no_engine_hold_s: the same while there is no engine at all that takes conversations.
        protect_idle_s: how long an idle conversation's KV is safe from conversations that find no
            room, where the host tier has none left to park it in. After that it may be released;
            the conversation stays open and is prefilled anew when it goes on.
        idle_timeout_s: a conversation without a turn for this long is ended.
        max_attempts: placements a turn may have before it fails.
        headroom: share of the growth observed on live conversations that is kept free for those
            a decoder already holds (0: none).
        copies: whether the driver can copy a conversation's KV from one engine that holds it to
            another, and to a prefiller. Without it, policies are not offered to move one, and a
            prefiller that is given an append computes what its own cache lacks.
        review_interval_s: how often the policy is asked whether the prefill tier should hold
            conversations (tier mode ``auto``).
        output_reserve_tokens: room reserved for a turn's output until outputs have been observed.
    """

    tier_mode: TierMode = TierMode.DEDICATED
    handoff_min_tokens: int | None = None
    handoff_floor_tokens: int = 256
    max_waiting_turns: int = 1024
    max_hold_s: float = 60.0
    no_engine_hold_s: float = 10.0
    protect_idle_s: float = 120.0
    idle_timeout_s: float = 3600.0
    max_attempts: int = 3
    headroom: float = 1.0
    copies: bool = False
    review_interval_s: float = 10.0
    output_reserve_tokens: int = 256
