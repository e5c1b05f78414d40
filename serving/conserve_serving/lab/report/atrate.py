"""Bars: every policy at one load, with the paper's figures as ticks beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Final

from conserve_serving.lab.report import bars as pictures
from conserve_serving.lab.report.bars import Bar
from conserve_serving.lab.report.context import Context, say, strong, verdict_cell
from conserve_serving.lab.report.curves import is_saturated
from conserve_serving.lab.report.document import (
    Block,
    Cell,
    Figure,
    Note,
    PaperValue,
    Section,
    Table,
)
from conserve_serving.lab.report.metrics import (
    E2E,
    FIRST_TURN_TTFT,
    LAST_TURN_TBT,
    METRICS,
    TOKENS_PER_J,
    TTFET,
)
from conserve_serving.lab.report.rows import Place, at_load

MAX_PLACES: Final = 4
_SHOWN: Final = (TTFET, FIRST_TURN_TTFT, LAST_TURN_TBT, E2E, TOKENS_PER_J)


def section(context: Context, *, paper: Sequence[PaperValue] = ()) -> Section:
    """The load to look at closely, of up to ``MAX_PLACES`` places.

    Args:
        context: the rows.
        paper: the paper's figures; those of this load are drawn at the first place.
    """
    blocks: list[Block] = []
    shown = 0
    for place in context.rows.main_places():
        rate = chosen_rate(context, place)
        asked = context.rate_per_s in {None, rate}
        if rate is not None and asked and shown < MAX_PLACES:
            blocks.append(_figure(context, place, rate, paper if not blocks else ()))
            blocks += _traffic(context, place, rate)
            shown += 1
    if not blocks:
        blocks = [Note(_nothing(context), missing=True)]
    return Section(
        id="bars",
        title="At one load",
        help="Mean over seeds; the line is its 95 % interval. Hollow bars are saturated."
        + (" The red tick is the paper's figure, read from its plots." if paper else ""),
        blocks=tuple(blocks),
    )


def _nothing(context: Context) -> str:
    if context.rate_per_s is not None:
        return f"No row was run {at_load(context.rate_per_s)}."
    return (
        "No load of these rows is one that policies meet at: each is of a search, or a share of a "
        "policy's own capacity."
    )


def chosen_rate(context: Context, place: Place) -> float | None:
    """The load that was asked for; else the highest that one of ours carries, or the lowest."""
    rates = context.rows.rates(place)
    if context.rate_per_s in rates:
        return context.rate_per_s
    ours = context.ours_at(place) or context.rows.contenders(place)
    carried = [
        rate
        for label in ours
        for rate in context.rows.rates(place, label)
        if not is_saturated(context, place, label, rate)
    ]
    return max(carried, default=rates[0] if rates else None)


def _labels(context: Context, place: Place, rate_per_s: float) -> list[str]:
    """Who ran at this load, ours first."""
    labels = [
        label
        for label in context.rows.contenders(place)
        if context.rows.at(place, label, rate_per_s)
    ]
    return sorted(labels, key=lambda label: label not in context.ours)


def _traffic(context: Context, place: Place, rate_per_s: float) -> list[Block]:
    """KV that moved, left and was computed again, and how busy engines were: means over seeds.

    Nothing where rows do not say it.
    """
    rows = []
    for label in _labels(context, place, rate_per_s):
        runs = [row.raw for row in context.rows.at(place, label, rate_per_s)]
        if any("engines" not in run or "tokens" not in run for run in runs):
            continue
        busy = {
            name: fmean(run["engines"][name]["busy"] for run in runs) for name in runs[0]["engines"]
        }
        moved = fmean(run["transfers_per_conversation"]["mean"] or 0.0 for run in runs)
        evicted = fmean(run["evicted_tokens"] / max(1, run["conversations"]) for run in runs)
        again = fmean(run["tokens"]["recomputed"] / max(1, run["tokens"]["new"]) for run in runs)
        rows.append(
            (
                strong(label, label in context.ours),
                Cell(f"{moved:.2f}"),
                Cell(f"{evicted:,.0f}"),
                Cell(f"{100 * again:.1f} %"),
                Cell(f"{fmean(run['retractions'] for run in runs):,.0f}"),
                Cell(", ".join(f"{name} {100 * share:.0f} %" for name, share in busy.items())),
            )
        )
    if not rows:
        return []
    columns = (
        "policy",
        "KV transfers per conversation",
        "tokens evicted per conversation",
        "computed again, of new tokens",
        "requests put back",
        "engines busy",
    )
    return [
        Table(
            columns=columns,
            rows=tuple(rows),
            caption="KV moved, lost and computed again; engines",
            texts=frozenset({"policy", "engines busy"}),
        )
    ]


def _figure(
    context: Context, place: Place, rate_per_s: float, paper: Sequence[PaperValue]
) -> Figure:
    labels = _labels(context, place, rate_per_s)
    ticks = {
        (value.contender, value.metric): value.value
        for value in paper
        if value.metric in METRICS and abs(value.rate_per_s - rate_per_s) < 1e-6
    }
    own = context.ours_at(place)[:1]
    drawn, rows = [], []
    for metric in _SHOWN:
        bars = []
        for label in labels:
            estimate = context.rows.estimate(place, label, rate_per_s, metric)
            if estimate is None:
                continue
            look = context.looks[label]
            tick = ticks.get((label, metric.name))
            bars.append(
                Bar(
                    name=look.short,
                    value=estimate,
                    colour=look.colour,
                    strong=look.ours,
                    hollow=is_saturated(context, place, label, rate_per_s),
                    tick=tick,
                )
            )
            rows.append(
                (
                    Cell(metric.title),
                    strong(label, label in context.ours),
                    Cell(say(estimate, metric.unit)),
                    *((Cell("" if tick is None else f"{tick:g}"),) if ticks else ()),
                    *(
                        Cell("")
                        if label in context.ours
                        else verdict_cell(
                            context.rows.compare(place, one, label, rate_per_s, metric)
                        )
                        for one in own
                    ),
                )
            )
        if bars:
            drawn.append(
                pictures.bars(
                    bars,
                    title=metric.title,
                    unit=metric.unit,
                    log=metric.log,
                    label=f"{metric.title} of each policy, {place.at(rate_per_s)}",
                )
            )
    return Figure(
        title=place.at(rate_per_s),
        help=str(place.setting),
        panels=tuple(drawn),
        data=Table(
            columns=(
                "metric",
                "policy",
                *(("ours", "paper") if ticks else ("figure",)),
                *(f"{one} against it" for one in own),
            ),
            rows=tuple(rows),
            texts=frozenset({"policy"}),
        ),
    )
