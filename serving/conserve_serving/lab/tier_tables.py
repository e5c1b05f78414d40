"""Verdicts on unlike tiers as tables and as plain data; the words are ``lab.tier_text``'s."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from conserve_serving.lab.report.document import Cell, Note, Table, Tone
from conserve_serving.lab.report.reached import GOODPUTS, Goodput
from conserve_serving.lab.report.rows import say_rate
from conserve_serving.lab.stats import Estimate, Verdict
from conserve_serving.lab.tier_findings import MARGIN, Finding
from conserve_serving.lab.tier_text import (
    WORDS,
    change,
    is_transient,
    plus_losses,
    summary,
    text,
)
from conserve_serving.lab.tier_verdicts import METRICS, Against, SiteVerdict
from conserve_serving.replay.report import format_number

_TONES: Final = {
    Verdict.WIN: Tone.GOOD,
    Verdict.TIE: Tone.EVEN,
    Verdict.LOSS: Tone.BAD,
    Verdict.UNKNOWN: Tone.SOFT,
}


def table(sites: Sequence[SiteVerdict]) -> Table:
    """The main table: a row for each cluster and workload."""
    found = Table(
        caption="Where conversation-level placement wins, ties or loses: the best of ConServe's "
        "contenders against the best other policy",
        columns=(
            "cluster",
            "workload",
            "Gany",
            "Gf",
            "conserve_plus",
            "per dollar",
            "per rated watt",
            "right-sized",
        ),
        rows=tuple(_row(site) for site in sites),
        texts=frozenset(
            {
                "cluster",
                "workload",
                "Gany",
                "Gf",
                "conserve_plus",
                "per dollar",
                "per rated watt",
                "right-sized",
            }
        ),
    )
    return _of_one_workload(found, sites)


def carried(sites: Sequence[SiteVerdict]) -> Table:
    """Gany and Gf of every contender, with intervals."""
    labels = list(dict.fromkeys(label for site in sites for label in site.goodputs))
    found = Table(
        caption="Gany above, Gf below it, conversations/s",
        columns=("cluster", "workload", *labels),
        rows=tuple(
            (
                Cell(site.place.cluster),
                Cell(site.place.workload),
                *(
                    Cell(
                        _carried(site.goodputs.get(label, {}).get("Gany")),
                        detail=_carried(site.goodputs.get(label, {}).get("Gf")),
                    )
                    for label in labels
                ),
            )
            for site in sites
        ),
        texts=frozenset({"cluster", "workload"}),
    )
    return _of_one_workload(found, sites)


def at_loads(sites: Sequence[SiteVerdict]) -> Table:
    """Latencies and tokens per joule where all run at the same load."""
    titles = [metric.title for metric in METRICS]
    found = Table(
        caption="At equal loads: the best of ConServe's contenders against the best other policy",
        columns=("cluster", "workload", "conversations/s", *titles),
        rows=tuple(
            (
                Cell(site.place.cluster),
                Cell(site.place.workload),
                Cell(say_rate(rate)),
                *(_cell(at.get(metric.name)) for metric in METRICS),
            )
            for site in sites
            for rate, at in site.loads.items()
        ),
        texts=frozenset({"cluster", "workload", *titles}),
    )
    return _of_one_workload(found, sites)


def _of_one_workload(table: Table, sites: Sequence[SiteVerdict]) -> Table:
    """Where all rows have one workload, the caption says it: that leaves room for the rest."""
    workloads = {site.place.workload for site in sites}
    if len(workloads) != 1:
        return table
    at = table.columns.index("workload")
    return replace(
        table,
        caption=f"{table.caption}; {workloads.pop()}",
        columns=table.columns[:at] + table.columns[at + 1 :],
        rows=tuple(row[:at] + row[at + 1 :] for row in table.rows),
    )


def notes(sites: Sequence[SiteVerdict]) -> list[Note]:
    """The verdicts in words, then every loss of ``conserve_plus``."""
    lost = [Note(f"conserve_plus loses in {one}.") for one in plus_losses(sites)]
    return [*(Note(f"{site.place.title}: {text(site)}") for site in sites), *lost]


def _row(site: SiteVerdict) -> tuple[Cell, ...]:
    cheapest, coolest, sized = site.cheapest, site.coolest, site.sized_by_rent
    return (
        Cell(site.place.cluster, detail=site.spec.title),
        Cell(site.place.workload),
        _cell(site.best.get("Gany")),
        _cell(site.best.get("Gf")),
        _cell(site.each.get("conserve_plus")),
        _priced(cheapest, "per_dollar"),
        _priced(coolest, "per_rated_w"),
        _priced(sized, "per_dollar"),
    )


def _cell(found: Finding | None) -> Cell:
    if found is None:
        return Cell("–", Tone.SOFT)
    ours, theirs = format_number(found.value), format_number(found.rival_value)
    return Cell(
        f"{found.ours} {WORDS[found.verdict]}, {change(found)}",
        _TONES[found.verdict],
        detail=f"{ours} against {theirs}, {found.rival}",
    )


def _priced(against: Against | None, name: str) -> Cell:
    if against is None:
        return Cell("–", Tone.SOFT)
    found: Finding = getattr(against, name)
    return Cell(
        f"{WORDS[found.verdict]}, {change(found)}",
        _TONES[found.verdict],
        detail=f"against {found.rival} on {against.cluster}; {change(against.as_is)} as it is",
    )


def _carried(found: Goodput | None) -> str:
    if found is None:
        return "–"
    one = found.estimate
    if found.closed_start and not one.value:
        return "0"
    interval = (
        "" if math.isnan(one.low) else f" [{format_number(one.low)}, {format_number(one.high)}]"
    )
    return f"{'≥ ' if found.open_end else ''}{format_number(one.value)}{interval}"


# --- plain data -----------------------------------------------------------------------------------


def figures(sites: Sequence[SiteVerdict]) -> dict[str, Any]:
    """All verdicts as plain JSON data."""
    return {
        "summary": summary(sites),
        "conserve_plus_losses": plus_losses(sites),
        "margin": MARGIN,
        "sites": [_plain(site) for site in sites],
    }


def _plain(site: SiteVerdict) -> dict[str, Any]:
    capacity = site.capacity
    prices = ("cheapest", "coolest", "sized_by_rent", "sized_by_power")
    return {
        "cluster": site.place.cluster,
        "workload": site.place.workload,
        "mixed_slowdown": site.place.setting.mixed_slowdown,
        "equal_tiers": site.equal,
        "seeds": site.seeds,
        "dollars_per_hour": site.spec.dollars_per_hour,
        "rated_w": site.spec.rated_w,
        "capacity_per_s": None
        if capacity is None
        else {
            name: _finite(getattr(capacity, f"{name}_per_s"))
            for name in ("prefill", "decode", "link", "dedicated", "valve", "hosting")
        }
        | {"bottleneck": capacity.bottleneck, "dedicate": capacity.dedicate},
        "goodput_per_s": {
            label: {name: _goodput(found[name]) for name, _, _ in GOODPUTS}
            for label, found in site.goodputs.items()
        },
        "best": {name: _found(one) for name, one in site.best.items()},
        "each": {label: _found(one) for label, one in site.each.items()},
        "at_equal_loads": _by_load(site.loads),
        "conserve_plus_at_equal_loads": _by_load(site.plus),
        "dips_per_s": {label: list(dip) for label, dip in site.dips.items()},
        **{name: _against(getattr(site, name)) for name in prices},
        "transient": is_transient(site),
        "verdict": text(site),
    }


def _by_load(loads: Mapping[float, Mapping[str, Finding]]) -> list[dict[str, Any]]:
    return [
        {"rate_per_s": rate, **{name: _found(one) for name, one in found.items()}}
        for rate, found in loads.items()
    ]


def _against(one: Against | None) -> dict[str, Any] | None:
    if one is None:
        return None
    parts = {name: _found(getattr(one, name)) for name in ("as_is", "per_dollar", "per_rated_w")}
    return {"cluster": one.cluster, **parts, "rent_low": one.rent_low, "rent_high": one.rent_high}


def _found(one: Finding) -> dict[str, Any]:
    return {
        "ours": one.ours,
        "rival": one.rival,
        "value": one.value,
        "rival_value": one.rival_value,
        "ratio": None if one.ratio is None else _estimate(one.ratio),
        "verdict": one.verdict.value,
        "bound": one.bound,
    }


def _goodput(one: Goodput | None) -> dict[str, Any] | None:
    if one is None:
        return None
    ends = {"open_end": one.open_end, "closed_start": one.closed_start}
    return _estimate(one.estimate) | ends | {"by_seed": one.by_seed}


def _estimate(of: Estimate) -> dict[str, Any]:
    return {
        "value": of.value,
        "low": _finite(of.low),
        "high": _finite(of.high),
        "seeds": of.n,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
