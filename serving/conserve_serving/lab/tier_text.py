"""Verdicts on unlike tiers in words, as tables and as plain data; every word follows from figures.

What is said of a cluster and a workload, in this order: who wins in what it carries; what the
parts can carry by arithmetic and whether dedicating was right there; how the policy that is to be
used does; what the cluster carries for its price. Latencies at equal loads are in a table
(``lab.tier_tables``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from conserve_serving.engines.profile import load_profile
from conserve_serving.lab.advantage import advantage
from conserve_serving.lab.capacity import ClusterCapacity
from conserve_serving.lab.report.context import say_change, say_interval
from conserve_serving.lab.report.metrics import METRICS as ALL_METRICS
from conserve_serving.lab.report.rows import at_load
from conserve_serving.lab.stats import Verdict
from conserve_serving.lab.tier_findings import BOTH, MARGIN, Finding
from conserve_serving.lab.tier_verdicts import SLOS, SiteVerdict
from conserve_serving.replay.report import format_number

WORDS: Final = {
    Verdict.WIN: "wins",
    Verdict.TIE: "ties",
    Verdict.LOSS: "loses",
    Verdict.UNKNOWN: "(one seed: no verdict)",
}
_PARTS: Final = {
    "prefill": "first prompts on the prefill tier",
    "decode": "later prompts and decode on the decode tier",
    "link": "hand-offs over the link",
}
_BASELINES: Final = ("conserve-hosting", "collocated_speed", "collocated_speed_override")


def text(site: SiteVerdict) -> str:
    """A paragraph on one workload on one cluster."""
    parts = [
        headline(site),
        why(site),
        _transient(site),
        _misses(site),
        _plus(site),
        _prices(site),
    ]
    return " ".join(part for part in parts if part)


def headline(site: SiteVerdict) -> str:
    """Who wins in what is carried, and by how much."""
    main = site.main()
    if main is None:
        return "Nobody keeps the SLO at any load that was run: the cluster is too slow for it."
    said = [f"{name} {change(found)}" for name, found in site.best.items()]
    return (
        f"{main.ours} {WORDS[main.verdict]} against {main.rival}: {', '.join(reversed(said))} "
        f"({'Gany' if 'Gany' in site.best else 'Gf'} {format_number(main.value)} against "
        f"{format_number(main.rival_value)} conversations/s)."
    )


def change(found: Finding) -> str:
    """By how much ours differs, with the interval."""
    if found.bound == BOTH:
        return f"({BOTH})"
    if found.ratio is None:
        return "only ours carries anything"
    return " ".join(
        part for part in (say_change(found.ratio), say_interval(found.ratio), found.bound) if part
    )


def why(site: SiteVerdict) -> str:
    """What dedicating the prefill tier is worth there, by arithmetic and as run."""
    capacity = site.capacity
    if capacity is None:
        return ""
    if not capacity.prefill_per_s:
        return "It has no prefill tier to dedicate."
    said = [_arithmetic(site, capacity)]
    gain = _dedicating(site)
    if gain is not None:
        if abs(gain - 1) <= MARGIN:
            judged = "no difference"
        else:
            agree = (gain > 1) == capacity.dedicate
            judged = "as computed" if agree else "the arithmetic says otherwise"
        said.append(
            f"As run, conserve (dedicated) carries {_percent(gain)} of the best that hosts "
            f"everywhere: {judged}."
        )
    if site.busy and not capacity.dedicate:
        idle = min(site.busy, key=lambda tier: site.busy[tier])
        if site.busy[idle] < 0.6:
            said.append(
                f"Under conserve the {idle} tier works {_percent(site.busy[idle])} of the time, "
                f"the other {_percent(max(site.busy.values()))}."
            )
    return " ".join(said)


def _arithmetic(site: SiteVerdict, capacity: ClusterCapacity) -> str:
    dedicated, hosting = capacity.valve_per_s, capacity.hosting_per_s
    parts = (
        f"prefill {format_number(capacity.prefill_per_s)}, tail and decode "
        f"{format_number(capacity.decode_per_s)}, link {format_number(capacity.link_per_s)}"
    )
    sums = (
        f"By arithmetic dedicated tiers carry {format_number(capacity.dedicated_per_s)}/s "
        f"({parts}), {format_number(dedicated)} with the decoders' spare time, "
        f"everything everywhere {format_number(hosting)}"
    )
    bound = _PARTS[capacity.bottleneck]
    if capacity.dedicate:
        return f"{sums}: dedicating is right{_advantage(site)}; {bound} bind."
    if capacity.bottleneck == "link" or capacity.link_busy >= 0.8:
        return f"{sums}: hosting is right, for the link is too slow to hand over every first turn."
    if site.equal:
        return (
            f"{sums}: hosting is right, for equal engines have to gain a tenth by being set apart."
        )
    if capacity.bottleneck == "decode":
        return (
            f"{sums}: hosting is right{_advantage(site)}; {bound} bind, and the strong engine "
            "would idle when it has prefilled."
        )
    return f"{sums}: hosting is right{_advantage(site)}; {bound} bind while decoders idle."


def _advantage(site: SiteVerdict) -> str:
    """How far the other tier is behind, phase by phase."""
    profiles = [load_profile(group.profile) for group in site.spec.groups]
    if site.equal:
        return ""
    slower = advantage(profiles[-1], profiles[0])
    return (
        f" ({profiles[-1].name} takes {slower.prefill:.1f} times as long as {profiles[0].name} to "
        f"prefill, {slower.decode_alone:.1f} for a decode step alone, {slower.kv_read:.1f} for "
        "the KV it reads)"
    )


def _dedicating(site: SiteVerdict) -> float | None:
    """Gany of ``conserve`` over that of the best contender that hosts everywhere."""
    own = _value(site, "conserve")
    others = [value for label in _BASELINES if (value := _value(site, label)) is not None]
    return None if own is None or not others or not max(others) else own / max(others)


def _value(site: SiteVerdict, label: str) -> float | None:
    found = site.goodputs.get(label, {}).get("Gany")
    return None if found is None else found.estimate.value


def _transient(site: SiteVerdict) -> str:
    """Whether the goodput is that of a run which is too short to queue."""
    if not is_transient(site):
        return ""
    return (
        "That is more than any mode can carry for long: the runs end before queues have grown. "
        "Give more conversations for a steady state."
    )


def is_transient(site: SiteVerdict) -> bool:
    """Whether one of the two of the verdict seems to carry more than the cluster can."""
    main, capacity = site.main(), site.capacity
    if main is None or capacity is None:
        return False
    most = max(capacity.valve_per_s, capacity.hosting_per_s)
    return max(main.value, main.rival_value) > (1 + MARGIN) * most


def _misses(site: SiteVerdict) -> str:
    """Which SLO the two miss most, at the highest load that all ran."""
    main = site.main()
    if main is None or not site.loads:
        return ""
    said = []
    for label in (main.ours, main.rival):
        missed = site.missed.get(label)
        if missed and max(missed.values()) > 0:
            worst = max(missed, key=lambda name: missed[name])
            said.append(f"{label} misses most in {SLOS[worst]} ({_percent(missed[worst])})")
    misses = f"{at_load(max(site.loads)).capitalize()} {', '.join(said)}." if said else ""
    dips = [
        f"{label} misses them at {format_number(low)}/s and keeps them at {format_number(high)}/s"
        for label in dict.fromkeys((main.ours, "conserve_plus", main.rival))
        if label in site.dips
        for low, high in (site.dips[label],)
    ]
    return f"{misses} Under some seed {', '.join(dips)}." if dips else misses


def _plus(site: SiteVerdict) -> str:
    """The policy that is to be used, where it is not the one that won."""
    own, main = site.each.get("conserve_plus"), site.main()
    if own is None or main is None or main.ours == "conserve_plus":
        return ""
    behind = own.value / main.value if main.value else 1.0
    against = f"conserve_plus {WORDS[own.verdict]} against {own.rival} ({change(own)})"
    if behind >= 1 - MARGIN:
        return f"{against}."
    return f"{against}, {_percent(behind)} of what {main.ours} carries."


def _change_alone(found: Finding) -> str:
    return "" if found.ratio is None else say_change(found.ratio)


def _prices(site: SiteVerdict) -> str:
    cheapest, coolest, sized = site.cheapest, site.coolest, site.sized_by_rent
    if cheapest is None or coolest is None or sized is None:
        return ""
    rented = (
        f"Per dollar {change(cheapest.per_dollar)} ({WORDS[cheapest.per_dollar.verdict]}; "
        f"{_percent(cheapest.rent_low)} to {_percent(cheapest.rent_high)} at other rents) against "
        f"{cheapest.per_dollar.rival} on {cheapest.cluster}"
    )
    cooled = (
        f"per rated watt {change(coolest.per_rated_w)} ({WORDS[coolest.per_rated_w.verdict]}) "
        f"against {coolest.per_rated_w.rival} on {coolest.cluster}"
    )
    right = (
        f"right-sized ({sized.cluster}, the nearest rent) {change(sized.as_is)} as it is, "
        f"{change(sized.per_dollar)} per dollar ({WORDS[sized.per_dollar.verdict]})"
    )
    return f"{rented}; {cooled}; {right}."


# --- of all ---------------------------------------------------------------------------------------


def summary(sites: Sequence[SiteVerdict]) -> list[str]:
    """What holds of all places together, and how certain it is."""
    unlike = [site for site in sites if not site.equal]
    said = []
    for title, some in (("unlike tiers", unlike), ("equal tiers", [s for s in sites if s.equal])):
        counts = Counter(main.verdict for site in some if (main := site.main()) is not None)
        if counts:
            said.append(
                f"On {title}, the best of ConServe's contenders against the best other policy in "
                f"Gany: {_counts(counts)}, of {len(some)} clusters and workloads."
            )
    plus = Counter(
        one.verdict for site in unlike if (one := site.each.get("conserve_plus")) is not None
    )
    if plus:
        said.append(f"conserve_plus alone, on unlike tiers: {_counts(plus)}.")
    if losses := plus_losses(sites):
        said.append(
            f"conserve_plus loses in some figure on {len(losses)} of {len(sites)} clusters and "
            "workloads; every one is listed with them."
        )
    elif any("conserve_plus" in site.each for site in sites):
        said.append("conserve_plus loses nowhere.")
    if short := sum(map(is_transient, sites)):
        said.append(
            f"On {short} of {len(sites)} clusters and workloads the goodput is above what can be "
            "carried for long: the runs are too short to say anything of a steady state there."
        )
    said.append(certainty(sites))
    return said


def plus_losses(sites: Iterable[SiteVerdict]) -> list[str]:
    """For each place, every figure in which ``conserve_plus`` loses against the best other."""
    found = []
    for site in sites:
        parts = []
        one = site.each.get("conserve_plus")
        if one is not None and one.verdict is Verdict.LOSS:
            parts.append(f"goodput {change(one)} against {one.rival}")
        for rate, metrics in site.plus.items():
            parts += [
                f"{ALL_METRICS[name].title} {_change_alone(loss)} against {loss.rival} "
                f"{at_load(rate)}"
                for name, loss in metrics.items()
                if loss.verdict is Verdict.LOSS
            ]
        if parts:
            found.append(f"{site.place.title} ({', '.join(parts)})")
    return found


def certainty(sites: Sequence[SiteVerdict]) -> str:
    """What the intervals stand on."""
    seeds = sorted({site.seeds for site in sites})
    said = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    widths = [
        (one.ratio.high - one.ratio.low) / 2
        for site in sites
        if (one := site.main()) is not None and one.ratio is not None and one.ratio.n > 1
    ]
    width = sorted(widths)[len(widths) // 2] if widths else math.nan
    half = (
        "" if math.isnan(width) else f" The median half-width of an interval is {_percent(width)}."
    )
    few = (
        " With so few seeds an interval says little more than whether all seeds agree."
        if seeds[0] < 6
        else ""
    )
    return (
        f"Intervals are over {said} paired seeds of each point; differences up to "
        f"{_percent(MARGIN)} are ties.{half}{few}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _counts(counts: Mapping[Verdict, int]) -> str:
    named = ((Verdict.WIN, "wins"), (Verdict.TIE, "ties"), (Verdict.LOSS, "losses"))
    said = [f"{name} {counts.get(one, 0)}" for one, name in named]
    if counts.get(Verdict.UNKNOWN):
        said.append(f"without a verdict (one seed) {counts[Verdict.UNKNOWN]}")
    return ", ".join(said)
