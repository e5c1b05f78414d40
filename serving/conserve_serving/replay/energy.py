"""Joules of a run, from the engines' own counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conserve_serving.replay.records import ClusterSample


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyUsed:
    """Energy of all engines over a run, idle included.

    Attributes:
        joules: None when any engine does not tell.
        by_engine: what each engine that tells has used.
        source: where the counters come from, or why ``joules`` is None.
    """

    joules: float | None
    by_engine: dict[str, float]
    source: str


def energy_used(samples: Sequence[ClusterSample]) -> EnergyUsed:
    """Growth of every engine's energy counter from the first sample to the last.

    A counter that went down belongs to an engine that restarted and counts from zero again; what
    it used between its last sample and its end is missing (at most one sampling interval).
    """
    used: dict[str, float] = {}
    last: dict[str, float] = {}
    sources: set[str] = set()
    silent: set[str] = set()
    for sample in samples:
        for engine in sample.cluster.engines:
            reading = engine.energy_j
            if reading is None:
                if engine.id not in last:
                    silent.add(engine.id)
                continue
            silent.discard(engine.id)
            if engine.energy_source:
                sources.add(engine.energy_source)
            # An engine that joined during the run has counted from its own start.
            before = last.get(engine.id, reading if sample is samples[0] else 0.0)
            used[engine.id] = used.get(engine.id, 0.0) + (
                reading - before if reading >= before else reading
            )
            last[engine.id] = reading
    if not samples:
        return EnergyUsed(joules=None, by_engine={}, source="unknown: no cluster description")
    if silent or not used:
        who = ", ".join(sorted(silent)) or "any engine"
        return EnergyUsed(joules=None, by_engine=used, source=f"unknown: not reported by {who}")
    source = "; ".join(sorted(sources)) or "reported by the engines, source not named"
    return EnergyUsed(joules=sum(used.values()), by_engine=used, source=source)
