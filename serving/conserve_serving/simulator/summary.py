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
        alive_s: virtual time it was there: to the end of the run, or to its loss.
        seconds: by what it did, batch by batch: enough to price the run's energy under any power
            model (``engines.power.reprice``). They add up to ``alive_s``.
        prefill_tokens: prompt tokens computed here, in steps of either kind.
        decode_tokens: tokens generated in decode and mixed steps. The first token of a request
            comes with its prefill and is not among them.
        finished_requests, aborted_requests: counts.
        energy: joules, by the power model of its profile.
        evicted_tokens: KV that left the device for want of room; of it, ``parked_tokens`` went to
            the host.
        dropped_tokens: KV that left both tiers for want of room.
        freed_tokens: KV that left because its conversation ended or moved.
        restored_tokens: KV that came back from the host.
        loaded_tokens: KV that came from other engines.
        sent_tokens: KV that left for other engines.
        retractions: running requests that were put back for want of room.
        egress_busy_s, ingress_busy_s: time its two links were busy; the host's restores go over
            the ingress, too.
    """

    tier: Tier
    profile: str
    alive_s: float
    seconds: StateSeconds
    prefill_tokens: int
    decode_tokens: int
    finished_requests: int
    aborted_requests: int
    energy: EnergyJ
    evicted_tokens: int
    parked_tokens: int
    dropped_tokens: int
    freed_tokens: int
    restored_tokens: int
    loaded_tokens: int
    sent_tokens: int
    retractions: int
    egress_busy_s: float
    ingress_busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A whole run.

    Attributes:
        conversations: that arrived.
        turns: that were closed, however they ended.
        refusals: times a turn was refused and sent again.
        virtual_s: virtual time from the start to the end of the last conversation.
        engines: by id.
    """

    conversations: int
    turns: int
    refusals: int
    virtual_s: float
    engines: dict[EngineId, EngineUse]

    @property
    def energy_j(self) -> float:
        """Joules of all engines, idle included; modelled."""
        return sum(use.energy.total_j for use in self.engines.values())
