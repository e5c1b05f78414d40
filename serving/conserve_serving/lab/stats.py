"""Intervals: means over seeds, and paired comparisons of two contenders over the same seeds.

The unit that is resampled is the seed, that is one whole run: conversations within a run share a
queue and are not independent. Two contenders have met the same conversations at the same times
under each seed, so the same resampled seeds are taken of both (paired bootstrap). Plain percentile
intervals of few seeds are too narrow (of 12 seeds they hold the truth nine times in ten), so theirs
are taken further out, as far as Student's t is from the normal distribution: expanded percentiles,
T. Hesterberg, "What Teachers Should Know About the Bootstrap", Am. Stat. 69 (2015). No interval
is wider than the data; fewer than six seeds may all lie on one side of the truth by chance.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

from conserve_serving.lab.errors import LabError

#: Resamples of each bootstrap.
RESAMPLES: Final = 10_000
#: Share of the resampled statistics inside an interval.
CONFIDENCE: Final = 0.95
#: Effects up to this share are ties, however narrow their interval.
MARGIN: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with its interval; ``n`` seeds. One seed has no interval: low and high are nan."""

    value: float
    low: float
    high: float
    n: int


class Verdict(enum.StrEnum):
    """How one contender compares with another; ``unknown``: one seed says nothing."""

    WIN = "win"
    TIE = "tie"
    LOSS = "loss"
    UNKNOWN = "unknown"


def mean(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean over seeds with its bootstrap interval.

    Args:
        values: one figure per seed.
        seed: of the resampling; equal seeds give equal intervals.
        resamples: how many.

    Raises:
        LabError: there are no values, or one is not finite.
    """
    data = _column("values", values)
    draws = _draws(len(data), seed, resamples)
    return _estimate(float(data.mean()), data[draws].mean(axis=1), n=len(data))


def ratio(
    ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Mean of ``ours`` over mean of ``theirs``, seed by seed paired.

    Raises:
        LabError: the two do not pair, or theirs are not all positive.
    """
    a, b = _pair(ours, theirs)
    if not (b > 0).all():
        raise LabError("a ratio needs positive figures below the line. Use a difference.")
    draws = _draws(len(a), seed, resamples)
    resampled = a[draws].mean(axis=1) / b[draws].mean(axis=1)
    return _estimate(float(a.mean() / b.mean()), resampled, n=len(a))


def difference(
    ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Mean of ``ours`` less ``theirs``, seed by seed paired.

    Raises:
        LabError: the two do not pair.
    """
    a, b = _pair(ours, theirs)
    gap = a - b
    draws = _draws(len(gap), seed, resamples)
    return _estimate(float(gap.mean()), gap[draws].mean(axis=1), n=len(gap))


def verdict(
    of: Estimate, *, higher_is_better: bool, margin: float = MARGIN, none: float = 1.0
) -> Verdict:
    """What a ratio of ours to theirs, or a difference, says.

    A win or a loss needs both: the interval excludes "no effect", and the effect is beyond the
    margin.

    Args:
        of: from :func:`ratio` or :func:`difference`.
        higher_is_better: true for tokens per joule and goodput, false for latencies.
        margin: effects up to this are ties.
        none: what no effect is: 1 of a ratio, 0 of a difference.
    """
    if of.n < 2:
        return Verdict.UNKNOWN
    if of.low <= none <= of.high or abs(of.value - none) <= margin:
        return Verdict.TIE
    return Verdict.WIN if (of.value > none) == higher_is_better else Verdict.LOSS


@lru_cache(maxsize=16)
def _draws(n: int, seed: int, resamples: int) -> NDArray[np.intp]:
    """Which seeds are in each resample: the same for every figure, so that figures agree."""
    return np.random.default_rng(seed).integers(0, n, size=(resamples, n))


def _estimate(value: float, resampled: NDArray[np.float64], *, n: int) -> Estimate:
    if n < 2:
        return Estimate(value=value, low=math.nan, high=math.nan, n=n)
    tail = _tail(n)
    low, high = np.quantile(resampled, (tail, 1.0 - tail))
    return Estimate(value=value, low=float(low), high=float(high), n=n)


def _tail(n: int) -> float:
    """Share of the resampled statistics below an interval of ``n`` seeds, and above it."""
    normal, degrees = NormalDist(), n - 1
    z = normal.inv_cdf((1.0 + CONFIDENCE) / 2)
    # Student's t by its expansion in 1/degrees (Abramowitz and Stegun 26.7.5).
    t = (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )
    return normal.cdf(-math.sqrt(n / degrees) * t)


def _column(name: str, values: Sequence[float]) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        raise LabError(f"{name}: there are none. Give one figure per seed.")
    if not np.isfinite(data).all():
        raise LabError(f"{name}: some are not finite. Leave seeds out that have no such figure.")
    return data


def _pair(
    ours: Sequence[float], theirs: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(ours) != len(theirs):
        raise LabError(
            f"{len(ours)} figures cannot be paired with {len(theirs)}. Give both for the same "
            "seeds, in the same order."
        )
    return _column("ours", ours), _column("theirs", theirs)
