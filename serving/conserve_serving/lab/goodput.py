"""The highest rate that a contender carries: its capacity, and its goodput at the SLO.

**Capacity** is what it completes a second while more arrives than it can complete. Figures change
little with how much more: one overloaded run for each seed says it.

**Goodput** is the highest rate at which no more than 5 % of conversations miss the SLO. It is found
seed by seed: under one seed every rate meets the same conversations in the same pattern of
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
from typing import Any, Final, Protocol

from conserve_serving.lab.capacity import cluster_capacity
from conserve_serving.lab.cell import Cell

Row = dict[str, Any]

#: Share of conversations that may miss the SLO.
MISSES: Final = 0.05
#: A search ends when the rates that pass and fail are this close.
TOLERANCE: Final = 0.02
#: Rates this many times below or above the first one are not tried.
REACH: Final = 256.0
#: Completions that take so many times as long as arrivals are capacity's, and not the arrivals'.
OVERLOAD: Final = 1.25


class Target(enum.StrEnum):
    """Which highest rate.

    ``capacity``: see above. The others are goodputs, at which at most 5 % of conversations miss the
    SLO: of TTFET (``ttfet``, the studies' ``Gf``; ``ttfet_without_gaps``), or of any of TTFET,
    first-turn TTFT, last-turn TBT and E2E (``any``, ``Gany``).
    """

    CAPACITY = "capacity"
    TTFET = "ttfet"
    TTFET_WITHOUT_GAPS = "ttfet_without_gaps"
    ANY = "any"


class Search(Protocol):
    """One search: ask ``next_rate``, run it, ``tell`` the row; until ``next_rate`` is None."""

    error: str | None
    tried: list[float]

    @property
    def next_rate(self) -> float | None:
        """What to run next; None: the search is over."""

    @property
    def rate_per_s(self) -> float | None:
        """The answer; None: there is none, because a run failed or was interrupted (``error``)."""

    def tell(self, rate_per_s: float, row: Row) -> None:
        """What came of a rate."""


@dataclass(slots=True, kw_only=True)
class CapacitySearch:
    """Doubles the rate until completions take much longer than arrivals: then they are capacity.

    Attributes:
        start_per_s: the first rate.
        tried: every rate, in order.
    """

    start_per_s: float
    tried: list[float] = field(default_factory=list)
    error: str | None = None
    _answer: float | None = None

    @property
    def next_rate(self) -> float | None:
        """What to run next."""
        if self._answer is not None or self.error is not None:
            return None
        return self.tried[-1] * 2 if self.tried else self.start_per_s

    @property
    def rate_per_s(self) -> float | None:
        """Conversations completed a second, under overload."""
        return self._answer

    def tell(self, rate_per_s: float, row: Row) -> None:
        """What came of a rate."""
        self.tried.append(rate_per_s)
        stretch = row["stretch"]
        if row["conversations_incomplete"]:
            self.error = f"{row['conversations_incomplete']} conversations broke off"
        elif stretch is None:
            self.error = "too few conversations to see a rate: give more"
        elif stretch >= OVERLOAD:
            self._answer = row["completion_rate_per_s"]
        elif rate_per_s >= self.start_per_s * REACH:
            self.error = f"{rate_per_s:g} conversations a second are no overload: give more of them"


@dataclass(slots=True, kw_only=True)
class GoodputSearch:
    """Bracketing, then bisection on a logarithmic scale.

    Attributes:
        target: which share has to be met.
        start_per_s: the first rate.
        tolerance: relative width at which the search ends.
        step: factor of the first step away from the start; the next ones are its square, its fourth
            power, and so on up to 2. Less than 2 pays where the start is a good guess.
        floor_per_s, ceiling_per_s: rates beyond these are not tried; None: ``REACH`` times away.
        passed_per_s, failed_per_s: highest that passed, lowest that failed; None: none yet.
        tried: every rate, in order.
    """

    target: Target
    start_per_s: float
    tolerance: float = TOLERANCE
    step: float = 2.0
    floor_per_s: float | None = None
    ceiling_per_s: float | None = None
    passed_per_s: float | None = None
    failed_per_s: float | None = None
    tried: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def next_rate(self) -> float | None:
        """What to run next."""
        low, high = self.passed_per_s, self.failed_per_s
        if self.error is not None:
            return None
        if low is None and high is None:
            return self.start_per_s
        step = min(2.0, self.step ** (2 ** min(max(len(self.tried) - 1, 0), 7)))
        if low is None:
            floor = self.floor_per_s or self.start_per_s / REACH
            return None if high is None or high <= floor else max(high / step, floor)
        if high is None:
            ceiling = self.ceiling_per_s or self.start_per_s * REACH
            return None if low >= ceiling else min(low * step, ceiling)
        return None if high <= low * (1.0 + self.tolerance) else math.sqrt(low * high)

    @property
    def rate_per_s(self) -> float | None:
        """The highest rate that passed. 0: even the lowest tried failed. Where nothing failed it is
        the highest that was tried, and ``failed_per_s`` is None.
        """
        return None if self.error is not None else self.passed_per_s or 0.0

    def tell(self, rate_per_s: float, row: Row) -> None:
        """What came of a rate."""
        self.tried.append(rate_per_s)
        self.know(rate_per_s, row)

    def know(self, rate_per_s: float, row: Row) -> None:
        """What came of a rate that was run for another reason."""
        met = row["slo"]["all" if self.target is Target.ANY else self.target.value]
        if met is not None and met >= 1.0 - MISSES:
            self.passed_per_s = max(rate_per_s, self.passed_per_s or 0.0)
        else:
            self.failed_per_s = min(rate_per_s, self.failed_per_s or math.inf)


def search(
    cells: Sequence[Cell],
    target: Target,
    run: Callable[[list[Cell]], Sequence[Row]],
    *,
    start_per_s: float | None = None,
    tolerance: float = TOLERANCE,
    on_round: Callable[[Sequence[Search]], None] | None = None,
) -> list[Search]:
    """The highest rate of each cell.

    All searches go on side by side, so that each round is as many runs as there are searches.

    Args:
        cells: what to search, one for each contender, seed, cluster …; their rates do not matter.
        target: which highest rate.
        run: runs cells and returns their rows; a row may say that it failed, and rows may be
            missing when it was interrupted (then so are answers).
        start_per_s: the first rate tried; None: :func:`guess_per_s`.
        tolerance: relative width at which a search for goodput ends.
        on_round: told of the searches after each round.
    """
    searches: list[Search] = []
    for cell in cells:
        start = guess_per_s(cell) if start_per_s is None else start_per_s
        if target is Target.CAPACITY:
            searches.append(CapacitySearch(start_per_s=start))
        else:
            searches.append(GoodputSearch(target=target, start_per_s=start, tolerance=tolerance))
    drive(cells, searches, run, on_round=on_round)
    return searches


def drive(
    cells: Sequence[Cell],
    searches: Sequence[Search],
    run: Callable[[list[Cell]], Sequence[Row]],
    *,
    on_round: Callable[[Sequence[Search]], None] | None = None,
) -> None:
    """Bring searches to their ends, side by side; for the arguments see :func:`search`.

    Args:
        cells: one for each search.
        searches: begun anywhere.
        run, on_round: see there.
    """
    while True:
        asked = [
            (one, at_rate(cell, rate), rate)
            for one, cell in zip(searches, cells, strict=True)
            if (rate := one.next_rate) is not None
        ]
        if not asked:
            return
        rows = {row["key"]: row for row in run([cell for _, cell, _ in asked])}
        for one, cell, rate in asked:
            row = rows.get(cell.key)
            if row is None:
                one.error = "interrupted"
            elif "failure" in row:
                one.error = f"{row['failure']['error']}: {row['failure']['text']}"
            else:
                one.tell(rate, row)
        if on_round is not None:
            on_round(searches)


def guess_per_s(cell: Cell) -> float:
    """A rate near the answers, by arithmetic; the same for every contender and seed.

    Raises:
        LabError: an engine cannot hold a single mean conversation.
    """
    carried = cluster_capacity(
        cell.cluster,
        replace(cell.workload, seed=0),
        mixed_slowdown=cell.mixed_slowdown,
        link=cell.link,
    )
    return float(f"{max(carried.dedicated_per_s, carried.hosting_per_s):.1g}")


def at_rate(cell: Cell, rate_per_s: float, *, share_of_capacity: float | None = None) -> Cell:
    """The same cell at another rate."""
    return replace(
        cell,
        workload=replace(cell.workload, rate_per_s=rate_per_s),
        share_of_capacity=share_of_capacity,
    )
