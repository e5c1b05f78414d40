"""What a cluster can carry of a workload, by arithmetic: conversations per second, tier by tier.

An engine that is never idle and whose batch is full carries one over the seconds of work that a
conversation brings it. Where those seconds come from:

* **first prompts**, packed into full steps of the engine's chunk, on the prefix that gives the
  same (query, key) pairs (``steptime.py``);
* **later prompts** ("tail"), each in a step of its own, which has a floor;
* **decode**, one token of each of a batch per step. The batch is as many conversations as the KV
  holds, each with its context and the answer under way;
* **interference**: steps that do both take ``mixed_slowdown`` times the sum of the two. As many of
  an engine's prefill steps do as it has decode steps, and the other way round;
* **the link**: the hand-off out of each prefiller, and into each decoder, one at a time.

*Dedicated* tiers carry the least of first prompts, tail with decode, and link; *hosting* engines
each do everything. Both are upper bounds: queues, latency targets and uneven load come on top, and
parked KV is taken to come back at no cost. ``docs/clusters.md`` compares them with simulated
saturation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, NamedTuple

from conserve_serving.core.types import EngineId, Tier
from conserve_serving.engines.steptime import StepTimes
from conserve_serving.lab.boards import LinkSpec
from conserve_serving.lab.cluster_spec import ClusterSpec
from conserve_serving.lab.demand import Demand
from conserve_serving.lab.errors import LabError
from conserve_serving.lab.pool import Pool
from conserve_serving.lab.workloads import WorkloadSpec
from conserve_serving.simulator import SimulatedEngine

#: Above this share of the link's capacity, transfers queue for as long as they take.
LINK_SHARE: Final = 0.8
#: Dedicated tiers must carry so much more than equal engines that host, to be worth their idling.
EQUAL_TIERS_GAIN: Final = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapacity:
    """Seconds of one engine's time that a mean conversation costs, by what is done where.

    Attributes:
        first_s: its first prompt, nothing beside it.
        tail_s: its later prompts, nothing beside them.
        decode_s: its answers, at ``batch``.
        batch: conversations decoding together: what the KV holds, or the latency limit allows.
        step_s: one decode step of that batch.
        tail_and_decode_s: the last two together, with interference.
        hosting_s: all three, with interference.
        egress_s, ingress_s: its link, for handing the first prompt's KV over, and for taking it.
    """

    engine: EngineId
    tier: Tier
    profile: str
    first_s: float
    tail_s: float
    decode_s: float
    batch: int
    step_s: float
    tail_and_decode_s: float
    hosting_s: float
    egress_s: float
    ingress_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterCapacity:
    """Conversations per second that a cluster can carry, by what each part of it can.

    Attributes:
        prefill_per_s: first prompts, on the prefill tier; 0 without one.
        decode_per_s: later prompts and all decode, on the decode tier.
        link_per_s: hand-offs, out of the prefill tier and into the decode tier.
        dedicated_per_s: the least of the three.
        bottleneck: which it is: ``prefill``, ``decode`` or ``link``.
        valve_per_s: dedicated tiers whose decoders also prefill what the prefill tier or the link
            cannot take.
        hosting_per_s: every engine does everything, each at its own speed.
        engines: where it comes from.
    """

    prefill_per_s: float
    decode_per_s: float
    link_per_s: float
    dedicated_per_s: float
    bottleneck: str
    valve_per_s: float
    hosting_per_s: float
    engines: tuple[EngineCapacity, ...]

    @property
    def link_busy(self) -> float:
        """Share of the link's time at what dedicated tiers carry; 1.0 where it is what limits."""
        return self.dedicated_per_s / self.link_per_s if self.link_per_s else 0.0

    @property
    def equal_tiers(self) -> bool:
        """Every engine costs a conversation the same."""
        return len({(one.hosting_s, one.profile) for one in self.engines}) == 1

    @property
    def dedicate(self) -> bool:
        """Whether the prefill tier should only prefill.

        It should if that carries more (by a tenth on equal tiers, where hosting has no slow engine
        to hurt it) and leaves the link room. By throughput alone: a first-turn latency target may
        say otherwise.
        """
        gain = EQUAL_TIERS_GAIN if self.equal_tiers else 1.0
        carries_more = self.valve_per_s > gain * self.hosting_per_s
        return self.prefill_per_s > 0 and carries_more and self.link_busy < LINK_SHARE


def capacity(
    engines: Sequence[SimulatedEngine],
    demand: Demand,
    *,
    step_limit_s: float | None = None,
) -> ClusterCapacity:
    """What these engines can carry of that demand.

    Args:
        engines: from ``ClusterSpec.engines``: link and ``mixed_slowdown`` are in their profiles.
        demand: the workload.
        step_limit_s: longest decode step allowed, which limits the batch; None: only KV does.

    Raises:
        LabError: there is no engine, or one cannot hold a single mean conversation.
    """
    if not engines:
        raise LabError("a cluster needs at least one engine")
    each = tuple(engine_capacity(engine, demand, step_limit_s=step_limit_s) for engine in engines)
    prefillers = [one for one in each if one.tier is Tier.PREFILL]
    decoders = [one for one in each if one.tier is Tier.DECODE]
    parts = {
        "prefill": _rate(prefillers, lambda one: one.first_s),
        "decode": _rate(decoders, lambda one: one.tail_and_decode_s),
        "link": min(
            _rate(prefillers, lambda one: one.egress_s), _rate(decoders, lambda one: one.ingress_s)
        ),
    }
    bottleneck = min(parts, key=lambda name: parts[name])
    dedicated = parts[bottleneck]
    spare = 1.0 - dedicated / parts["decode"] if parts["decode"] else 0.0
    return ClusterCapacity(
        prefill_per_s=parts["prefill"],
        decode_per_s=parts["decode"],
        link_per_s=parts["link"],
        dedicated_per_s=dedicated,
        bottleneck=bottleneck,
        valve_per_s=dedicated + spare * _rate(decoders, lambda one: one.hosting_s),
        hosting_per_s=_rate(each, lambda one: one.hosting_s),
        engines=each,
    )


def cluster_capacity(
    cluster: ClusterSpec,
    workload: WorkloadSpec,
    *,
    mixed_slowdown: float = 1.0,
    link: str | LinkSpec | None = None,
    step_limit_s: float | None = None,
) -> ClusterCapacity:
    """What a cluster can carry of a workload, by the conversations that the workload would draw.

    Args:
        cluster: the hardware.
        workload: its rate does not matter. Without ``max_context_tokens`` of its own it is cut to
            what each engine can hold.
        mixed_slowdown, link: see ``ClusterSpec.engines``.
        step_limit_s: see :func:`capacity`.

    Raises:
        LabError: the workload or the link cannot be used as asked, or an engine is too small.
    """
    if workload.max_context_tokens is None:
        workload = replace(workload, max_context_tokens=cluster.longest_context_tokens)
    engines = cluster.engines(mixed_slowdown=mixed_slowdown, link=link)
    return capacity(engines, _demand(replace(workload, rate_per_s=1.0)), step_limit_s=step_limit_s)


@lru_cache(maxsize=16)
def _demand(workload: WorkloadSpec) -> Demand:
    return Demand.of(Pool.load(workload).stream(workload))


def engine_capacity(
    engine: SimulatedEngine, demand: Demand, *, step_limit_s: float | None = None
) -> EngineCapacity:
    """What a mean conversation costs one engine: see :func:`capacity`."""
    profile, times = engine.profile, StepTimes(engine.profile)
    chunk = engine.config.chunk_tokens or profile.chunk_tokens
    first = _Prefill(
        _packed_s(times, demand.first_tokens, demand.first_pairs, chunk),
        demand.first_tokens / chunk,
        demand.first_tokens,
    )
    tail = _tail(times, demand, chunk)
    batch, step_s = _batch(engine, times, demand, step_limit_s)
    decode = _Decode(demand.decode_tokens / batch, step_s, batch, demand.context_read_tokens)
    moved = [new for new, _ in demand.first_prompts]
    return EngineCapacity(
        engine=engine.id,
        tier=engine.tier,
        profile=profile.name,
        first_s=first.total_s,
        tail_s=tail.total_s,
        decode_s=decode.steps * step_s,
        batch=batch,
        step_s=step_s,
        tail_and_decode_s=_together_s(times, [tail], decode),
        hosting_s=_together_s(times, [first, tail], decode),
        egress_s=sum(profile.handoff_s(tokens) for tokens in moved) / len(moved),
        ingress_s=sum(profile.ingress_s(tokens) for tokens in moved) / len(moved),
    )


class _Prefill(NamedTuple):
    """Prefill of a mean conversation: seconds alone, steps, tokens."""

    total_s: float
    steps: float
    tokens: float


class _Decode(NamedTuple):
    """Decode of a mean conversation: its share of steps, and what one of them is."""

    steps: float
    step_s: float
    batch: int
    context_tokens: float


def _together_s(times: StepTimes, prefills: list[_Prefill], decode: _Decode) -> float:
    """Seconds of one engine that does all that: what can share a step does, and is slowed there."""
    total_s = sum(prefill.total_s for prefill in prefills) + decode.steps * decode.step_s
    steps = sum(prefill.steps for prefill in prefills)
    if not steps:
        return total_s
    shared = min(1.0, decode.steps / steps)
    kv_tokens = decode.batch * decode.context_tokens
    for prefill in prefills:
        if prefill.steps:
            chunk_tokens = round(prefill.tokens / prefill.steps)
            slowdown = times.mixed_slowdown(chunk_tokens, decode.batch, kv_tokens)
            alone_s = prefill.total_s + prefill.steps * decode.step_s
            total_s += (slowdown - 1.0) * shared * alone_s
    return total_s


def _tail(times: StepTimes, demand: Demand, chunk: int) -> _Prefill:
    """Later prompts: each in steps of its own."""
    total_s, steps = 0.0, 0
    for new, cached in demand.tail_prompts:
        for begin in range(0, new, chunk):
            total_s += times.prefill_s(min(chunk, new - begin), cached + begin)
            steps += 1
    count = demand.conversations
    return _Prefill(total_s / count, steps / count, demand.tail_tokens)


def _packed_s(times: StepTimes, tokens: float, pairs: float, chunk: int) -> float:
    """Prompts packed into full steps: ``tokens / chunk`` of them, on the equivalent prefix."""
    if tokens <= 0:
        return 0.0
    return tokens / chunk * times.prefill_s(chunk, pairs / tokens - chunk / 2)


def _batch(
    engine: SimulatedEngine, times: StepTimes, demand: Demand, step_limit_s: float | None
) -> tuple[int, float]:
    """The largest batch that fits the KV and the limit, and its step."""
    room = engine.config.kv_capacity_tokens or engine.profile.kv_capacity_tokens
    held = max(demand.context_held_tokens, 1.0)
    batch = min(int(room // held), engine.config.max_running_requests)
    if batch < 1:
        raise LabError(
            f"engine {engine.id} ({engine.profile.name}) holds {room:,} KV tokens, a mean "
            f"conversation {held:,.0f}: cap max_context_tokens or take an engine with more memory"
        )

    def step_s(of: int) -> float:
        return times.decode_s(of, of * demand.context_read_tokens)

    if step_limit_s is not None and step_s(batch) > step_limit_s:
        low, high = 1, batch  # step_s rises with the batch
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if step_s(middle) <= step_limit_s else (low, middle)
        batch = low
    return batch, step_s(batch)


def _rate(engines: Sequence[EngineCapacity], cost_s: Callable[[EngineCapacity], float]) -> float:
    """Conversations per second of engines that share them by their speed."""
    costs = [cost_s(one) for one in engines]
    if any(cost == 0.0 for cost in costs):
        return float("inf")
    return sum(1.0 / cost for cost in costs)
