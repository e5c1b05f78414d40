"""Goodput from rows: up to which load the SLO is kept, seed by seed.

Rows of a grid and rows of a search (``lab.goodput``) are read alike: under each seed the share of
conversations that miss the SLO is a function of the load, and the goodput is where it first crosses
``MISSES``, between the two neighbouring loads on a straight line over the logarithm of the load.
After a search these are ``TOLERANCE`` apart and the line hardly matters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from conserve_serving.lab.goodput import MISSES
from conserve_serving.lab.report.context import Context
from conserve_serving.lab.report.metrics import SLO_ALL, SLO_TTFET, Metric
from conserve_serving.lab.report.rows import Comparison, Place, compare
from conserve_serving.lab.stats import Estimate, mean

#: Metrics whose goodput is shown: (name, metric, in words).
GOODPUTS: Final = (
    ("Gf", SLO_TTFET, "conversations/s at which 95 % meet the TTFET SLO"),
    ("Gany", SLO_ALL, "conversations/s at which 95 % meet every SLO"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Of one contender at one place.

    Attributes:
        by_seed: conversations per second; 0 where the lowest load run already failed.
        open_end: in some seed no load that was run failed: the figure is a lower bound.
        closed_start: in some seed every load that was run failed: 0 stands for "below the lowest".
    """

    by_seed: dict[int, float]
    open_end: bool
    closed_start: bool

    @property
    def estimate(self) -> Estimate:
        """Mean over seeds."""
        return mean(list(self.by_seed.values()))

    def compare(self, other: Goodput, *, rival: str, scale: float = 1.0) -> Comparison | None:
        """This against another, paired by seed; ``scale`` multiplies this one's figures."""
        ours = {seed: value * scale for seed, value in self.by_seed.items()}
        return compare(ours, other.by_seed, rival=rival, lower_is_better=False)


def goodput(context: Context, place: Place, contender: str, metric: Metric) -> Goodput | None:
    """Of one contender; None where no seed has two loads, or none says who met the SLO."""
    by_seed: dict[int, float] = {}
    open_end = closed_start = False
    for seed, rows in context.rows.by_seed(place, contender).items():
        points = [(r.rate_per_s, 1.0 - met) for r in rows if (met := metric.of(r.raw)) is not None]
        points = [(rate, missed) for rate, missed in points if rate > 0]
        if len(points) < 2:
            continue
        rate, beyond = crossing(points)
        by_seed[seed] = rate
        open_end |= beyond > 0
        closed_start |= beyond < 0
    if not by_seed:
        return None
    return Goodput(by_seed=by_seed, open_end=open_end, closed_start=closed_start)


def crossing(points: Sequence[tuple[float, float]], limit: float = MISSES) -> tuple[float, int]:
    """Where misses first exceed the limit.

    Args:
        points: (load, share that misses), ascending.
        limit: share that may miss.

    Returns:
        The load; and 1 where no load exceeds it (the load is the highest), −1 where the lowest
        does (the load is 0), else 0.
    """
    if points[0][1] > limit:
        return 0.0, -1
    for (low, missed_low), (high, missed_high) in itertools.pairwise(points):
        if missed_high > limit:
            share = (limit - missed_low) / (missed_high - missed_low)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low))), 0
    return points[-1][0], 1
