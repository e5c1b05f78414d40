"""What the answer hangs on: the same comparison under other assumptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from conserve_serving.lab.report import assumptions
from conserve_serving.lab.report.assumptions import METRICS, POWER
from conserve_serving.lab.report.atrate import chosen_rate
from conserve_serving.lab.report.bars import Span, tornado
from conserve_serving.lab.report.context import Context, say, strong, verdict_cell
from conserve_serving.lab.report.curves import RIVALS_IN_FIGURE, is_saturated
from conserve_serving.lab.report.document import Block, Cell, Figure, Note, Section, Table
from conserve_serving.lab.report.lines import Line, Point
from conserve_serving.lab.report.lines import lines as lines_picture
from conserve_serving.lab.report.metrics import (
    TOKENS_PER_J,
    TTFET,
    Metric,
)
from conserve_serving.lab.report.rows import Place, Setting, say_interference

_POWER_NAME: Final = "power model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A field of the setting that is swept.

    Attributes:
        name: for people.
        get: its value in a setting.
        without: the setting with that field blanked: equal ones differ in this field alone.
        say: a value in words.
    """

    name: str
    get: Callable[[Setting], float | str]
    without: Callable[[Setting], Setting]
    say: Callable[[Setting], str]


AXES: Final = (
    Axis(
        name="interference of prefill with decode",
        get=lambda s: s.mixed_slowdown,
        without=lambda s: replace(s, mixed_slowdown=0.0),
        say=lambda s: say_interference(s.mixed_slowdown),
    ),
    Axis(
        name="link",
        get=lambda s: s.link,
        without=lambda s: replace(s, link=""),
        say=lambda s: s.link,
    ),
    Axis(
        name="prefill to decode engines",
        get=lambda s: s.ratio,
        without=lambda s: replace(s, ratio=""),
        say=lambda s: s.ratio,
    ),
)


def section(context: Context) -> Section:
    """Every assumption that was swept, and the band of the power models, which each run has."""
    blocks: list[Block] = []
    not_swept = []
    for place in context.rows.main_places():
        blocks += _tornados(context, place)
    for axis in AXES:
        figures = [f for place in context.rows.main_places() for f in _swept(context, place, axis)]
        blocks += figures
        if not figures:
            not_swept.append(axis.name)
    blocks += assumptions.prediction(context)
    if not any("prediction" in b.title for b in blocks if isinstance(b, Figure)):
        not_swept.append("prediction error")
    power = assumptions.power(context, context.rows.main_places()[:3])
    blocks += power
    if not power:
        not_swept.append("power model")
    if not_swept:
        blocks.append(Note(f"Not swept in these rows: {', '.join(not_swept)}.", missing=True))
    return Section(
        id="sensitivity",
        title="Sensitivity",
        help="The same comparison under other assumptions, everything else equal.",
        blocks=tuple(blocks),
        own_page=True,
    )


def _along(context: Context, place: Place, axis: Axis) -> list[Place]:
    """The places that differ from ``place`` in the axis alone, itself among them; in order."""
    along = [
        other
        for other in context.rows.places()
        if (other.cluster, other.workload) == (place.cluster, place.workload)
        and axis.without(other.setting) == axis.without(place.setting)
    ]
    values = [axis.get(other.setting) for other in along]
    if all(isinstance(value, float) for value in values):
        along.sort(key=lambda other: other.setting.mixed_slowdown)
    return along if len(along) > 1 else []


def _common_rate(context: Context, place: Place, along: Sequence[Place] = ()) -> float | None:
    """A load that all of them were run at: the one chosen for the place, or the one nearest."""
    common = set(context.rows.rates(place)).intersection(
        *(context.rows.rates(other) for other in along)
    )
    chosen = chosen_rate(context, place)
    if not common or chosen is None:
        return None
    return min(common, key=lambda rate: (abs(rate - chosen), rate))


def _swept(context: Context, place: Place, axis: Axis) -> Iterator[Figure]:
    along = _along(context, place, axis)
    rate = _common_rate(context, place, along) if along else None
    if rate is None:
        return
    labels = [
        label
        for label in context.rows.contenders(place)
        if all(context.rows.at(other, label, rate) for other in along)
    ]
    ours = [label for label in labels if label in context.ours]
    labels = ours + [label for label in labels if label not in ours][:RIVALS_IN_FIGURE]
    drawn = []
    for metric in METRICS:
        lines = []
        for label in labels:
            points = [
                Point(x=float(x), y=estimate, hollow=is_saturated(context, other, label, rate))
                for x, other in enumerate(along)
                if (estimate := context.rows.estimate(other, label, rate, metric)) is not None
            ]
            if points:
                lines.append(Line(series=context.looks[label], points=tuple(points)))
        if lines:
            drawn.append(
                lines_picture(
                    lines,
                    title=metric.title + (f", {metric.unit}" if metric.unit else ""),
                    x_label=axis.name,
                    log=metric.log,
                    ticks=[(float(x), axis.say(o.setting)) for x, o in enumerate(along)],
                    label=f"{metric.title} against {axis.name}, {place.at(rate)}",
                )
            )
    if not drawn:
        return
    yield Figure(
        title=f"{axis.name[0].upper()}{axis.name[1:]}: {place.at(rate)}",
        panels=tuple(drawn),
        legend=context.legend(labels),
        data=_table(context, along, labels, axis, rate),
    )


def _table(
    context: Context, along: Sequence[Place], labels: Sequence[str], axis: Axis, rate: float
) -> Table:
    rows = []
    for other in along:
        for label in labels:
            figures = (say(context.rows.estimate(other, label, rate, m)) for m in METRICS)
            rows.append(
                (
                    Cell(axis.say(other.setting)),
                    strong(label, label in context.ours),
                    *(Cell(figure) for figure in figures),
                    verdict_cell(context.against_best(other, label, rate, TTFET))
                    if label in context.ours
                    else Cell(""),
                )
            )
    titles = (f"{m.title} ({m.unit})" if m.unit else m.title for m in METRICS)
    return Table(
        columns=(axis.name, "policy", *titles, "TTFET against the best other"),
        rows=tuple(rows),
        texts=frozenset({"policy"}),
    )


def _tornados(context: Context, place: Place) -> Iterator[Figure]:
    """How far each assumption moves ConServe's difference to the best other policy.

    The best of those that were run under every assumption, at a load that all were run at.
    """
    everywhere = [other for axis in AXES for other in _along(context, place, axis)]
    rate = _common_rate(context, place, everywhere)
    ours = context.ours_at(place)
    if not ours or rate is None:
        return
    rivals = [
        label
        for label in context.rivals_at(place)
        if all(context.rows.at(other, label, rate) for other in (place, *everywhere))
    ]
    drawn, rows = [], []
    for metric in (TTFET, TOKENS_PER_J):
        rival = context.rows.best_rival(place, rivals, rate, metric)
        if rival is None:
            continue
        base = context.rows.compare(place, ours[0], rival, rate, metric)
        if base is None:
            continue
        spans = []
        for name, ends in _ends(
            context, place, rate=rate, ours=ours[0], rival=base.rival, metric=metric
        ):
            spans.append(Span(name=name, ends=tuple(ends)))
            rows += [
                (
                    Cell(metric.title),
                    Cell(name),
                    Cell(text),
                    Cell(base.rival),
                    Cell(f"{value:+.1f} %".replace("-", "−")),
                )
                for value, text in ends
            ]
        if any(span.name != _POWER_NAME for span in spans):
            spans.sort(key=lambda s: min(v for v, _ in s.ends) - max(v for v, _ in s.ends))
            drawn.append(
                tornado(
                    spans,
                    base=100 * (base.ratio.value - 1),
                    title=f"{metric.title}: {ours[0]} against {base.rival}, %",
                    lower_is_better=metric.lower_is_better,
                    label=f"What moves {metric.title}, {place.at(rate)}",
                )
            )
    if drawn:
        yield Figure(
            title=f"What moves the difference: {place.at(rate)}",
            help="From one end of each assumption to the other, everything else as in the main "
            f"rows ({place.setting}), where the difference is the dashed line. Green: ConServe is "
            "better; red: the other is.",
            panels=tuple(drawn),
            data=Table(
                columns=("metric", "assumption", "value", "against", "difference"),
                rows=tuple(rows),
                texts=frozenset({"assumption"}),
            ),
            wide=True,
        )


def _ends(
    context: Context, place: Place, *, rate: float, ours: str, rival: str, metric: Metric
) -> Iterator[tuple[str, list[tuple[float, str]]]]:
    """Of each assumption: its name, and (difference in per cent, value in words) of each value."""
    for axis in AXES:
        ends = []
        for other in _along(context, place, axis):
            comparison = context.rows.compare(other, ours, rival, rate, metric)
            if comparison is not None:
                ends.append((100 * (comparison.ratio.value - 1), axis.say(other.setting)))
        if len(ends) > 1:
            yield axis.name, ends
    if metric is TOKENS_PER_J:
        ends = []
        for name, level in POWER:
            comparison = context.rows.compare(place, ours, rival, rate, level)
            if comparison is not None:
                ends.append((100 * (comparison.ratio.value - 1), name))
        if len(ends) > 1:
            yield _POWER_NAME, ends
