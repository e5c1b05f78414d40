"""The highest rate that a contender carries: its capacity, and its goodput at the SLO.

Found seed by seed: under one seed every rate meets the same conversations in the same pattern of
arrivals, only closer together (common random numbers), so the answer of a search is a figure of
that seed, and two contenders' figures can be paired. Whether a rate is carried is assumed to change
once, from yes to no, as the rate rises; a run is noisy and may change twice within a few per cent,
and then one of the changes is found.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from conserve_serving.lab.cell import Cell

Row = dict[str, Any]

#: Share of conversations that may miss the SLO.
MISSES: Final = 0.05
#: A search ends when the rates that pass and fail are this close.
TOLERANCE: Final = 0.02
#: Rates this many times below or above the first one are not tried.
_REACH: Final = 256.0


class Target(enum.StrEnum):
    """What a rate has to keep.

    ``stable``: the backlog does not grow without end (capacity). ``ttfet`` (the studies' ``Gf``)
    and ``ttfet_without_gaps``: at most 5 % of conversations miss the TTFET SLO. ``any``
    (``Gany``): at most 5 % miss any of TTFET, first-turn TTFT, last-turn TBT and E2E.
    """

    STABLE = "stable"
    TTFET = "ttfet"
    TTFET_WITHOUT_GAPS = "ttfet_without_gaps"
    ANY = "any"

    def kept(self, row: Row) -> bool:
        """Whether the run kept it."""
        if self is Target.STABLE:
            return not row["saturated"] and not row["conversations_incomplete"]
        met = row["slo"]["all" if self is Target.ANY else self.value]
        return met is not None and met >= 1.0 - MISSES


@dataclass(slots=True, kw_only=True)
class Search:
    """Bracketing, then bisection on a logarithmic scale. Ask ``next_rate``, then ``tell``.

    Attributes:
        start_per_s: the first rate.
        tolerance: see :data:`TOLERANCE`.
        passed_per_s, failed_per_s: highest that passed, lowest that failed; None: none yet.
        tried: every rate with what came of it, in order.
        error: why there is no answer: a run failed.
    """

    start_per_s: float
    tolerance: float = TOLERANCE
    passed_per_s: float | None = None
    failed_per_s: float | None = None
    tried: list[tuple[float, bool]] = field(default_factory=list)
    error: str | None = None

    @property
    def next_rate(self) -> float | None:
        """What to try next; None: the search is over."""
        low, high = self.passed_per_s, self.failed_per_s
        if self.error is not None:
            return None
        if low is None and high is None:
            return self.start_per_s
        if low is None and high is not None:
            return None if high * _REACH <= self.start_per_s else high / 2
        if high is None and low is not None:
            return None if low >= self.start_per_s * _REACH else low * 2
        assert low is not None and high is not None  # noqa: S101 - the cases above
        return None if high <= low * (1.0 + self.tolerance) else math.sqrt(low * high)

    def tell(self, rate_per_s: float, *, passed: bool) -> None:
        """What came of a rate."""
        self.tried.append((rate_per_s, passed))
        if passed:
            self.passed_per_s = max(rate_per_s, self.passed_per_s or 0.0)
        else:
            self.failed_per_s = min(rate_per_s, self.failed_per_s or math.inf)

    @property
    def rate_per_s(self) -> float | None:
        """The answer: the highest rate that passed. 0: even the lowest tried failed; None: a run
        failed. Where nothing failed it is the highest that was tried (``failed_per_s`` is None).
        """
        return None if self.error is not None else self.passed_per_s or 0.0


def search(
    cells: Sequence[Cell],
    target: Target,
    run: Callable[[list[Cell]], Sequence[Row]],
    *,
    start_per_s: float = 1.0,
    tolerance: float = TOLERANCE,
    on_round: Callable[[Sequence[Search]], None] | None = None,
) -> list[Search]:
    """The highest rate at which each cell keeps the target.

    All searches go on side by side, so that each round is as many runs as there are searches.

    Args:
        cells: what to search, one for each contender, seed, cluster …; their rates do not matter.
        target: what has to be kept.
        run: runs cells and returns their rows in the same order; a row may say that it failed, and
            rows may be missing when it was interrupted (then so are answers).
        start_per_s: the first rate tried; a good guess saves a few rounds.
        tolerance: relative width at which a search ends.
        on_round: told of the searches after each round.
    """
    searches = [Search(start_per_s=start_per_s, tolerance=tolerance) for _ in cells]
    while True:
        asked = [
            (one, cell, rate)
            for one, cell in zip(searches, cells, strict=True)
            if (rate := one.next_rate) is not None
        ]
        if not asked:
            return searches
        rows = {row["key"]: row for row in run([at_rate(cell, rate) for _, cell, rate in asked])}
        for one, cell, rate in asked:
            row = rows.get(at_rate(cell, rate).key)
            if row is None:
                one.error = "interrupted"
            elif "failure" in row:
                one.error = f"{row['failure']['error']}: {row['failure']['text']}"
            else:
                one.tell(rate, passed=target.kept(row))
        if on_round is not None:
            on_round(searches)


def at_rate(cell: Cell, rate_per_s: float, *, share_of_capacity: float | None = None) -> Cell:
    """The same cell at another rate."""
    return replace(
        cell,
        workload=replace(cell.workload, rate_per_s=rate_per_s),
        share_of_capacity=share_of_capacity,
    )
