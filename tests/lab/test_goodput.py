"""Searches against contenders whose capacity is known: the answer, and what it costs to find it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.lab.cell import Cell
from conserve_serving.lab.clusters import cluster
from conserve_serving.lab.contenders import contender
from conserve_serving.lab.goodput import MISSES, Search, Target, at_rate, search
from conserve_serving.lab.workloads import WorkloadSpec


def cell(label: str = "collocated", seed: int = 0) -> Cell:
    return Cell(
        cluster=cluster("paper"),
        contender=contender(label),
        workload=WorkloadSpec(source="generated:swebench", seed=seed),
    )


def row(cell: Cell, **figures) -> dict:
    slo = dict.fromkeys(("ttfet", "ttfet_without_gaps", "first_turn_ttft", "e2e", "all"), 1.0)
    return {
        "key": cell.key,
        "saturated": False,
        "conversations_incomplete": 0,
        **figures,
        "slo": slo | figures.get("slo", {}),
    }


class Bench:
    """Contenders that miss more and more of the SLO as the rate nears their capacity."""

    def __init__(self, **capacity_per_s: float) -> None:
        self.capacity_per_s = capacity_per_s
        self.rounds: list[int] = []

    def run(self, cells: list[Cell]) -> list[dict]:
        self.rounds.append(len(cells))
        rows = []
        for one in cells:
            rate = one.workload.rate_per_s
            load = rate / (self.capacity_per_s[one.contender.label] * (1 + one.workload.seed / 10))
            rows.append(row(one, slo={"ttfet": 1.0 - MISSES * load}, saturated=load > 2))
        random.Random(0).shuffle(rows)  # rows are told by their key, not by their place
        return rows


def test_finds_the_rate_at_which_five_per_cent_miss() -> None:
    bench = Bench(collocated=3.7, conserve=0.21)
    cells = [cell("collocated"), cell("conserve"), cell("collocated", seed=1)]
    found = search(cells, Target.TTFET, bench.run)
    rates = [one.rate_per_s for one in found]
    assert rates == pytest.approx([3.7, 0.21, 3.7 * 1.1], rel=0.02)
    for one in found:
        assert one.passed_per_s is not None and one.failed_per_s is not None
        assert one.passed_per_s < one.failed_per_s <= one.passed_per_s * 1.02
    assert bench.rounds[0] == 3  # all searches go on side by side
    assert len(bench.rounds) == max(len(one.tried) for one in found) < 12


def test_capacity_is_where_the_backlog_begins_to_grow() -> None:
    (found,) = search([cell()], Target.STABLE, Bench(collocated=3.0).run)
    assert found.rate_per_s == pytest.approx(6.0, rel=0.02)


def test_capacity_is_not_bought_with_conversations_that_break_off() -> None:
    assert Target.STABLE.kept(row(cell()))
    assert not Target.STABLE.kept(row(cell(), conversations_incomplete=1))


@pytest.mark.parametrize(
    ("target", "slo"),
    [
        (Target.TTFET, {"ttfet": 0.94}),
        (Target.TTFET_WITHOUT_GAPS, {"ttfet_without_gaps": 0.94}),
        (Target.ANY, {"all": 0.94}),
    ],
)
def test_each_target_reads_its_own_share(target: Target, slo: dict) -> None:
    assert not target.kept(row(cell(), slo=slo))
    others = {Target.TTFET, Target.TTFET_WITHOUT_GAPS, Target.ANY} - {target}
    assert all(other.kept(row(cell(), slo=slo)) for other in others)
    assert target.kept(row(cell(), slo=dict.fromkeys(slo, 0.95)))  # 5 % may miss


@given(st.floats(0.01, 100.0), st.floats(0.5, 2.0))
def test_any_capacity_within_reach_is_found_from_any_start(capacity: float, start: float) -> None:
    one = Search(start_per_s=start)
    while (rate := one.next_rate) is not None:
        one.tell(rate, passed=rate <= capacity)
    assert one.rate_per_s is not None
    assert one.rate_per_s <= capacity <= one.rate_per_s * 1.02
    assert len(one.tried) <= 18


def test_nothing_passes_or_nothing_fails() -> None:
    never, always = Search(start_per_s=1.0), Search(start_per_s=1.0)
    for one, passed in ((never, False), (always, True)):
        while (rate := one.next_rate) is not None:
            one.tell(rate, passed=passed)
    assert never.rate_per_s == 0.0
    assert always.rate_per_s == 256.0 and always.failed_per_s is None


def test_a_run_that_failed_ends_its_search_alone() -> None:
    bench = Bench(collocated=2.0, conserve=2.0)

    def run(cells: list[Cell]) -> list[dict]:
        return [
            {"key": one["key"], "failure": {"error": "DeadlockError", "text": "p0 holds"}}
            if cell_.contender.label == "conserve" and cell_.workload.rate_per_s > 1
            else one
            for cell_ in cells
            for one in bench.run([cell_])
        ]

    healthy, broken = search([cell("collocated"), cell("conserve")], Target.TTFET, run)
    assert healthy.rate_per_s == pytest.approx(2.0, rel=0.02)
    assert broken.rate_per_s is None
    assert broken.error == "DeadlockError: p0 holds"


def test_what_was_interrupted_has_no_answer() -> None:
    (one,) = search([cell()], Target.TTFET, lambda cells: [])
    assert one.rate_per_s is None and one.error == "interrupted"


def test_at_rate_changes_the_rate_alone() -> None:
    one = cell(seed=4)
    other = at_rate(one, 2.5, share_of_capacity=0.8)
    assert other.workload == replace(one.workload, rate_per_s=2.5)
    assert other.share_of_capacity == 0.8
    assert replace(other, workload=one.workload, share_of_capacity=None) == one
