"""The simulator against what is known in closed form, and against the measured A40."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from virtual_load import A40, conversation, engines, scheduler

from conserve_serving.core.types import EngineId
from conserve_serving.engines.steptime import StepTimes
from conserve_serving.simulator import SimulatedConversation, TurnResult, VirtualCluster

P0 = EngineId("p0")
PROMPT_TOKENS = 8_192


def prompts(
    count: int, rate_per_s: float, seed: int, tokens: int = PROMPT_TOKENS
) -> Iterator[SimulatedConversation]:
    draw = random.Random(seed)
    at_s = 0.0
    for index in range(count):
        at_s += draw.expovariate(rate_per_s)
        yield conversation(f"c{index}", (tokens, 1), at_s=at_s)


class Waits:
    """Mean time from arrival to the prompt's computation."""

    def __init__(self, skip: int) -> None:
        self.count = self._seen = 0
        self.sum_s = 0.0
        self._skip = skip

    def add(self, result: TurnResult) -> None:
        self._seen += 1
        if self._seen > self._skip:
            assert result.prefilled_s is not None
            self.count += 1
            self.sum_s += result.prefilled_s - result.arrived_s


def service_s() -> float:
    """Time of one prompt on the idle prefiller: a step, since the step's budget is the prompt."""
    return StepTimes(A40).prefill_s(PROMPT_TOKENS)


def queue(count: int, share: float, seed: int) -> tuple[float, float]:
    """Mean wait and utilisation of the prefiller at ``share`` of its capacity.

    The decoder's part is one token and it has all the room it needs: the prefiller alone queues.
    """
    meter = Waits(skip=count // 100)
    virtual = VirtualCluster(
        scheduler(handoff_min_tokens=1),
        engines(
            decoders=1,
            profile=A40.replace(kv_capacity_tokens=50_000_000),
            chunk_tokens=PROMPT_TOKENS,
        ),
        on_turn=meter.add,
        report_interval_s=60.0,
    )
    virtual.feed(prompts(count, share / service_s(), seed))
    summary = virtual.run()
    busy_s = summary.engines[P0].seconds.busy_s
    assert busy_s == pytest.approx(count * service_s(), rel=1e-9)  # rate times service
    return meter.sum_s / meter.count - service_s(), busy_s / summary.virtual_s


def test_the_prefiller_queues_as_lindley_says() -> None:
    """The same arrivals through one server, by recursion: the very same mean wait."""
    count, share, seed = 2_000, 0.8, 5
    free_s = sum_s = 0.0
    for index, made in enumerate(prompts(count, share / service_s(), seed)):
        begins_s = max(free_s, made.arrival_s)
        free_s = begins_s + service_s()
        if index >= count // 100:
            sum_s += begins_s - made.arrival_s
    mean_s, busy = queue(count, share, seed)
    assert mean_s == pytest.approx(sum_s / (count - count // 100), rel=1e-6)
    assert busy == pytest.approx(share, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("share", "count"), [(0.3, 30_000), (0.5, 60_000)])
def test_the_prefiller_queues_as_m_d_1(share: float, count: int) -> None:
    """Poisson arrivals, equal prompts, one server: Pollaczek and Khinchine's mean wait.

    So many arrivals that the mean's standard deviation over seeds is well below 1 %.
    """
    mean_s, busy = queue(count, share, seed=7)
    assert mean_s == pytest.approx(share * service_s() / (2 * (1 - share)), rel=0.02)
    assert busy == pytest.approx(share, rel=0.01)


def test_the_prefiller_saturates_at_the_measured_rate() -> None:
    """1.634 first turns of 15,488 tokens in a second, as measured on the A40."""
    meter = Waits(skip=0)
    profile = A40.replace(kv_capacity_tokens=50_000_000)
    virtual = VirtualCluster(
        scheduler(handoff_min_tokens=1, max_hold_s=1e6),
        engines(decoders=1, profile=profile),
        on_turn=meter.add,
        report_interval_s=10.0,
    )
    virtual.feed(prompts(400, 20.0, seed=3, tokens=15_488))
    summary = virtual.run()
    use = summary.engines[P0]
    assert use.finished_requests / use.seconds.busy_s == pytest.approx(1.634, rel=0.03)
    assert use.finished_requests / summary.virtual_s == pytest.approx(1.634, rel=0.05)
