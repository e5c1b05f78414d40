"""What a run used: seconds, tokens and joules of every engine."""

from __future__ import annotations

from dataclasses import dataclass

from conserve_serving.core.types import EngineId, Tier
from conserve_serving.engines.model_types import EnergyJ
from conserve_serving.engines.power import StateSeconds


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUse:
    """What one engine did in a run.

    Attributes:
        tier, profile: as set up; the profile by name.
        alive_s: virtual time it was there: to the end of the run, or to its loss (``lost``).
        seconds: by what it did, batch by batch: enough to price the run's energy under any power
            model (``engines.power.reprice``). They add up to ``alive_s``.
        energy: joules, by the power model of its profile.
        prefill_tokens: prompt tokens computed here, in steps of either kind.
        decode_tokens: tokens generated in decode and mixed steps.
        first_tokens: tokens that came with a prefill instead.
        asked_tokens, cached_tokens: prompts that were completed here, and what of them was cached
            or loaded.
        recomputed_tokens: prompt tokens computed again after a retraction.
        abandoned_tokens: computed for prompts that were never completed.
        output_tokens: of the requests that finished here.
        abandoned_output_tokens: generated for requests that were aborted.
        finished_requests, aborted_requests: counts.
        retractions: running requests that were put back for want of room.
        evicted_tokens: KV that left the device for want of room; of it, ``parked_tokens`` went to
            the host.
        dropped_tokens: KV that left both tiers for want of room.
        freed_tokens: KV that left because its conversation ended or moved.
        restored_tokens: KV that came back from the host.
        loaded_tokens: KV that came from other engines.
        sent_tokens: KV that left for other engines.
        egress_busy_s, ingress_busy_s: time its two links were busy; the host's restores go over
            the ingress, too.
        left_used_tokens, left_requests, left_sessions: what was still held at the end.
    """

    tier: Tier
    profile: str
    alive_s: float
    lost: bool
    seconds: StateSeconds
    energy: EnergyJ
    prefill_tokens: int
    decode_tokens: int
    first_tokens: int
    asked_tokens: int
    cached_tokens: int
    recomputed_tokens: int
    abandoned_tokens: int
    output_tokens: int
    abandoned_output_tokens: int
    finished_requests: int
    aborted_requests: int
    retractions: int
    evicted_tokens: int
    parked_tokens: int
    dropped_tokens: int
    freed_tokens: int
    restored_tokens: int
    loaded_tokens: int
    sent_tokens: int
    egress_busy_s: float
    ingress_busy_s: float
    left_used_tokens: int
    left_requests: int
    left_sessions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A whole run.

    Attributes:
        conversations: that arrived.
        ended_conversations: that ended.
        arrived_turns, turns: turns that arrived, and those that were closed, however they ended.
        finished_turns: that ended well.
        output_tokens: that the turns which ended well asked for.
        refusals: times a turn was refused and sent again.
        virtual_s: virtual time from the start to the end of the last conversation.
        engines: by id.
        booked_tokens, booked_turns, booked_conversations: what the scheduler's books held at the
            end: KV on all engines, turns, open conversations.
    """

    conversations: int
    ended_conversations: int
    arrived_turns: int
    turns: int
    finished_turns: int
    output_tokens: int
    refusals: int
    virtual_s: float
    engines: dict[EngineId, EngineUse]
    booked_tokens: int
    booked_turns: int
    booked_conversations: int

    @property
    def energy_j(self) -> float:
        """Joules of all engines, idle included; modelled."""
        return sum(use.energy.total_j for use in self.engines.values())
