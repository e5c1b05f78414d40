"""What every section is made from, and how figures and verdicts are put into words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from conserve_serving.lab.report import svg
from conserve_serving.lab.report.document import Cell, LegendEntry, Tone
from conserve_serving.lab.report.metrics import Metric
from conserve_serving.lab.report.rows import Comparison, Place, Rows
from conserve_serving.lab.report.style import Series, series
from conserve_serving.lab.stats import Estimate, Verdict
from conserve_serving.replay.report import format_number

#: Policies that know what nobody can: drawn, and never counted as a rival.
BOUNDS: Final = frozenset({"oracle"})

_TONES: Final = {
    Verdict.WIN: Tone.GOOD,
    Verdict.TIE: Tone.EVEN,
    Verdict.LOSS: Tone.BAD,
    Verdict.UNKNOWN: Tone.SOFT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The rows, and who is who in them.

    Attributes:
        rows: all of them.
        ours: labels that are ConServe's, the first of them where one has to stand for all.
        looks: how each contender is drawn.
        rate_per_s: the load to look at closely, where a place has it; None: chosen there.
    """

    rows: Rows
    ours: tuple[str, ...]
    looks: dict[str, Series] = field(repr=False)
    rate_per_s: float | None = None

    @staticmethod
    def of(
        rows: Rows, ours: Sequence[str] | None = None, *, rate_per_s: float | None = None
    ) -> Context:
        """The context of ``rows``.

        Args:
            rows: all of them.
            ours: labels that are ConServe's; None: those whose policy begins so.
            rate_per_s: the load to look at closely.
        """
        labels = rows.contenders()
        if ours is None:
            ours = [label for label in labels if rows.policy(label).startswith("conserve")]
        looks = series([(label, rows.policy(label)) for label in labels])
        return Context(
            rows=rows,
            ours=tuple(one for one in ours if one in labels),
            looks=looks,
            rate_per_s=rate_per_s,
        )

    def ours_at(self, place: Place) -> list[str]:
        """Those of ours that ran at ``place``."""
        here = self.rows.contenders(place)
        return [label for label in self.ours if label in here]

    def rivals_at(self, place: Place) -> list[str]:
        """Those that ours are compared with: neither ours nor a bound."""
        return [
            label
            for label in self.rows.contenders(place)
            if label not in self.ours and self.rows.policy(label) not in BOUNDS
        ]

    def against_best(
        self, place: Place, ours: str, rate_per_s: float, metric: Metric
    ) -> Comparison | None:
        """One of ours against the rival that has the best mean; None where nothing compares."""
        rival = self.rows.best_rival(place, self.rivals_at(place), rate_per_s, metric)
        if rival is None:
            return None
        return self.rows.compare(place, ours, rival, rate_per_s, metric)

    def legend(self, labels: Sequence[str]) -> tuple[LegendEntry, ...]:
        """A shared legend of lines."""
        return tuple(LegendEntry(label=one, sample=svg.key(self.looks[one])) for one in labels)


def say(estimate: Estimate | None, unit: str = "") -> str:
    """A figure with its interval; a dash for what is not known."""
    if estimate is None:
        return "–"
    if unit == "share":
        scaled = Estimate(
            value=100 * estimate.value,
            low=100 * estimate.low,
            high=100 * estimate.high,
            n=estimate.n,
        )
        return say(scaled, "%")
    text = format_number(estimate.value)
    if not math.isnan(estimate.low):
        text += f" [{format_number(estimate.low)}, {format_number(estimate.high)}]"
    return f"{text} {unit}".rstrip().replace("-", "−")


def say_percent(ratio: Estimate) -> str:
    """A ratio as a difference in percent, with its interval."""
    return f"{say_change(ratio)} {say_interval(ratio)}".rstrip()


def say_change(ratio: Estimate) -> str:
    """A ratio as a difference in percent."""
    return f"{_percent(ratio.value)} %"


def say_interval(ratio: Estimate) -> str:
    """The interval of a ratio, in percent; nothing where there is none."""
    if math.isnan(ratio.low):
        return ""
    return f"[{_percent(ratio.low)}, {_percent(ratio.high)}]"


def _percent(ratio: float) -> str:
    value = 100 * (ratio - 1)
    shown = f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+.1f}"
    return shown.replace("-", "−")


def verdict_cell(comparison: Comparison | None) -> Cell:
    """Win, tie or loss in words, with the difference; below it the interval and against whom."""
    if comparison is None:
        return Cell("–", Tone.SOFT)
    word = str(comparison.verdict)
    if comparison.verdict is Verdict.UNKNOWN:
        word = "one seed"
    return Cell(
        f"{word} {say_change(comparison.ratio)}",
        _TONES[comparison.verdict],
        detail=f"{say_interval(comparison.ratio)} against {comparison.rival}".lstrip(),
    )


def strong(text: str, ours: bool) -> Cell:
    """A contender's name, ours so that it is found."""
    return Cell(text, Tone.OURS if ours else Tone.PLAIN)
