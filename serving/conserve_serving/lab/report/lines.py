"""Pictures of lines with bands, with names where the lines end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from conserve_serving.lab.report import svg
from conserve_serving.lab.report.style import Series, colour
from conserve_serving.lab.stats import Estimate

_LABEL_GAP_PX: Final = 11.0
#: Of the small font, on average.
CHARACTER_PX: Final = 5.4
#: More characters of named ticks than this do not stand beside each other.
_TICKS_IN_LINE: Final = 38


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of a line."""

    x: float
    y: Estimate
    hollow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A contender's points, ascending in x."""

    series: Series
    points: tuple[Point, ...]


def lines(
    drawn: Sequence[Line],
    *,
    title: str,
    x_label: str,
    log: bool,
    label: str,
    share: bool = False,
    ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """Lines with bands; names stand where the lines end.

    Args:
        drawn: at least one, with at least one point each.
        title, x_label: of the panel.
        log: whether the values explode.
        label: what the picture shows, for those who cannot see it.
        share: values are shares of one.
        ticks: places and names on the x axis, where it has no numbers of its own.
    """
    longest = max(len(line.series.short) for line in drawn)
    slanted = sum(len(name) + 2 for _, name in ticks or ()) > _TICKS_IN_LINE
    with svg.axes(400, 290 if slanted else 262) as (figure, axes):
        bottom = 68 if slanted else 40
        svg.place(figure, left=44, right=20 + CHARACTER_PX * longest, top=28, bottom=bottom)
        for line in drawn:
            _line(axes, line, over=3 if line.series.ours else 2)
        axes.set_title(title, x=-0.12)
        axes.set_xlabel(x_label)
        if ticks is not None:
            axes.xaxis.set_major_locator(FixedLocator([x for x, _ in ticks]))
            names = dict(ticks)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: names.get(x, "")))
            axes.margins(x=0.08)
            if slanted:
                for text in axes.get_xticklabels():
                    text.set(rotation=20, ha="right", rotation_mode="anchor")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        _value_axis(axes, [p.y for line in drawn for p in line.points], log=log, share=share)
        _name_lines(axes, drawn)
        return svg.to_svg(figure, label=label)


def _line(axes: Axes, line: Line, *, over: int) -> None:
    look = line.series
    x = [point.x for point in line.points]
    y = [point.y.value for point in line.points]
    axes.plot(x, y, color=look.colour, linestyle=look.dash, linewidth=look.width, zorder=over)
    banded = [p for p in line.points if not math.isnan(p.y.low)]
    if len(banded) > 1:
        axes.fill_between(
            [p.x for p in banded],
            [p.y.low for p in banded],
            [p.y.high for p in banded],
            color=look.colour,
            alpha=0.22 if look.ours else 0.13,
            linewidth=0,
            zorder=over - 1,
        )
    elif banded:
        only = banded[0]
        axes.vlines(only.x, only.y.low, only.y.high, color=look.colour, linewidth=1, zorder=over)
    for hollow in (False, True):
        some = [p for p in line.points if p.hollow == hollow]
        if some:
            axes.plot(
                [p.x for p in some],
                [p.y.value for p in some],
                linestyle="none",
                marker=look.marker,
                markersize=5.5 if look.ours else 4.2,
                markerfacecolor=colour("bg") if hollow else look.colour,
                markeredgecolor=look.colour,
                markeredgewidth=1.2 if hollow else 0.0,
                zorder=over + 0.5,
            )


def _value_axis(axes: Axes, values: Sequence[Estimate], *, log: bool, share: bool) -> None:
    if share:
        axes.set_ylim(-0.02, 1.04)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
        return
    low, high = min(v.value for v in values), max(v.value for v in values)
    if log and low > 0 and high > 3 * low:
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        axes.yaxis.set_major_locator(FixedLocator(log_ticks(bottom, top)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if low > 0.6 * high:  # far from zero: an axis from zero would hide every difference
            axes.margins(y=0.12)
        else:
            axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 … within the limits; only powers of ten over many decades."""
    steps: tuple[float, ...] = (1,)
    for most, finer in ((2000, (1, 3)), (100, (1, 2, 5)), (6, (1, 1.5, 2, 3, 4, 5, 6, 8))):
        if high < most * low:
            steps = finer
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [
        tick for p in powers for s in steps if low * 0.999 <= (tick := s * 10.0**p) <= high * 1.001
    ]


def _name_lines(axes: Axes, drawn: Sequence[Line]) -> None:
    """Names right of the axes, where their lines end, moved apart where they would overlap."""
    ends = []
    for line in drawn:
        last = line.points[-1]
        _, y = axes.transData.transform((last.x, last.y.value))
        ends.append((float(y), line))
    ends.sort(key=lambda end: end[0])
    box = axes.bbox
    places = spread(
        [y for y, _ in ends], gap=_LABEL_GAP_PX, low=float(box.y0) + 2, high=float(box.y1)
    )
    for y, (_, line) in zip(places, ends, strict=True):
        last = line.points[-1]
        axes.annotate(
            line.series.short,
            xy=(last.x, last.y.value),
            xytext=(float(box.x1) + 12, y),
            textcoords="figure pixels",
            fontsize=9,
            fontweight="bold" if line.series.ours else "normal",
            color=line.series.colour,
            va="center_baseline",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": line.series.colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Ascending places at least ``gap`` apart, near the wanted ones and within the limits.

    More of them than there is room for are spread evenly.
    """
    if not wanted:
        return []
    if (len(wanted) - 1) * gap > high - low:
        gap = (high - low) / max(1, len(wanted) - 1)
    placed: list[float] = []
    for number, y in enumerate(wanted):
        floor = low + number * gap
        placed.append(max(y, floor, placed[-1] + gap if placed else floor))
    ceiling = high
    for number in range(len(placed) - 1, -1, -1):
        placed[number] = min(placed[number], ceiling)
        ceiling = placed[number] - gap
    return placed
