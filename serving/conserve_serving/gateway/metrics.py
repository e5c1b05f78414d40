"""Counts and times of the gateway, as plain numbers on the hot path, rendered on request.

Labels are bounded: engines by the configuration, everything else by enumerations. No conversation
id is ever a label.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from conserve_serving.gateway.lineage import Relation
from conserve_serving.gateway.views import kv_drift_tokens

if TYPE_CHECKING:
    from conserve_serving.gateway.gateway import Gateway

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_OVERHEAD: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0)


class Histogram:
    """Counts by bucket, and the sum."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, as Prometheus wants them."""
        total, result = 0, []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            result.append((bound, float(total)))
        return result

    @property
    def sum(self) -> float:
        return self._sum


class Metrics:
    """What the gateway itself counts; the scheduler's counters are read where they are."""

    def __init__(self) -> None:
        self.ttft_s = Histogram(_SECONDS)
        self.turn_s = Histogram(_SECONDS)
        self.overhead_s = Histogram(_OVERHEAD)
        self.responses: Counter[int] = Counter()
        self.identity: Counter[str] = Counter()
        self.relations: Counter[Relation] = Counter()
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.usage_missing = 0
        self.aborts = 0
        self.internal_errors = 0

    def count_response(self, status: int) -> None:
        """A response to a client is complete."""
        self.responses[status] += 1


class _GatewayCollector(Collector):
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterable[Metric]:
        gateway = self._gateway
        metrics, counters = gateway.metrics, gateway.runtime.scheduler.counters
        yield _counter("turns", "Turns closed, by outcome", "outcome", counters.outcomes)
        yield _counter("placements", "Placements, by reason", "reason", counters.placements)
        yield _counter("holds", "Turns held, by reason", "reason", counters.holds)
        yield _counter("rejections", "Turns refused, by reason", "reason", counters.rejections)
        yield _counter("transfers", "KV transfers, by reason", "reason", counters.transfers)
        yield _counter("moves", "Conversations placed anew, by reason", "reason", counters.moves)
        yield _counter("fallbacks", "Hand-offs not made, by reason", "reason", counters.fallbacks)
        yield _counter("releases", "KV released, by reason", "reason", counters.releases)
        yield _counter("ignored_events", "Stale events, by kind", "event", counters.ignored_events)
        yield _counter("responses", "Responses to clients, by status", "status", metrics.responses)
        yield _counter("identity", "Turns, by what named them", "source", metrics.identity)
        yield _counter("lineage", "Turns, by relation to before", "relation", metrics.relations)
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of finished turns", metrics.prompt_tokens),
            ("output_tokens", "Output tokens of finished turns", metrics.output_tokens),
            ("cached_tokens", "Prompt tokens found cached", metrics.cached_tokens),
            ("transferred_tokens", "Tokens handed over", counters.transferred_tokens),
            ("parked_tokens", "Tokens parked", counters.parked_tokens),
            ("cached_token_shortfall_tokens", "Not found cached", counters.shortfall_tokens),
            ("cached_token_shortfall_turns", "Turns with too few", counters.shortfall_turns),
            ("usage_missing", "Replies without token counts", metrics.usage_missing),
            ("client_aborts", "Clients that left early", metrics.aborts),
            ("internal_errors", "Defects met", metrics.internal_errors),
        ):
            family = CounterMetricFamily(f"conserve_{name}", text)
            family.add_metric([], value)
            yield family
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Arrival to first byte", metrics.ttft_s),
            ("turn_duration_seconds", "Arrival to last byte", metrics.turn_s),
            ("gateway_overhead_seconds", "Spent in the gateway itself", metrics.overhead_s),
        ):
            family_h = HistogramMetricFamily(f"conserve_{name}", text)
            family_h.add_metric([], histogram.buckets(), histogram.sum)
            yield family_h
        yield _gauge("open_conversations", "Open conversations", gateway.conversations.open_count)
        yield _gauge("lineage_prompts", "Prompts remembered", gateway.attribution.lineage_prompts)
        yield _gauge("stored_responses", "Of the Responses API", len(gateway.responses))
        yield _gauge("stored_responses_bytes", "Histories included", gateway.responses.bytes)
        yield _gauge("live_turns", "Turns arrived and not closed", gateway.runtime.live_turns)
        yield from self._engines()
        yield self._joules()

    def _engines(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("conserve_engine_up", "Whether it serves", labels=["engine", "tier"])
        held = GaugeMetricFamily(
            "conserve_engine_kv_tokens", "KV tokens", labels=["engine", "tier", "kind"]
        )
        drift = GaugeMetricFamily(
            "conserve_engine_kv_drift_tokens",
            "KV the engine reports beyond what the ledger says is resident",
            labels=["engine", "tier"],
        )
        states = self._gateway.runtime.scheduler.engines
        for engine in self._gateway.fleet:
            labels = [engine.id, engine.tier.value]
            up.add_metric(labels, float(engine.serving))
            state = states.get(engine.id)
            if state is not None:
                held.add_metric([*labels, "held"], state.held_tokens)
                held.add_metric([*labels, "parked"], state.parked_tokens)
                held.add_metric([*labels, "capacity"], state.capacity_tokens)
            drifted = kv_drift_tokens(self._gateway, engine)
            if drifted is not None:
                drift.add_metric(labels, drifted)
        yield up
        yield held
        yield drift

    def _joules(self) -> Metric:
        family = CounterMetricFamily(
            "conserve_energy_joules",
            "Joules of engines, by what they were used for; those not attributed yet are left out",
            labels=["engine", "tier", "kind", "source"],
        )
        for engine, tier, kind, source, joules in self._gateway.energy.booked():
            family.add_metric([engine, tier, kind.value, source], joules)
        return family


def _counter(name: str, text: str, label: str, counts: Mapping[Any, int]) -> Metric:
    family = CounterMetricFamily(f"conserve_{name}", text, labels=[label])
    for key, value in counts.items():
        family.add_metric([str(key)], value)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(f"conserve_{name}", text)
    family.add_metric([], value)
    return family


class Exposition:
    """The text of ``/metrics``."""

    def __init__(self, gateway: Gateway) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_GatewayCollector(gateway))

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
