"""Where conversation-level placement wins, ties or loses, and why: put together from the rows.

*Ours* are ConServe's contenders, each under its own name; the best of them meets the best of the
others, figure by figure (``tier_findings.py``). Choosing the best of several after the fact
flatters both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from conserve_serving.lab.capacity import ClusterCapacity
from conserve_serving.lab.cell import cell_from_json
from conserve_serving.lab.cluster_spec import ClusterSpec
from conserve_serving.lab.goodput import MISSES
from conserve_serving.lab.report.carried import Capacities
from conserve_serving.lab.report.context import Context
from conserve_serving.lab.report.metrics import (
    FIRST_TURN_TTFT,
    LAST_TURN_TBT,
    SLO_ALL,
    TOKENS_PER_J,
    TTFET,
    Metric,
)
from conserve_serving.lab.report.reached import GOODPUTS, Goodput, goodput
from conserve_serving.lab.report.rows import Place, Rows
from conserve_serving.lab.tier_findings import Finding, finding, finding_of_goodputs
from conserve_serving.lab.worth import compare

#: Latencies that have an SLO, by the rows' names, in words.
SLOS: Final = {
    "ttfet": "TTFET",
    "first_turn_ttft": "first-turn TTFT",
    "last_turn_tbt": "last-turn TBT",
    "e2e": "E2E",
}
#: A load that fails this far below one that passes is no noise of the search.
DIP: Final = 0.8
METRICS: Final[tuple[Metric, ...]] = (TTFET, FIRST_TURN_TTFT, LAST_TURN_TBT, TOKENS_PER_J)


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """What the cluster carries for its price against equal tiers, by their best other policy.

    Attributes:
        cluster: the equal one.
        as_is: conversations/s over conversations/s.
        per_dollar, per_rated_w: the same, each by what it takes.
        rent_low, rent_high: the least and the most that the ratio per dollar can be while every
            rent is anywhere in its range.
    """

    cluster: str
    as_is: Finding
    per_dollar: Finding
    per_rated_w: Finding
    rent_low: float
    rent_high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteVerdict:
    """One workload on one cluster.

    Attributes:
        place: where.
        spec: the cluster.
        equal: whether its engines are all alike.
        seeds: runs of each point.
        capacity: what its parts can carry by arithmetic; None: could not be counted.
        goodputs: by contender and name (``Gf``, ``Gany``).
        best: by name of a goodput, the best of ours against the best other.
        each: by label, each of ours against the best other, in Gany (in Gf where nobody has that).
        loads: by load, then by metric's name, the best of ours against the best other.
        plus: the same for ``conserve_plus`` alone; empty where it was not run.
        busy: by tier, the share of its time that it worked under ``conserve``, at the middle load.
        missed: of the two that the verdict is about, the share that misses each SLO at the highest
            common load.
        dips: of contenders that under some seed miss the SLO at a load well below one at which they
            keep it, these two loads; the goodput counts up to the lower one.
        cheapest: against the equal tiers that carry most per dollar; None: there are none.
        coolest: against those that carry most per rated watt.
        sized_by_rent, sized_by_power: against those nearest in rent, and in rated power.
    """

    place: Place
    spec: ClusterSpec
    equal: bool
    seeds: int
    capacity: ClusterCapacity | None
    goodputs: Mapping[str, Mapping[str, Goodput | None]]
    best: Mapping[str, Finding]
    each: Mapping[str, Finding]
    loads: Mapping[float, Mapping[str, Finding]]
    plus: Mapping[float, Mapping[str, Finding]]
    busy: Mapping[str, float]
    missed: Mapping[str, Mapping[str, float]]
    dips: Mapping[str, tuple[float, float]]
    cheapest: Against | None = None
    coolest: Against | None = None
    sized_by_rent: Against | None = None
    sized_by_power: Against | None = None

    def main(self) -> Finding | None:
        """The finding that the verdict is about: Gany, or Gf where nobody meets every SLO."""
        return self.best.get("Gany") or self.best.get("Gf")


def verdicts(rows: Rows, capacities: Capacities) -> list[SiteVerdict]:
    """Of every place, in the order of the rows.

    Args:
        rows: of ``lab.tiers.run_plan``.
        capacities: from ``lab.report.carried``.
    """
    context = Context.of(rows)
    sites = [_site(context, place, capacities) for place in rows.main_places()]
    return [_with_prices(context, site, sites) for site in sites]


def _site(context: Context, place: Place, capacities: Capacities) -> SiteVerdict:
    rows = context.rows
    raw = next(row.raw for row in rows.all if row.place == place)
    spec = cell_from_json(raw["cell"]).cluster
    goodputs = {
        label: {name: goodput(context, place, label, metric) for name, metric, _ in GOODPUTS}
        for label in rows.contenders(place)
    }
    best: dict[str, Finding] = {}
    each: dict[str, Finding] = {}
    for name, _, _ in GOODPUTS:
        rival = _most(goodputs, context.rivals_at(place), name)
        ours = _most(goodputs, context.ours_at(place), name)
        if rival is None or ours is None:
            continue
        found = finding_of_goodputs(ours, goodputs[ours][name], rival, goodputs[rival][name])
        if found is None:
            continue
        best[name] = found
        for label in context.ours_at(place):
            one = finding_of_goodputs(label, goodputs[label][name], rival, goodputs[rival][name])
            if one is not None:
                each[label] = one  # Gany, which comes last, counts
    rates = _common_rates(rows, place)
    main = best.get("Gany") or best.get("Gf")
    return SiteVerdict(
        place=place,
        spec=spec,
        equal=len({group.profile for group in spec.groups}) == 1,
        seeds=rows.seeds(place),
        capacity=capacities.get((place.cluster, place.workload)),
        goodputs=goodputs,
        best=best,
        each=each,
        loads={rate: _at(context, place, rate, context.ours_at(place)) for rate in rates},
        plus={
            rate: _at(context, place, rate, [one])
            for rate in rates
            for one in context.ours_at(place)
            if one == "conserve_plus"
        },
        busy=_busy(rows, place, rates),
        missed={
            label: _missed(rows, place, label, rates[-1])
            for label in ((main.ours, main.rival) if main and rates else ())
        },
        dips={label: dip for label in goodputs if (dip := _dip(rows, place, label)) is not None},
    )


def _dip(rows: Rows, place: Place, label: str) -> tuple[float, float] | None:
    """Of the seed in which a load that fails is furthest below one that passes, the two."""
    widest: tuple[float, float] | None = None
    for found in rows.by_seed(place, label).values():
        met = [
            (row.rate_per_s, share) for row in found if (share := SLO_ALL.of(row.raw)) is not None
        ]
        failing = [rate for rate, share in met if share < 1.0 - MISSES]
        passing = [rate for rate, share in met if share >= 1.0 - MISSES]
        if failing and passing and min(failing) < DIP * max(passing):
            dip = (min(failing), max(passing))
            if widest is None or dip[1] / dip[0] > widest[1] / widest[0]:
                widest = dip
    return widest


def _common_rates(rows: Rows, place: Place) -> list[float]:
    """Loads that every contender ran under every seed; those of a search are each one's own."""
    labels = rows.contenders(place)
    return [
        rate
        for rate in rows.rates(place)
        if all(len(rows.at(place, label, rate)) == rows.seeds(place) for label in labels)
    ]


def _most(
    goodputs: Mapping[str, Mapping[str, Goodput | None]], labels: Iterable[str], name: str
) -> str | None:
    """Who carries most; the first of equals."""
    scored = {
        label: found.estimate.value
        for label in labels
        if (found := goodputs[label][name]) is not None
    }
    return max(scored, key=lambda label: scored[label]) if scored else None


def _at(
    context: Context, place: Place, rate_per_s: float, ours: Sequence[str]
) -> dict[str, Finding]:
    found: dict[str, Finding] = {}
    for metric in METRICS:
        rival = context.rows.best_rival(place, context.rivals_at(place), rate_per_s, metric)
        best = context.rows.best_rival(place, ours, rate_per_s, metric)
        if rival is None or best is None:
            continue
        one = finding(
            best,
            context.rows.values(place, best, rate_per_s, metric),
            rival,
            context.rows.values(place, rival, rate_per_s, metric),
            higher_is_better=not metric.lower_is_better,
        )
        if one is not None:
            found[metric.name] = one
    return found


def _busy(rows: Rows, place: Place, rates: Sequence[float]) -> dict[str, float]:
    """Share of its time that each tier worked under ``conserve``, at the middle load."""
    shares: dict[str, list[float]] = {}
    if rates:
        for row in rows.at(place, "conserve", rates[len(rates) // 2]):
            for engine in (row.raw.get("engines") or {}).values():
                shares.setdefault(str(engine["tier"]), []).append(float(engine["busy"]))
    return {tier: sum(found) / len(found) for tier, found in shares.items()}


def _missed(rows: Rows, place: Place, label: str, rate_per_s: float) -> dict[str, float]:
    """Shares of the conversations that miss each SLO, mean over seeds."""
    found: dict[str, list[float]] = {}
    for row in rows.at(place, label, rate_per_s):
        for name in SLOS:
            met = (row.raw.get("slo") or {}).get(name)
            if met is not None:
                found.setdefault(name, []).append(1.0 - float(met))
    return {name: sum(shares) / len(shares) for name, shares in found.items()}


# --- prices ---------------------------------------------------------------------------------------


def _with_prices(context: Context, site: SiteVerdict, sites: Sequence[SiteVerdict]) -> SiteVerdict:
    own = site.best.get("Gany")
    if site.equal or own is None:
        return site
    found = []
    for other in sites:
        alike = (other.place.workload, other.place.setting.mixed_slowdown)
        if other.equal and alike == (site.place.workload, site.place.setting.mixed_slowdown):
            one = _against(context, site, own.ours, other)
            if one is not None:
                found.append((other.spec, one))
    if not found:
        return site

    def nearest(of: Mapping[str, float], mine: float) -> Against:
        return min(found, key=lambda one: abs(math.log(of[one[0].name] / mine)))[1]

    rents = {spec.name: spec.dollars_per_hour for spec, _ in found}
    watts = {spec.name: spec.rated_with_host_w for spec, _ in found}
    return replace(
        site,
        cheapest=max(found, key=lambda one: one[1].per_dollar.rival_value)[1],
        coolest=max(found, key=lambda one: one[1].per_rated_w.rival_value)[1],
        sized_by_rent=nearest(rents, site.spec.dollars_per_hour),
        sized_by_power=nearest(watts, site.spec.rated_with_host_w),
    )


def _against(context: Context, site: SiteVerdict, ours: str, other: SiteVerdict) -> Against | None:
    rival = _most(other.goodputs, context.rivals_at(other.place), "Gany")
    if rival is None:
        return None
    own, theirs = site.goodputs[ours]["Gany"], other.goodputs[rival]["Gany"]
    if own is None or theirs is None or theirs.estimate.value <= 0:
        return None
    spec, against = site.spec, other.spec

    def by(mine: float, its: float) -> Finding | None:
        """Both per unit of what they take; the ratio hangs on the two alone."""
        return finding(
            ours,
            {seed: value / mine for seed, value in own.by_seed.items()},
            rival,
            {seed: value / its for seed, value in theirs.by_seed.items()},
            higher_is_better=True,
        )

    as_is = finding_of_goodputs(ours, own, rival, theirs)
    per_dollar = by(spec.dollars_per_hour, against.dollars_per_hour)
    per_rated_w = by(spec.rated_with_host_w, against.rated_with_host_w)
    if as_is is None or per_dollar is None or per_rated_w is None:
        return None
    rents = compare(spec, own.estimate.value, against, theirs.estimate.value)
    return Against(
        cluster=against.name,
        as_is=as_is,
        per_dollar=per_dollar,
        per_rated_w=per_rated_w,
        rent_low=rents.per_dollar_low,
        rent_high=rents.per_dollar_high,
    )
