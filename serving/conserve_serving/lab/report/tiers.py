"""Unlike tiers: on which cluster, load and workload conversation-level placement wins, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from conserve_serving.lab.capacity import ClusterCapacity
from conserve_serving.lab.report import svg
from conserve_serving.lab.report.bars import Group, groups
from conserve_serving.lab.report.carried import Capacities
from conserve_serving.lab.report.context import Context, say, strong, verdict_cell
from conserve_serving.lab.report.curves import is_saturated
from conserve_serving.lab.report.document import (
    Block,
    Cell,
    Figure,
    LegendEntry,
    Note,
    Section,
    Table,
    Tone,
)
from conserve_serving.lab.report.economy import economy
from conserve_serving.lab.report.metrics import (
    FIRST_TURN_TTFT,
    LAST_TURN_TBT,
    TOKENS_PER_J,
    TTFET,
)
from conserve_serving.lab.report.reached import GOODPUTS
from conserve_serving.lab.report.rows import say_rate
from conserve_serving.lab.report.sites import LOAD_SHARE, Site, per, say_goodput, site_of
from conserve_serving.lab.report.style import colour
from conserve_serving.replay.report import format_number

_BOTTLENECKS: Final = {"decode": "tail and decode", "link": "the link"}
_LATENCIES: Final = (TTFET, FIRST_TURN_TTFT, LAST_TURN_TBT, TOKENS_PER_J)
_PARTS: Final = (
    ("prefill of first turns", "prefill_per_s", "accent"),
    ("tail and decode", "decode_per_s", "sky"),
    ("link", "link_per_s", "pink"),
)
_MARKS: Final = (
    ("dedicated: the least of the three", "dedicated_per_s", "fg"),
    ("every engine does everything", "hosting_per_s", "vermillion"),
)


def section(
    context: Context,
    capacities: Capacities,
    uncounted: Mapping[str, str] | None = None,
    *,
    verdicts: Sequence[Block] = (),
) -> Section:
    """All clusters; without a cluster of unlike tiers it still says what each carries.

    Args:
        context: the rows.
        capacities: what the parts of each cluster can carry.
        uncounted: why some have none.
        verdicts: who wins, in the caller's words; instead of the tables that say so here.
    """
    sites = [site_of(context, place) for place in context.rows.main_places()]
    known = [site for site in sites if any(any(g.values()) for g in site.goodputs.values())]
    blocks: list[Block] = [*verdicts]
    if known and not verdicts:
        blocks += [_verdicts(context, known, capacities), *economy(context, known)]
    if known:
        blocks.append(_numbers(context, known))
    missing = [site.place.title for site in sites if site not in known]
    if missing:
        blocks.append(
            Note(
                "No goodput without two rates or more that say who met the SLO: "
                f"{'; '.join(missing)}.",
                missing=True,
            )
        )
    blocks += _capacity_figures(sites, capacities)
    if uncounted:
        reasons = " ".join(f"{at}: {said.removesuffix('.')}." for at, said in uncounted.items())
        blocks.append(Note(f"What each part can carry could not be counted. {reasons}", True))
    return Section(
        id="tiers",
        title="Clusters: where conversation-level placement wins, ties or loses",
        help=" ".join(f"{name}: {text}." for name, _, text in GOODPUTS)
        + f" Latencies and tokens per joule at about {100 * LOAD_SHARE:g} % of the best policy’s "
        "Gany. Differences are paired by seed; against is the best other policy in that figure.",
        blocks=tuple(blocks),
    )


# --- at equal hardware ----------------------------------------------------------------------------


def _verdicts(context: Context, sites: Sequence[Site], capacities: Capacities) -> Table:
    rows = [
        (
            Cell(site.place.cluster, detail=site.place.workload),
            strong(ours, True),
            *(_goodput_verdict(context, site, ours, name) for name, _, _ in GOODPUTS),
            Cell("–" if site.rate_per_s is None else say_rate(site.rate_per_s)),
            *(
                Cell("–", Tone.SOFT)
                if site.rate_per_s is None
                else verdict_cell(context.against_best(site.place, ours, site.rate_per_s, metric))
                for metric in _LATENCIES
            ),
            Cell(why(context, site, ours, capacities)),
        )
        for site in sites
        for ours in context.ours_at(site.place)
        if any(site.goodputs[ours].values())
    ]
    return Table(
        caption="At equal hardware: win, tie or loss",
        columns=(
            "where",
            "policy",
            *(f"{name} (conversations/s)" for name, _, _ in GOODPUTS),
            "load",
            *(metric.title for metric in _LATENCIES),
            "why",
        ),
        rows=tuple(rows),
        texts=frozenset(
            {"where", "policy", "why"}
            | {f"{name} (conversations/s)" for name, _, _ in GOODPUTS}
            | {metric.title for metric in _LATENCIES}
        ),
    )


def _goodput_verdict(context: Context, site: Site, ours: str, name: str) -> Cell:
    own = site.reached(ours, name)
    others = [
        (found.estimate.value, label, found)
        for label in context.rivals_at(site.place)
        if (found := site.reached(label, name)) is not None
    ]
    if own is None or not others:
        return Cell("–", Tone.SOFT)
    _, rival, best = max(others, key=lambda other: other[0])
    if own.open_end and best.open_end:
        return Cell("both carried every load that was run", Tone.SOFT)
    cell = verdict_cell(own.compare(best, rival=rival))
    if best.estimate.value <= 0:
        return Cell(f"nobody else keeps the SLO at the lowest load; {say_goodput(own)}", Tone.GOOD)
    bound = " or better" if own.open_end else " or worse" if best.open_end else ""
    return Cell(cell.text + bound, cell.tone, cell.detail)


def why(context: Context, site: Site, ours: str, capacities: Capacities) -> str:
    """What binds, from arithmetic where it is given and from how busy the engines were."""
    parts = []
    found = capacities.get((site.place.cluster, site.place.workload))
    if found is not None:
        parts.append(
            f"by arithmetic dedicated tiers carry {format_number(found.dedicated_per_s)}/s, "
            f"held by {_BOTTLENECKS.get(found.bottleneck, found.bottleneck)}; "
            "with everything everywhere "
            f"it is {format_number(found.hosting_per_s)}/s"
        )
    busy = _busy(context, site, ours)
    if busy:
        parts.append(busy)
    return "; ".join(parts)


def _busy(context: Context, site: Site, ours: str) -> str:
    """How busy each tier and its links were, at the load of the latencies."""
    if site.rate_per_s is None:
        return ""
    shares: dict[str, list[float]] = {}
    for row in context.rows.at(site.place, ours, site.rate_per_s):
        for engine in (row.raw.get("engines") or {}).values():
            for name in ("busy", "egress"):
                if engine.get(name) is not None:
                    shares.setdefault(f"{engine['tier']} {name}", []).append(float(engine[name]))
    said = [
        f"{tier} tier {sum(busy) / len(busy):.0%} busy"
        for tier in ("prefill", "decode")
        if (busy := shares.get(f"{tier} busy"))
    ]
    if link := shares.get("prefill egress"):
        said.append(f"its link {sum(link) / len(link):.0%}")
    return ", ".join(said)


# --- the figures ----------------------------------------------------------------------------------


def _numbers(context: Context, sites: Sequence[Site]) -> Table:
    rows = []
    for site in sites:
        ours = context.ours_at(site.place)
        for label in sorted(context.rows.contenders(site.place), key=lambda one: one not in ours):
            any_ = site.reached(label, "Gany")
            rate = site.rate_per_s
            at = [
                None if rate is None else context.rows.estimate(site.place, label, rate, metric)
                for metric in _LATENCIES
            ]
            hollow = rate is not None and is_saturated(context, site.place, label, rate)
            rows.append(
                (
                    Cell(site.place.cluster, detail=site.place.workload),
                    strong(label, label in ours),
                    *(Cell(say_goodput(site.reached(label, name))) for name, _, _ in GOODPUTS),
                    Cell("–" if any_ is None else per(any_, site.hardware.dollars_per_hour, 1)),
                    Cell("–" if any_ is None else per(any_, site.hardware.rated_w, 1000)),
                    Cell(
                        "–" if rate is None else say_rate(rate) + (", saturated" if hollow else "")
                    ),
                    *(Cell(say(estimate)) for estimate in at),
                )
            )
    return Table(
        caption="The figures",
        columns=(
            "where",
            "policy",
            *(f"{name} (conversations/s)" for name, _, _ in GOODPUTS),
            "Gany per USD an hour",
            "Gany per rated kW",
            "load",
            *(f"{m.title} ({m.unit})" if m.unit else m.title for m in _LATENCIES),
        ),
        rows=tuple(rows),
        texts=frozenset({"where", "policy"}),
    )


def _capacity_figures(sites: Sequence[Site], capacities: Capacities) -> Iterator[Figure]:
    """Prefill, tail and link side by side, one panel for each workload."""
    by_workload: dict[str, list[tuple[Site, ClusterCapacity]]] = {}
    for site in sites:
        found = capacities.get((site.place.cluster, site.place.workload))
        if found is not None:
            by_workload.setdefault(site.place.workload, []).append((site, found))
    drawn, rows = [], []
    for workload, counted in by_workload.items():
        drawn.append(
            groups(
                [
                    Group(
                        name=site.place.cluster,
                        values=tuple((getattr(found, f), colour(hue)) for _, f, hue in _PARTS),
                        marks=tuple((getattr(found, f), colour(hue)) for _, f, hue in _MARKS),
                    )
                    for site, found in counted
                ],
                title=workload,
                cut=1.5 * max(_busiest(found) for _, found in counted),
                label=f"Capacity of each part, {workload}",
            )
        )
        rows += [
            (
                Cell(site.place.cluster),
                Cell(workload),
                *(Cell(format_number(getattr(found, f))) for _, f, _ in (*_PARTS, *_MARKS)),
            )
            for site, found in counted
        ]
    if drawn:
        yield Figure(
            title="What each part can carry",
            help="Conversations per second, by arithmetic, from the profiles and the workload's "
            "lengths; no queue is in it. "
            "Dedicated tiers carry the least of the three bars (dark line); where every engine "
            "does everything it is the other line.",
            panels=tuple(drawn),
            legend=tuple(
                LegendEntry(label=name, sample=svg.swatch(hue))
                for name, _, hue in (*_PARTS, *_MARKS)
            ),
            data=Table(
                columns=("cluster", "workload", *(name for name, _, _ in (*_PARTS, *_MARKS))),
                rows=tuple(rows),
                texts=frozenset({"cluster", "workload"}),
            ),
            wide=True,
        )


def _busiest(found: ClusterCapacity) -> float:
    """The most of what is not the link: a fast link would leave no room for the rest."""
    values = (found.prefill_per_s, found.decode_per_s, found.hosting_per_s)
    return max((value for value in values if math.isfinite(value)), default=0.0)
