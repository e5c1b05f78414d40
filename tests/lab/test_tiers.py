"""What `conserve tiers` runs, and what it says of planted rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import rows as planted

from conserve_serving.lab import tier_tables, tier_text
from conserve_serving.lab.capacity import ClusterCapacity
from conserve_serving.lab.cell import Cell
from conserve_serving.lab.clusters import cluster
from conserve_serving.lab.contenders import contender
from conserve_serving.lab.errors import LabError
from conserve_serving.lab.goodput import MISSES, Row
from conserve_serving.lab.report.rows import Rows
from conserve_serving.lab.stats import Verdict
from conserve_serving.lab.tier_verdicts import SiteVerdict, verdicts
from conserve_serving.lab.tiers import (
    Plan,
    clusters_of,
    reference_of,
    run_plan,
    with_right_sized,
)
from conserve_serving.lab.workloads import WorkloadSpec

WORKLOAD = WorkloadSpec(source="generated:swebench", max_turns=2, pool_size=20, conversations=20)


def plan(**changes: object) -> Plan:
    values: dict = {
        "clusters": [cluster("h100-3a100")],
        "contenders": [contender("conserve"), contender("collocated_speed")],
        "workloads": [WORKLOAD],
        "seeds": 2,
        "reference": reference_of("8b"),
    }
    return Plan(**values | changes)


class Bench:
    """Clusters whose misses rise with the load; Gany is half of Gf."""

    def __init__(self, **goodput_per_s: float) -> None:
        self.goodput_per_s = goodput_per_s
        self.runs: list[tuple[str, Cell]] = []

    def run(self, cells: Sequence[Cell], stage: str) -> list[Row]:
        self.runs += [(stage, cell) for cell in cells]
        return [self._row(cell) for cell in cells]

    def _row(self, cell: Cell) -> Row:
        most = self.goodput_per_s[cell.contender.label] * (1 + cell.workload.seed / 20)
        load = (cell.workload.rate_per_s or 0.0) / most
        slo = {"ttfet": 1 - MISSES * load, "all": 1 - MISSES * load * 2}
        return {"key": cell.key, "cell": cell.to_json(), "slo": slo}

    def stages(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for stage, _ in self.runs:
            counts[stage] = counts.get(stage, 0) + 1
        return counts


def test_goodputs_are_bracketed_and_later_seeds_begin_where_earlier_ended() -> None:
    bench = Bench(conserve=0.5, collocated_speed=1.1)
    rows, errors = run_plan(plan(), bench.run)
    assert not errors
    assert len({row["key"] for row in rows}) == len(rows)
    for label, most in bench.goodput_per_s.items():
        for seed in (0, 1):
            mine = [
                row
                for row in rows
                if row["cell"]["contender"]["label"] == label
                and row["cell"]["workload"]["seed"] == seed
            ]
            for name, found in (("all", most / 2), ("ttfet", most)):
                exact = found * (1 + seed / 20)
                rates: dict[bool, list[float]] = {True: [], False: []}
                for row in mine:
                    met = row["slo"][name] >= 1 - MISSES
                    rates[met].append(row["cell"]["workload"]["rate_per_s"])
                assert max(rates[True]) <= exact <= min(rates[False])
                assert min(rates[False]) <= max(rates[True]) * 1.1
    stages = bench.stages()
    first, second = (stages[f"searching Gany, seed {n} of 2"] for n in (1, 2))
    assert second < first
    assert second <= 2 * 3  # two contenders, each about three runs


def test_all_meet_at_shares_of_what_the_best_carries() -> None:
    bench = Bench(conserve=0.5, collocated_speed=1.1)
    run_plan(plan(shares=(0.5, 1.0)), bench.run)
    equal = [cell for stage, cell in bench.runs if stage == "all at equal loads"]
    loads: dict[tuple[str, int], list[float]] = {}
    for one in equal:
        mine = loads.setdefault((one.contender.label, one.workload.seed), [])
        mine.append(one.workload.rate_per_s or 0.0)
    assert len(loads) == 4
    (rates,) = {tuple(sorted(found)) for found in loads.values()}
    assert rates == pytest.approx((0.275, 0.55), rel=0.12)  # Gany of the better one is 0.55
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.01)


def test_what_nobody_can_carry_is_given_up_soon() -> None:
    bench = Bench(conserve=1e-6, collocated_speed=1e-6)
    run_plan(plan(seeds=3), bench.run)
    stages = bench.stages()
    assert stages["searching Gany, seed 1 of 3"] <= 2 * 7
    assert stages["searching Gany, seed 3 of 3"] == 2  # the lowest load alone
    assert "all at equal loads" not in stages


def test_an_interrupted_run_keeps_what_was_done() -> None:
    bench = Bench(conserve=0.5, collocated_speed=1.1)

    def run(cells: Sequence[Cell], stage: str) -> list[Row]:
        return bench.run(cells, stage) if len(bench.runs) < 4 else []

    rows, errors = run_plan(plan(), run)
    assert len(rows) == 4
    assert all("interrupted" in one for one in errors)
    assert any("Gany of conserve on h100-3a100" in one for one in errors)


def test_all_clusters_are_given_the_same_conversations() -> None:
    both = plan(clusters=[cluster("h100-3a100"), cluster("h100-3a40")])
    cuts = {cell.workload.max_context_tokens for cell in both.cells(0)}
    assert cuts == {min(one.longest_context_tokens for one in both.clusters)}
    own = plan(workloads=[replace(WORKLOAD, max_context_tokens=5000)])
    assert {cell.workload.max_context_tokens for cell in own.cells(0)} == {5000}
    assert {cell.reference for cell in both.cells(0)} == {reference_of("8b")}


def test_models_are_not_mixed() -> None:
    with pytest.raises(LabError, match="latencies of one model"):
        plan(clusters=[cluster("32b-4h100")])
    with pytest.raises(LabError, match="tolerance is 0"):
        plan(tolerance=0)
    with pytest.raises(LabError, match="choose one of 8b, 32b"):
        reference_of("70b")


def test_right_sized_clusters_are_added_where_there_is_no_like() -> None:
    known = clusters_of("8b")
    assert "h100-3a100" in {one.name for one in known}
    assert not any(one.name.startswith(("32b", "paper")) for one in known)
    assert [one.name for one in with_right_sized([cluster("h100-3a100")])] == [
        "h100-3a100",
        "2-h100-qwen3-8b",  # 6.98 of 8.26 USD/h
        "3-h100-qwen3-8b",  # 2,325 of 2,200 W
    ]
    some = [cluster(name) for name in ("h100-3a100", "2h100", "3h100")]
    assert with_right_sized(some) == some


# --- verdicts -------------------------------------------------------------------------------------

UNLIKE = {
    "name": "mixed",
    "title": "1 H100 + 3 A100",
    "groups": [
        planted.group(1, "prefill", "h100-qwen3-8b"),
        planted.group(3, "decode", "a100-qwen3-8b"),
    ],
    "link": None,
    "usd_per_hour": [],
}
EQUAL = planted.cluster("equal", prefill=1, decode=1, profile="h100-qwen3-8b")
LABELS = ("conserve", "conserve_plus", "collocated_speed")


def capacity(**changes: object) -> ClusterCapacity:
    values: dict = {
        "prefill_per_s": 3.0,
        "decode_per_s": 2.0,
        "link_per_s": 20.0,
        "dedicated_per_s": 2.0,
        "bottleneck": "decode",
        "valve_per_s": 2.0,
        "hosting_per_s": 1.5,
        "engines": (),
    }
    return ClusterCapacity(**values | changes)


def judge(
    strengths: dict[str, float],
    *,
    parts: ClusterCapacity | None = None,
    equal: float | None = None,
    seeds: int = 4,
) -> list[SiteVerdict]:
    rates = [n / 10 for n in range(5, 28, 2)]
    made = [
        planted.row(policy=policy, rate_per_s=rate, seed=seed, strength=strength, on=UNLIKE)
        for policy, strength in strengths.items()
        for rate in rates
        for seed in range(seeds)
    ]
    if equal is not None:
        made += [
            planted.row(policy=policy, rate_per_s=rate, seed=seed, strength=equal, on=EQUAL)
            for policy in LABELS
            for rate in rates
            for seed in range(seeds)
        ]
    read = Rows(made)
    known = {} if parts is None else {("mixed", place.workload): parts for place in read.places()}
    return verdicts(read, known)


def test_a_win_is_told_with_its_reason() -> None:
    (site,) = judge(
        {"conserve": 1.2, "conserve_plus": 1.0, "collocated_speed": 0.9}, parts=capacity()
    )
    main = site.main()
    assert main is not None
    assert (main.ours, main.rival, main.verdict) == ("conserve", "collocated_speed", Verdict.WIN)
    assert main.ratio is not None and main.ratio.value == pytest.approx(1.2 / 0.9, rel=0.05)
    said = tier_text.text(site)
    assert said.startswith("conserve wins against collocated_speed: Gany +3")
    assert "dedicating is right" in said and "as computed" in said
    assert "prefill 3, tail and decode 2, link 20" in said
    assert "a100-qwen3-8b takes 2.8 times as long as h100-qwen3-8b to prefill" in said
    assert "conserve_plus wins against collocated_speed" in said
    assert re.search(r" At 2\.\d conversations/s (conserve|collocated_speed) misses most in ", said)
    assert "% of what conserve carries" in said


def test_what_contradicts_the_arithmetic_is_said() -> None:
    (site,) = judge(
        {"conserve": 0.7, "conserve_plus": 1.0, "collocated_speed": 1.0}, parts=capacity()
    )
    assert "the arithmetic says otherwise" in tier_text.text(site)
    assert site.main() is not None and site.main().verdict is Verdict.TIE  # type: ignore[union-attr]


def test_rates_have_three_digits_however_small_or_large() -> None:
    parts = capacity(prefill_per_s=0.01316, link_per_s=1234.5, hosting_per_s=math.inf)
    (site,) = judge(dict.fromkeys(LABELS, 1.0), parts=parts)
    assert "prefill 0.0132, tail and decode 2, link 1,234" in tier_text.why(site)
    assert "everything everywhere no limit" in tier_text.why(site)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hosting_per_s": 2.5}, "the strong engine would idle"),
        ({"hosting_per_s": 3.0, "bottleneck": "prefill"}, "bind while decoders idle"),
        ({"link_per_s": 2.2, "bottleneck": "decode"}, "the link is too slow"),
        ({"prefill_per_s": 0.0}, "no prefill tier to dedicate"),
    ],
)
def test_why_hosting_is_right(changes: dict, text: str) -> None:
    (site,) = judge(dict.fromkeys(LABELS, 1.0), parts=capacity(**changes))
    assert text in tier_text.why(site)


def test_every_loss_of_the_policy_to_be_used_is_listed() -> None:
    sites = judge({"conserve": 1.1, "conserve_plus": 0.7, "collocated_speed": 1.0})
    (lost,) = tier_text.plus_losses(sites)
    assert "mixed" in lost and "goodput −3" in lost and "TTFET, p95 +" in lost
    assert " against collocated_speed at 1.1 conversations/s" in lost
    assert not re.search(r"\d/s", lost)
    said = " ".join(tier_text.summary(sites))
    assert "conserve_plus alone, on unlike tiers: wins 0, ties 0, losses 1" in said
    even = judge(dict.fromkeys(LABELS, 1.0))
    assert "conserve_plus loses nowhere" in " ".join(tier_text.summary(even))


def test_prices_compare_with_equal_tiers() -> None:
    mixed, equal = judge(dict.fromkeys(LABELS, 1.0), equal=1.0)
    assert not mixed.equal and equal.equal and equal.cheapest is None
    assert mixed.cheapest is not None and mixed.sized_by_rent is not None
    assert mixed.cheapest.cluster == "equal"
    # Both carry the same; 1 H100 + 3 A100 cost 8.26 and 2 H100 6.98 USD an hour.
    ratio = mixed.cheapest.per_dollar.ratio
    assert ratio is not None and ratio.value == pytest.approx(6.98 / 8.26, rel=0.03)
    assert mixed.cheapest.per_dollar.verdict is Verdict.LOSS
    assert mixed.cheapest.rent_low < ratio.value < mixed.cheapest.rent_high
    watts = mixed.cheapest.per_rated_w.ratio
    assert watts is not None and watts.value == pytest.approx(1550 / 2200, rel=0.03)
    assert "Per dollar −1" in tier_text.text(mixed)


def test_one_seed_is_no_verdict_and_few_are_called_few() -> None:
    (site,) = judge({"conserve": 1.5, "collocated_speed": 1.0}, seeds=1)
    main = site.main()
    assert main is not None and main.verdict is Verdict.UNKNOWN
    assert "(one seed: no verdict)" in tier_text.text(site)
    assert "With so few seeds" in tier_text.certainty([site])
    (many,) = judge({"conserve": 1.5, "collocated_speed": 1.0}, seeds=6)
    assert "With so few seeds" not in tier_text.certainty([many])


def test_more_than_can_be_carried_is_called_a_transient() -> None:
    strengths = {"conserve": 1.2, "collocated_speed": 0.9}  # Gany about 1.8/s
    for most, short in ((1.0, True), (3.0, False)):
        parts = capacity(valve_per_s=most, hosting_per_s=most)
        (site,) = judge(strengths, parts=parts)
        assert tier_text.is_transient(site) is short
        assert ("more conversations" in tier_text.text(site)) is short
        assert ("too short" in " ".join(tier_text.summary([site]))) is short


def test_nobody_keeps_the_slo() -> None:
    (site,) = judge({"conserve": 0.01, "collocated_speed": 0.01})
    assert site.main() is None
    assert tier_text.text(site).startswith("Nobody keeps the SLO")


def test_only_ours_keeps_the_slo() -> None:
    (site,) = judge({"conserve": 1.0, "collocated_speed": 0.01})
    main = site.main()
    assert main is not None and main.verdict is Verdict.WIN and main.ratio is None
    assert "only ours carries anything" in tier_text.text(site)


def test_an_slo_that_is_missed_below_a_load_that_keeps_it_is_told() -> None:
    made = []
    for seed in range(3):
        for rate in (0.8, 1.2, 1.6, 2.0):
            for policy in ("conserve_plus", "collocated_speed"):
                row = planted.row(policy=policy, rate_per_s=rate, seed=seed, on=UNLIKE)
                dips = policy == "conserve_plus" and rate == 1.2 and seed == 1
                row["slo"]["all"] = 0.0 if dips else 0.9 if rate == 2.0 else 0.97
                made.append(row)
    (site,) = verdicts(Rows(made), {})
    assert site.dips == {"conserve_plus": (1.2, 1.6)}
    assert "conserve_plus misses them at 1.20/s and keeps them at 1.60/s" in tier_text.text(site)
    # What it carries ends where it first fails.
    found = site.goodputs["conserve_plus"]["Gany"]
    assert found is not None and found.by_seed[1] < 1.2
    assert found.by_seed[0] > 1.6


def test_one_workload_is_said_once() -> None:
    mixed, equal = judge(dict.fromkeys(LABELS, 1.0), parts=capacity(), equal=1.0)
    other = replace(equal, place=replace(equal.place, workload="other"))
    for make in (tier_tables.table, tier_tables.carried, tier_tables.at_loads):
        one, two = make([mixed, equal]), make([mixed, other])
        assert "workload" not in one.columns
        assert one.caption.endswith(mixed.place.workload)
        assert two.columns[1] == "workload"
        assert two.rows[-1][1].text == "other"
        assert mixed.place.workload not in two.caption


def test_tables_and_plain_data_have_every_site() -> None:
    sites = judge(dict.fromkeys(LABELS, 1.0), parts=capacity(), equal=1.0)
    for table in (tier_tables.table(sites), tier_tables.carried(sites)):
        assert len(table.rows) == 2
        assert all(len(row) == len(table.columns) for row in table.rows)
    loads = tier_tables.at_loads(sites)
    assert len(loads.rows) == sum(len(site.loads) for site in sites) == 2 * 12
    ttfet = loads.columns.index("TTFET, p95")
    assert {row[ttfet].text.split(",")[0] for row in loads.rows if row[0].text == "mixed"} <= {
        f"{label} {word}" for label in LABELS for word in ("wins", "ties", "loses")
    }
    data = json.loads(json.dumps(tier_tables.figures(sites), allow_nan=False))
    assert [one["cluster"] for one in data["sites"]] == ["mixed", "equal"]
    assert data["sites"][0]["capacity_per_s"]["bottleneck"] == "decode"
    assert data["sites"][0]["verdict"] == tier_text.text(sites[0])
    assert set(data["sites"][0]["goodput_per_s"]) == set(LABELS)
