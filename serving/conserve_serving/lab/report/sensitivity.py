"""What the answer hangs on: the same comparison under other assumptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from conserve_serving.lab.report import panels
from conserve_serving.lab.report.atrate import chosen_rate
from conserve_serving.lab.report.context import Context, say, strong, verdict_cell
from conserve_serving.lab.report.curves import RIVALS_IN_FIGURE, is_saturated
from conserve_serving.lab.report.document import Block, Cell, Figure, Note, Section, Table
from conserve_serving.lab.report.metrics import (
    LAST_TURN_TBT,
    TOKENS_PER_J,
    TOKENS_PER_J_HIGH,
    TOKENS_PER_J_LOW,
    TTFET,
    Metric,
)
from conserve_serving.lab.report.panels import Bar, Line, Point, Span
from conserve_serving.lab.report.rows import Place, Setting, say_interference, say_rate
from conserve_serving.lab.stats import Estimate

_METRICS: Final = (TTFET, LAST_TURN_TBT, TOKENS_PER_J)
_POWER_NAME: Final = "power model"
_POWER: Final = (
    ("low", TOKENS_PER_J_LOW),
    ("mid", TOKENS_PER_J),
    ("high", TOKENS_PER_J_HIGH),
)


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
    blocks += _prediction(context)
    if not any("prediction" in b.title for b in blocks if isinstance(b, Figure)):
        not_swept.append("prediction error")
    power = _power(context, context.rows.main_places()[:3])
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
    for metric in _METRICS:
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
                panels.lines(
                    lines,
                    title=metric.title + (f", {metric.unit}" if metric.unit else ""),
                    x_label=axis.name,
                    log=metric.log,
                    ticks=[(float(x), axis.say(o.setting)) for x, o in enumerate(along)],
                    label=f"{metric.title} against {axis.name}, {place.title}, {rate:g}/s",
                )
            )
    if not drawn:
        return
    yield Figure(
        title=f"{axis.name[0].upper()}{axis.name[1:]}: {place.title} at {say_rate(rate)} "
        "conversations/s",
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
            figures = (say(context.rows.estimate(other, label, rate, m)) for m in _METRICS)
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
    titles = (f"{m.title} ({m.unit})" if m.unit else m.title for m in _METRICS)
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
                panels.tornado(
                    spans,
                    base=100 * (base.ratio.value - 1),
                    title=f"{metric.title}: {ours[0]} against {base.rival}, %",
                    lower_is_better=metric.lower_is_better,
                    label=f"What moves {metric.title}, {place.title}, {rate:g}/s",
                )
            )
    if drawn:
        yield Figure(
            title=f"What moves the difference: {place.title} at {say_rate(rate)} conversations/s",
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
        for name, level in _POWER:
            comparison = context.rows.compare(place, ours, rival, rate, level)
            if comparison is not None:
                ends.append((100 * (comparison.ratio.value - 1), name))
        if len(ends) > 1:
            yield _POWER_NAME, ends


def _prediction(context: Context) -> Iterator[Figure]:
    """Per-turn placement under each predictor, beside ours, which needs none.

    Where and at which load most of them were run.
    """

    def told_at(place: Place, rate: float) -> list[str]:
        return [
            label
            for label in context.rows.contenders(place)
            if context.rows.policy(label).startswith("per_turn")
            and context.rows.at(place, label, rate)
        ]

    points = [(p, r) for p in context.rows.main_places() for r in context.rows.rates(p)]
    place, rate = max(points, key=lambda point: len(told_at(*point)))
    told = told_at(place, rate)
    if len(told) < 2:
        return
    labels = [*context.ours_at(place), *told]
    drawn, rows = [], []
    for metric in _METRICS:
        bars = []
        for label in labels:
            estimate = context.rows.estimate(place, label, rate, metric)
            if estimate is None:
                continue
            look = context.looks[label]
            hollow = is_saturated(context, place, label, rate)
            bars.append(
                Bar(
                    name=look.short,
                    value=estimate,
                    colour=look.colour,
                    strong=look.ours,
                    hollow=hollow,
                )
            )
            rows.append(
                (
                    Cell(metric.title),
                    strong(label, label in context.ours),
                    Cell(say(estimate, metric.unit)),
                )
            )
        if bars:
            drawn.append(
                panels.bars(
                    bars,
                    title=metric.title,
                    unit=metric.unit,
                    log=metric.log,
                    label=f"{metric.title} by predictor, {place.title}, {rate:g}/s",
                )
            )
    if drawn:
        yield Figure(
            title=f"What a wrong prediction costs: {place.title} at {say_rate(rate)} "
            "conversations/s",
            help="Placement turn by turn with better and worse predictions. ConServe predicts "
            "nothing.",
            panels=tuple(drawn),
            data=Table(
                columns=("metric", "policy", "figure"),
                rows=tuple(rows),
                texts=frozenset({"policy"}),
            ),
        )


def _power(context: Context, places: Sequence[Place]) -> list[Figure]:
    """Tokens per joule under the low, mid and high power model, a panel for each place."""
    drawn, rows = [], []
    for place in places:
        rate = chosen_rate(context, place)
        if rate is None:
            continue
        bars = []
        ours = context.ours_at(place)
        for label in sorted(context.rows.contenders(place), key=lambda one: one not in ours):
            levels = [context.rows.estimate(place, label, rate, metric) for _, metric in _POWER]
            low, mid, high = levels
            if low is None or mid is None or high is None:
                continue
            look = context.looks[label]
            ends = sorted((low.value, high.value))
            bars.append(
                Bar(
                    name=look.short,
                    value=Estimate(value=mid.value, low=ends[0], high=ends[1], n=mid.n),
                    colour=look.colour,
                    strong=look.ours,
                    hollow=is_saturated(context, place, label, rate),
                )
            )
            rows.append(
                (
                    Cell(place.title, detail=f"at {say_rate(rate)}/s"),
                    strong(label, label in ours),
                    *(Cell(say(level)) for level in levels),
                    *(
                        verdict_cell(context.against_best(place, label, rate, metric))
                        if label in ours
                        else Cell("")
                        for _, metric in _POWER
                    ),
                )
            )
        if bars:
            drawn.append(
                panels.bars(
                    bars,
                    title=f"{place.cluster} at {say_rate(rate)}/s",
                    log=False,
                    label=f"Tokens per joule by power model, {place.title}, {rate:g}/s",
                )
            )
    if not drawn:
        return []
    names = [name for name, _ in _POWER]
    return [
        Figure(
            title="Power model: tokens per joule",
            help="The bar is the middle power model; the line goes from one end of its band to the "
            "other (not an interval over seeds). The ends move all policies together: what differs "
            "between policies is in the table.",
            panels=tuple(drawn),
            data=Table(
                columns=(
                    "where",
                    "policy",
                    *(f"tokens/J, {name}" for name in names),
                    *(f"against the best other, {name}" for name in names),
                ),
                rows=tuple(rows),
                texts=frozenset({"where", "policy"}),
            ),
        )
    ]
