"""Pictures of bars: with intervals, stacked, in groups, and tornados."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from conserve_serving.lab.report import svg
from conserve_serving.lab.report.lines import CHARACTER_PX, log_ticks
from conserve_serving.lab.report.style import colour
from conserve_serving.lab.stats import Estimate
from conserve_serving.replay.report import format_number

#: Characters of a heading that have room above a panel of bars.
_HEADING: Final = 54


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A bar with its interval; ``tick`` is the paper's figure."""

    name: str
    value: Estimate
    colour: str
    strong: bool = False
    hollow: bool = False
    tick: float | None = None


def bars(drawn: Sequence[Bar], *, title: str, label: str, log: bool, unit: str = "") -> str:
    """Horizontal bars with intervals, and the paper's figures as ticks."""
    left_px = 16 + 1.15 * CHARACTER_PX * max(len(bar.name) for bar in drawn)
    heading = textwrap.wrap(f"{title}{f', {unit}' if unit else ''}", _HEADING)
    top_px = 13 + 15 * len(heading)
    with svg.axes(400, top_px + 18 + 20 * len(drawn)) as (figure, axes):
        svg.place(figure, left=left_px, right=46, top=top_px, bottom=20)
        values = [bar.value.value for bar in drawn] + [b.tick for b in drawn if b.tick is not None]
        logarithmic = log and min(values) > 0 and max(values) > 12 * min(values)
        left = 0.0
        if logarithmic:
            axes.set_xscale("log")
            left = min(values) / 1.6
            axes.set_xlim(left, max(values) * 1.6)
        else:
            far = [bar.value.high for bar in drawn if not math.isnan(bar.value.high)]
            axes.set_xlim(0, max([*values, *far, 1e-9]) * 1.04)
        for number, bar in enumerate(drawn):
            _bar(axes, number, bar, left=left)
        axes.set_ylim(len(drawn) - 0.4, -0.6)
        axes.set_yticks(range(len(drawn)), [bar.name for bar in drawn])
        for text, bar in zip(axes.get_yticklabels(), drawn, strict=True):
            text.set_color(bar.colour if bar.strong else colour("soft"))
            text.set_fontweight("bold" if bar.strong else "normal")
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(axis="x", length=0)
        if logarithmic:
            axes.xaxis.set_major_locator(FixedLocator(log_ticks(*axes.get_xlim())))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
        scale = " (log)" if logarithmic else ""
        axes.set_title("\n".join(heading) + scale, x=(4 - left_px) / (400 - 46 - left_px))
        return svg.to_svg(figure, label=label)


def _bar(axes: Axes, number: int, bar: Bar, *, left: float) -> None:
    value = bar.value
    axes.barh(
        number,
        value.value - left,
        left=left,
        height=0.62,
        color=bar.colour,
        alpha=0.2 if bar.hollow else 1.0 if bar.strong else 0.72,
    )
    if bar.hollow:
        axes.barh(
            number,
            value.value - left,
            left=left,
            height=0.62,
            color="none",
            edgecolor=bar.colour,
            linewidth=1.2,
        )
    far = value.value
    if not math.isnan(value.low):
        axes.plot([value.low, value.high], [number, number], color=colour("fg"), linewidth=1.2)
        far = max(far, value.high)
    if bar.tick is not None:
        axes.plot(
            [bar.tick, bar.tick], [number - 0.42, number + 0.42], color=colour("bad"), linewidth=2.4
        )
        far = max(far, bar.tick)
    axes.annotate(
        format_number(value.value),
        xy=(far, number),
        xytext=(5, 0),
        textcoords="offset points",
        va="center_baseline",
        fontsize=9.5,
        color=colour("fg"),
        annotation_clip=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A bar made of parts: (value, colour), in order."""

    name: str
    parts: tuple[tuple[float, str], ...]
    strong: bool = False


def stacks(drawn: Sequence[Stack], *, title: str, label: str, unit: str = "s") -> str:
    """Horizontal stacked bars with their sums."""
    left_px = 16 + 1.15 * CHARACTER_PX * max(len(stack.name) for stack in drawn)
    with svg.axes(520, 46 + 19 * len(drawn)) as (figure, axes):
        svg.place(figure, left=left_px, right=52, top=28, bottom=20)
        for number, stack in enumerate(drawn):
            left = 0.0
            for value, hue in stack.parts:
                if value > 0:
                    axes.barh(number, value, left=left, height=0.66, color=hue)
                left += value
            axes.annotate(
                f"{format_number(left)} {unit}",
                xy=(left, number),
                xytext=(5, 0),
                textcoords="offset points",
                va="center_baseline",
                fontsize=9.5,
                annotation_clip=False,
            )
        axes.set_ylim(len(drawn) - 0.4, -0.6)
        axes.set_xlim(0, max(sum(v for v, _ in s.parts) for s in drawn) * 1.02 or 1.0)
        axes.set_yticks(range(len(drawn)), [stack.name for stack in drawn])
        for text, stack in zip(axes.get_yticklabels(), drawn, strict=True):
            text.set_fontweight("bold" if stack.strong else "normal")
            text.set_color(colour("accent") if stack.strong else colour("soft"))
        axes.tick_params(axis="both", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_title(title, x=(4 - left_px) / (520 - 52 - left_px))
        return svg.to_svg(figure, label=label)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """An assumption of a tornado: (difference in per cent, value in words) of each value."""

    name: str
    ends: tuple[tuple[float, str], ...]


def tornado(
    drawn: Sequence[Span], *, base: float, title: str, label: str, lower_is_better: bool
) -> str:
    """From one end of each assumption to the other; good is the side where ours is better.

    Args:
        drawn: the widest first.
        base: the difference under the main assumptions, in per cent.
        title, label: as everywhere.
        lower_is_better: of the metric whose difference is shown.
    """
    with svg.axes(560, 56 + 26 * len(drawn)) as (figure, axes):
        left_px = 18 + CHARACTER_PX * max(len(span.name) for span in drawn)
        svg.place(figure, left=left_px, right=20, top=30, bottom=26)
        values = [value for span in drawn for value, _ in span.ends] + [base, 0.0]
        low, high = min(values), max(values)
        room = 0.26 * ((high - low) or 1.0)  # for the words beside the bars
        axes.set_xlim(low - room, high + room)
        for number, span in enumerate(drawn):
            _span(axes, number, span, lower_is_better=lower_is_better)
        axes.axvline(0, color=colour("fg"), linewidth=1)
        axes.axvline(base, color=colour("accent"), linewidth=1.2, linestyle=(0, (4, 2)))
        axes.set_ylim(len(drawn) - 0.45, -0.55)
        axes.set_yticks(range(len(drawn)), [span.name for span in drawn])
        axes.grid(visible=False, axis="y")
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(axis="both", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{x:+g}".replace("-", "−") if x else "0")
        )
        axes.set_title(title, x=(4 - left_px) / (560 - 20 - left_px))
        return svg.to_svg(figure, label=label)


def _span(axes: Axes, number: int, span: Span, *, lower_is_better: bool) -> None:
    ends = sorted(span.ends)
    (left, left_text), (right, right_text) = ends[0], ends[-1]
    for start, stop, side in _sides(left, right):
        better = (side < 0) == lower_is_better
        axes.barh(
            number,
            stop - start,
            left=start,
            height=0.5,
            color=colour("good" if better else "bad"),
            alpha=0.75,
        )
    for value, text, anchor in ((left, left_text, "right"), (right, right_text, "left")):
        axes.annotate(
            text,
            xy=(value, number),
            xytext=(-5 if anchor == "right" else 5, 0),
            textcoords="offset points",
            ha=anchor,
            va="center_baseline",
            fontsize=9,
            color=colour("soft"),
            annotation_clip=False,
        )


def _sides(left: float, right: float) -> list[tuple[float, float, int]]:
    """The parts of a span below and above zero: (from, to, sign)."""
    if left < 0 < right:
        return [(left, 0.0, -1), (0.0, right, 1)]
    return [(left, right, -1 if left < 0 else 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Bars of one thing, side by side: (value, colour), infinite where nothing limits it.

    A ``mark`` is a line across them.
    """

    name: str
    values: tuple[tuple[float, str], ...]
    marks: tuple[tuple[float, str], ...] = ()


def groups(drawn: Sequence[Group], *, title: str, label: str, cut: float) -> str:
    """Grouped horizontal bars; marks are lines across the group.

    Args:
        drawn: the groups.
        title, label: as everywhere.
        cut: bars that are longer end here, with an arrow; finite.
    """
    with svg.axes(520, 48 + 46 * len(drawn)) as (figure, axes):
        svg.place(figure, left=132, right=44, top=28, bottom=22)
        everything = [v for one in drawn for v, _ in (*one.values, *one.marks)]
        highest = min(max(everything, default=0.0), cut) or 1.0
        for number, group in enumerate(drawn):
            height = 0.72 / max(1, len(group.values))
            for place, (value, hue) in enumerate(group.values):
                at = number - 0.36 + (place + 0.5) * height
                axes.barh(at, min(value, highest), height=height * 0.88, color=hue)
                inside = value > 0.12 * highest
                axes.annotate(
                    format_number(value) + (" →" if value > highest else ""),
                    xy=(0.0 if inside else value, at),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center_baseline",
                    fontsize=8.5,
                    color=colour("bg" if inside else "fg"),
                    annotation_clip=False,
                )
            for value, hue in group.marks:
                if math.isfinite(value):
                    axes.plot(
                        [value, value], [number - 0.42, number + 0.42], color=hue, linewidth=2.2
                    )
        axes.set_xlim(0, highest * 1.05)
        axes.set_ylim(len(drawn) - 0.45, -0.55)
        axes.set_yticks(range(len(drawn)), [group.name for group in drawn])
        axes.tick_params(axis="both", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_title(title, x=-0.36)
        return svg.to_svg(figure, label=label)
