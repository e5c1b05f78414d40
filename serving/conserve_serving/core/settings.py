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
        max_waiting_turns: new conversations' turns held at once before further ones are refused,
            and turns of one conversation held behind its first.
        max_hold_s: longest time a turn is held before it is refused.
        idle_timeout_s: a conversation without a turn for this long is ended.
        max_attempts: placements a turn may have before it fails.
        headroom: share of the growth observed on live conversations that is kept free for those
            a decoder already holds (0: none).
        output_reserve_tokens: room reserved for a turn's output until outputs have been observed.
        drift_tolerance: difference between ledger and engine report, as a share of capacity,
            that is taken for a reading made a moment apart.
    """

    tier_mode: TierMode = TierMode.DEDICATED
    handoff_min_tokens: int | None = None
    max_waiting_turns: int = 1024
    max_hold_s: float = 60.0
    idle_timeout_s: float = 3600.0
    max_attempts: int = 3
    headroom: float = 1.0
    output_reserve_tokens: int = 256
    drift_tolerance: float = 0.02
