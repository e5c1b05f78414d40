"""Clusters at equal cost and at equal rated power."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from conserve_serving.lab.report.context import Context, strong, verdict_cell
from conserve_serving.lab.report.document import Cell, Note, Table, Tone
from conserve_serving.lab.report.reached import Goodput
from conserve_serving.lab.report.sites import Site, per, say_goodput


def economy(context: Context, sites: Sequence[Site]) -> Iterator[Table | Note]:
    """Ours against the best other policy on any cluster of equal engines, per dollar and watt."""
    if len(sites) < 2 or not any(site.hardware.equal for site in sites):
        yield Note(
            "Nothing to compare at equal cost or power: the rows have no second cluster of equal "
            "engines.",
            missing=True,
        )
        return
    rows = []
    for site in sites:
        equal = [
            other
            for other in sites
            if other is not site
            and other.hardware.equal
            and other.hardware.model == site.hardware.model
            and other.place.workload == site.place.workload
            and other.place.setting.mixed_slowdown == site.place.setting.mixed_slowdown
        ]
        reference = _reference(context, site)
        controls = [other for other in equal if _reference(context, other) == reference]
        if equal and not controls:
            none = "equal tiers were held to another SLO: run all with one --reference"
        else:
            none = "no other equal tiers in these rows"
        for ours in context.ours_at(site.place):
            own = site.reached(ours, "Gany")
            if own is None:
                continue
            rows.append(
                (
                    Cell(site.place.cluster, detail=site.place.workload),
                    strong(ours, True),
                    Cell(say_goodput(own)),
                    Cell(_number(site.hardware.dollars_per_hour)),
                    Cell(per(own, site.hardware.dollars_per_hour, 1.0)),
                    _against_equal(
                        context, own, site, controls, price="dollars_per_hour", none=none
                    ),
                    Cell(_number(site.hardware.rated_w)),
                    Cell(per(own, site.hardware.rated_w, 1000.0)),
                    _against_equal(context, own, site, controls, price="rated_w", none=none),
                )
            )
    yield Table(
        caption="At equal cost and at equal rated power: Gany, against the best other policy on "
        "any cluster of equal engines in these rows",
        columns=(
            "where",
            "policy",
            "Gany (conversations/s)",
            "USD an hour",
            "Gany per USD an hour",
            "at equal cost",
            "rated W",
            "Gany per rated kW",
            "at equal power",
        ),
        rows=tuple(rows),
        texts=frozenset({"where", "policy", "at equal cost", "at equal power"}),
    )


def _reference(context: Context, site: Site) -> str:
    """Whose idle latency the SLO of a place is a multiple of."""
    cell = next(row.raw["cell"] for row in context.rows.all if row.place == site.place)
    reference = cell.get("reference") or cell["cluster"]
    return str(reference["name"] if isinstance(reference, dict) else reference)


def _against_equal(
    context: Context,
    own: Goodput,
    site: Site,
    controls: Sequence[Site],
    *,
    price: str,
    none: str,
) -> Cell:
    here = getattr(site.hardware, price)
    others = []
    for control in controls:
        there = getattr(control.hardware, price)
        for label in context.rivals_at(control.place):
            found = control.reached(label, "Gany")
            if found is not None and there and found.estimate.value > 0:
                others.append((found.estimate.value / there, control, label, found))
    if not here:
        return Cell("not known", Tone.SOFT)
    if not others:
        return Cell(none, Tone.SOFT)
    _, control, label, found = max(others, key=lambda other: other[0])
    comparison = own.compare(found, rival=label, scale=getattr(control.hardware, price) / here)
    if comparison is None:
        return Cell("–", Tone.SOFT)
    cell = verdict_cell(comparison)
    return Cell(cell.text, cell.tone, f"{cell.detail} on {control.place.cluster}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.6g}"
