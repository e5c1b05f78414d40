"""Load curves: what becomes of each policy as arrivals come faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from conserve_serving.lab.report import lines as pictures
from conserve_serving.lab.report.context import Context, say, strong
from conserve_serving.lab.report.document import Block, Cell, Figure, Note, Section, Table, Tone
from conserve_serving.lab.report.lines import Line, Point
from conserve_serving.lab.report.metrics import HEADLINE, TTFET, Metric
from conserve_serving.lab.report.rows import Place, say_rate
from conserve_serving.lab.stats import mean

#: More rivals than this are spread over several figures; ours are in each.
RIVALS_IN_FIGURE: Final = 6
#: More places than this have no curves of their own: a page that long is not read.
MAX_PLACES: Final = 8


def section(context: Context) -> Section:
    """Curves of every place that was run at two rates or more."""
    places = context.rows.main_places()
    loaded = [place for place in places if len(_rates(context, place)) > 1]
    blocks: list[Block] = []
    for place in loaded[:MAX_PLACES]:
        blocks += _figures(context, place)
        blocks += _share_figure(context, place)
    if len(loaded) > MAX_PLACES:
        names = "; ".join(place.title for place in loaded[MAX_PLACES:])
        blocks.append(Note(f"Without curves here, to keep the page short: {names}."))
    single = [place.title for place in places if place not in loaded]
    if single:
        blocks.append(
            Note(
                f"Run at fewer than two rates, so that there is no curve: {'; '.join(single)}.",
                missing=True,
            )
        )
    return Section(
        id="curves",
        title="Load curves",
        help="Mean over seeds; the band is its 95 % bootstrap interval over seeds. Hollow: "
        "saturated, the backlog grew throughout the run, so that the figure depends on how long "
        "it ran. × idle: over the same conversation alone on the idle cluster.",
        blocks=tuple(blocks),
    )


def _rates(context: Context, place: Place, contender: str | None = None) -> list[float]:
    """Loads that have a place on an axis: what arrives as recorded has no rate."""
    return [rate for rate in context.rows.rates(place, contender) if rate]


def _chunks(context: Context, place: Place) -> Iterator[list[str]]:
    several = [
        label for label in context.rows.contenders(place) if len(_rates(context, place, label)) > 1
    ]
    ours = [label for label in several if label in context.ours]
    others = [label for label in several if label not in ours]
    if ours and not others:
        yield ours
    count = -(-len(others) // RIVALS_IN_FIGURE)
    for number in range(count):
        yield ours + others[number::count]


def _figures(context: Context, place: Place) -> Iterator[Figure | Note]:
    chunks = list(_chunks(context, place))
    drawn_labels = [label for chunk in chunks for label in chunk]
    once = [label for label in context.rows.contenders(place) if label not in drawn_labels]
    for number, labels in enumerate(chunks, 1):
        of = f" ({number} of {len(chunks)})" if len(chunks) > 1 else ""
        drawn = [
            pictures.lines(
                lines,
                title=metric.title
                + (f", {metric.unit}" if metric.unit not in {"", "share"} else ""),
                x_label="conversations per second",
                log=metric.log,
                label=f"{metric.title} against load, {place.title}{of}, {place.setting}",
                share=metric.unit == "share",
            )
            for metric in HEADLINE
            if (lines := _lines(context, place, labels, metric))
        ]
        if not drawn:
            yield Note(f"{place.title}: no row has a figure to draw.", missing=True)
            return
        missing = [m.title for m in HEADLINE if not _lines(context, place, labels, m)]
        yield Figure(
            title=f"{place.title}{of}",
            help=f"{place.setting}; {_seeds(context, place)}."
            + (f" Run at fewer than two rates, so not here: {', '.join(once)}." if once else "")
            + (f" Not in the rows: {', '.join(missing)}." if missing else ""),
            panels=tuple(drawn),
            legend=context.legend(labels),
            data=_table(context, place, labels),
        )


def _seeds(context: Context, place: Place) -> str:
    seeds = context.rows.seeds(place)
    return f"{seeds} seeds" if seeds > 1 else "one seed, so that there are no intervals"


def _lines(context: Context, place: Place, labels: Sequence[str], metric: Metric) -> list[Line]:
    lines = []
    for label in labels:
        points = []
        for rate in _rates(context, place, label):
            estimate = context.rows.estimate(place, label, rate, metric)
            if estimate is not None:
                hollow = is_saturated(context, place, label, rate)
                points.append(Point(x=rate, y=estimate, hollow=hollow))
        if points:
            lines.append(Line(series=context.looks[label], points=tuple(points)))
    return lines


def is_saturated(context: Context, place: Place, label: str, rate_per_s: float) -> bool:
    """Whether half of the seeds or more say so."""
    seeds = context.rows.at(place, label, rate_per_s)
    return 2 * sum(row.saturated for row in seeds) >= max(1, len(seeds))


def _table(context: Context, place: Place, labels: Sequence[str]) -> Table:
    known = [
        metric
        for metric in HEADLINE
        if any(metric.of(row.raw) is not None for row in context.rows.all if row.place == place)
    ]
    rows = []
    for rate in context.rows.rates(place):
        for label in labels:
            seeds = context.rows.at(place, label, rate)
            if not seeds:
                continue
            figures = (say(context.rows.estimate(place, label, rate, m), m.unit) for m in known)
            saturated = sum(row.saturated for row in seeds)
            rows.append(
                (
                    Cell(say_rate(rate)),
                    strong(label, label in context.ours),
                    *(Cell(figure.removesuffix(" × idle")) for figure in figures),
                    Cell(f"{saturated} of {len(seeds)}", Tone.BAD if saturated else Tone.PLAIN),
                )
            )
    titles = (f"{m.title} ({m.unit})" if m.unit == "× idle" else m.title for m in known)
    return Table(
        columns=("conversations/s", "policy", *titles, "seeds saturated"),
        rows=tuple(rows),
        texts=frozenset({"policy"}),
    )


def _share_figure(context: Context, place: Place) -> Iterator[Figure]:
    """The same against the load as a share of what each policy itself carries, where it was run."""
    lines, table = [], []
    for label in context.rows.contenders(place):
        by_share: dict[float, list[float]] = {}
        for row in context.rows.all:
            share = row.share_of_capacity
            value = TTFET.of(row.raw)
            if (row.place, row.contender) == (place, label) and None not in {share, value}:
                by_share.setdefault(float(share or 0), []).append(float(value or 0))
        points = tuple(Point(x=x, y=mean(values)) for x, values in sorted(by_share.items()))
        if points:
            lines.append(Line(series=context.looks[label], points=points))
            table += [
                (Cell(f"{100 * p.x:g} %"), strong(label, label in context.ours), Cell(say(p.y)))
                for p in points
            ]
    if lines:
        chosen = [line for line in lines if line.series.ours]
        chosen += [line for line in lines if not line.series.ours][:RIVALS_IN_FIGURE]
        whole = [
            replace(line, points=tuple(replace(p, x=100 * p.x) for p in line.points))
            for line in chosen
        ]
        yield Figure(
            title=f"{place.title}, each at a share of its own capacity",
            help="Every policy at the same share of what it can carry itself: how it behaves near "
            "its limit, whatever that limit is.",
            panels=(
                pictures.lines(
                    whole,
                    title=f"{TTFET.title}, {TTFET.unit}",
                    x_label="% of own capacity",
                    log=True,
                    label=f"TTFET against share of own capacity, {place.title}",
                ),
            ),
            legend=context.legend([line.series.label for line in chosen]),
            data=Table(
                columns=("share of capacity", "policy", f"{TTFET.title} ({TTFET.unit})"),
                rows=tuple(table),
                texts=frozenset({"policy"}),
            ),
        )
