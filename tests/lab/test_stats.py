"""Intervals: properties that hold for any figures, and how often they hold the truth."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.lab.errors import LabError
from conserve_serving.lab.stats import (
    RESAMPLES,
    Estimate,
    Verdict,
    difference,
    mean,
    ratio,
    verdict,
)

figures = st.lists(st.floats(0.1, 1e3), min_size=2, max_size=16)


@given(figures)
def test_a_mean_lies_in_its_interval_and_the_interval_in_the_data(values: list[float]) -> None:
    found = mean(values, resamples=500)
    assert found.value == pytest.approx(math.fsum(values) / len(values))
    slack = 1e-9 * max(values)
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack
    assert found.low - slack <= found.value <= found.high + slack
    assert found.n == len(values)


@given(figures, st.floats(0.01, 100.0))
def test_a_ratio_to_a_multiple_is_exact(values: list[float], factor: float) -> None:
    """Paired: whatever the seeds do to both, they do not blur what one does to the other."""
    found = ratio([factor * value for value in values], values, resamples=500)
    assert (found.low, found.value, found.high) == pytest.approx((factor, factor, factor))


@given(figures, st.floats(-100.0, 100.0))
def test_a_difference_by_a_constant_is_exact(values: list[float], by: float) -> None:
    found = difference([value + by for value in values], values, resamples=500)
    assert (found.low, found.value, found.high) == pytest.approx((by, by, by), abs=1e-9)


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=2, max_size=16))
def test_swapping_the_two_turns_the_interval_round(pairs: list[tuple[float, float]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    assert ratio(a, b, resamples=500).value == pytest.approx(1 / ratio(b, a, resamples=500).value)
    there, back = difference(a, b, resamples=500), difference(b, a, resamples=500)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_equal_seeds_give_equal_intervals_and_other_seeds_similar_ones() -> None:
    values = [value**0.5 for value in (1, 2, 4, 8, 9, 3, 17, 11, 6, 5, 2.5, 7)]
    assert mean(values, seed=3) == mean(values, seed=3)
    assert mean(values, seed=3) != mean(values, seed=4)
    assert mean(values, seed=3).low == pytest.approx(mean(values, seed=4).low, rel=0.02)


def test_the_interval_is_the_expanded_percentile_bootstrap_of_ten_thousand_resamples() -> None:
    """The same by hand: seeds are drawn with replacement, and both contenders get the same.

    The tail is Φ(−√(4/3) · 3.1824), with the 97.5 % point of Student's t at 3 degrees of freedom.
    """
    a, b = np.array([5.0, 7.0, 6.0, 9.0]), np.array([4.0, 9.0, 5.0, 6.0])
    draws = np.random.default_rng(0).integers(0, 4, size=(10_000, 4))
    by_hand = [a[draw].sum() / b[draw].sum() for draw in draws]
    found = ratio(list(a), list(b))
    assert RESAMPLES == 10_000
    tail = 0.0001192
    expected = tuple(np.quantile(by_hand, (tail, 1 - tail)))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-3)
    assert found.value == pytest.approx(27 / 24)


def test_pairing_is_what_makes_small_differences_visible() -> None:
    draw = random.Random(5)
    theirs = [draw.lognormvariate(0, 0.7) for _ in range(12)]
    ours = [0.9 * value * draw.uniform(0.97, 1.03) for value in theirs]
    paired = ratio(ours, theirs)
    unpaired = ratio(ours, theirs[5:] + theirs[:5])
    assert paired.high < 1.0
    assert unpaired.low < 1.0 < unpaired.high


@pytest.mark.parametrize("seeds", [8, 12, 24])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(seeds: int) -> None:
    """Nominally 95 %; of 1,500 the standard error is 0.6 %."""
    draw = random.Random(1)
    held = 0
    for _ in range(1500):
        found = mean([draw.gauss(10.0, 2.0) for _ in range(seeds)], resamples=500)
        held += found.low <= 10.0 <= found.high
    assert 0.925 <= held / 1500 <= 0.97


@pytest.mark.parametrize(
    ("value", "low", "high", "higher_is_better", "expected"),
    [
        (0.80, 0.75, 0.85, False, Verdict.WIN),
        (0.80, 0.75, 0.85, True, Verdict.LOSS),
        (1.30, 1.10, 1.50, True, Verdict.WIN),
        (1.30, 1.10, 1.50, False, Verdict.LOSS),
        (0.80, 0.55, 1.05, False, Verdict.TIE),  # the interval holds 1
        (0.985, 0.98, 0.99, False, Verdict.TIE),  # certain, but within 2 %
        (0.97, 0.965, 0.975, False, Verdict.WIN),
        (1.0, 1.0, 1.0, False, Verdict.TIE),
    ],
)
def test_win_tie_loss(value, low, high, higher_is_better, expected) -> None:
    of = Estimate(value=value, low=low, high=high, n=12)
    assert verdict(of, higher_is_better=higher_is_better) is expected


def test_a_wider_margin_makes_a_win_a_tie() -> None:
    of = Estimate(value=0.9, low=0.88, high=0.92, n=12)
    assert verdict(of, higher_is_better=False) is Verdict.WIN
    assert verdict(of, higher_is_better=False, margin=0.15) is Verdict.TIE


def test_a_difference_is_judged_around_none() -> None:
    of = Estimate(value=-0.3, low=-0.4, high=-0.2, n=12)
    assert verdict(of, higher_is_better=True, none=0.0) is Verdict.LOSS
    assert verdict(of, higher_is_better=False, none=0.0) is Verdict.WIN
    small = Estimate(value=0.015, low=0.01, high=0.018, n=12)
    assert verdict(small, higher_is_better=True, none=0.0) is Verdict.TIE


def test_one_seed_says_nothing() -> None:
    found = ratio([1.0], [2.0])
    assert found.value == 0.5
    assert math.isnan(found.low) and math.isnan(found.high)
    assert verdict(found, higher_is_better=False) is Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mean([]), "there are none"),
        (lambda: mean([1.0, math.nan]), "not finite"),
        (lambda: ratio([1.0, 2.0], [1.0]), "cannot be paired"),
        (lambda: ratio([1.0, 2.0], [1.0, 0.0]), "positive"),
    ],
)
def test_what_cannot_be_estimated(call, text: str) -> None:
    with pytest.raises(LabError, match=text):
        call()
