"""What a wrong prediction costs, and what the power model moves: assumptions that need no sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from conserve_serving.lab.report import bars as pictures
from conserve_serving.lab.report.atrate import chosen_rate
from conserve_serving.lab.report.bars import Bar
from conserve_serving.lab.report.context import Context, say, strong, verdict_cell
from conserve_serving.lab.report.curves import is_saturated
from conserve_serving.lab.report.document import Cell, Figure, Table
from conserve_serving.lab.report.metrics import (
    LAST_TURN_TBT,
    TOKENS_PER_J,
    TOKENS_PER_J_HIGH,
    TOKENS_PER_J_LOW,
    TTFET,
)
from conserve_serving.lab.report.rows import Place
from conserve_serving.lab.stats import Estimate

#: What sensitivities are shown of.
METRICS: Final = (TTFET, LAST_TURN_TBT, TOKENS_PER_J)
#: Power models, and the metric under each.
POWER: Final = (
    ("low", TOKENS_PER_J_LOW),
    ("mid", TOKENS_PER_J),
    ("high", TOKENS_PER_J_HIGH),
)


def prediction(context: Context) -> Iterator[Figure]:
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
    for metric in METRICS:
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
                pictures.bars(
                    bars,
                    title=metric.title,
                    unit=metric.unit,
                    log=metric.log,
                    label=f"{metric.title} by predictor, {place.at(rate)}",
                )
            )
    if drawn:
        yield Figure(
            title=f"What a wrong prediction costs: {place.at(rate)}",
            help="Placement turn by turn with better and worse predictions. ConServe predicts "
            "nothing.",
            panels=tuple(drawn),
            data=Table(
                columns=("metric", "policy", "figure"),
                rows=tuple(rows),
                texts=frozenset({"policy"}),
            ),
        )


def power(context: Context, places: Sequence[Place]) -> list[Figure]:
    """Tokens per joule under the low, mid and high power model, a panel for each place."""
    drawn, rows = [], []
    for place in places:
        rate = chosen_rate(context, place)
        if rate is None:
            continue
        bars = []
        ours = context.ours_at(place)
        for label in sorted(context.rows.contenders(place), key=lambda one: one not in ours):
            levels = [context.rows.estimate(place, label, rate, metric) for _, metric in POWER]
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
                    Cell(place.at(rate)),
                    strong(label, label in ours),
                    *(Cell(say(level)) for level in levels),
                    *(
                        verdict_cell(context.against_best(place, label, rate, metric))
                        if label in ours
                        else Cell("")
                        for _, metric in POWER
                    ),
                )
            )
        if bars:
            drawn.append(
                pictures.bars(
                    bars,
                    title=place.briefly_at(rate),
                    log=False,
                    label=f"Tokens per joule by power model, {place.at(rate)}",
                )
            )
    if not drawn:
        return []
    names = [name for name, _ in POWER]
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
