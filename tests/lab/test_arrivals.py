"""Arrival processes: their mean rate, their bursts, and that they are the replayer's."""

from __future__ import annotations

import itertools
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_serving.lab.arrivals import Bursts, bursty, poisson
from conserve_serving.replay.workload import poisson_arrivals


def dispersion(times: list[float], window_s: float) -> float:
    """Variance over mean of the arrivals in windows: 1 for a Poisson process."""
    counts = [0] * (int(times[-1] / window_s))
    for at in times:
        if at < window_s * len(counts):
            counts[int(at / window_s)] += 1
    return statistics.pvariance(counts) / statistics.mean(counts)


def test_poisson_arrivals_are_the_replayers() -> None:
    ours = itertools.islice(poisson(rate_per_s=0.7, seed=5), 300)
    assert list(ours) == list(poisson_arrivals(300, rate_per_s=0.7, seed=5))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.02, 0.5),
    fullness=st.floats(0.2, 1.0),
    conversations=st.floats(2, 40),
    rate=st.floats(0.1, 10),
)
def test_the_mean_rate_is_what_was_asked(
    seed: int, share: float, fullness: float, conversations: float, rate: float
) -> None:
    bursts = Bursts(
        factor=1.0 + fullness * (1.0 / share - 1.0) * 0.999,
        share=share,
        conversations=conversations,
    )
    mean = share * bursts.factor + (1.0 - share) * bursts.calm_factor
    assert mean == pytest.approx(1.0)
    count = 20_000
    times = list(itertools.islice(bursty(rate_per_s=rate, seed=seed, bursts=bursts), count))
    # Bursts come in about count × share × factor / conversations independent cycles.
    cycles = count * share * bursts.factor / conversations
    tolerance = 6.0 / min(cycles, count) ** 0.5 + 6.0 / count**0.5
    assert (count - 1) / times[-1] == pytest.approx(rate, rel=tolerance)
    assert times[0] == 0.0
    assert all(a <= b for a, b in itertools.pairwise(times))


def test_bursts_are_as_long_and_as_dense_as_asked() -> None:
    bursts = Bursts(factor=9.0, share=0.1, conversations=100.0)
    times = list(itertools.islice(bursty(rate_per_s=1.0, seed=2, bursts=bursts), 40_000))
    windows = [0] * (int(times[-1]) + 1)
    for at in times:
        windows[int(at)] += 1
    # 9 per second in a burst, 1/9 outside: four or more in a second are a burst's.
    dense = [n >= 4 for n in windows]
    assert sum(dense) / len(dense) == pytest.approx(0.1, rel=0.15)
    runs = [sum(1 for _ in run) for is_dense, run in itertools.groupby(dense) if is_dense]
    assert statistics.mean(n for n, d in zip(windows, dense, strict=True) if d) == pytest.approx(
        9.0, rel=0.05
    )
    assert statistics.mean(runs) == pytest.approx(100.0 / 9.0, rel=0.25)


def test_bursty_arrivals_are_burstier_than_poisson() -> None:
    plain = list(itertools.islice(poisson(rate_per_s=2.0, seed=1), 20_000))
    bursts = bursty(rate_per_s=2.0, seed=1, bursts=Bursts())
    assert dispersion(plain, 20.0) == pytest.approx(1.0, abs=0.15)
    assert dispersion(list(itertools.islice(bursts, 20_000)), 20.0) > 5.0


def test_a_burst_factor_of_one_is_poisson() -> None:
    times = bursty(rate_per_s=1.0, seed=3, bursts=Bursts(factor=1.0))
    assert dispersion(list(itertools.islice(times, 20_000)), 20.0) == pytest.approx(1.0, abs=0.15)
