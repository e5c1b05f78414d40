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
from conserve_serving.lab.goodput import (
    MISSES,
    CapacitySearch,
    GoodputSearch,
    Target,
    at_rate,
    guess_per_s,
    search,
)
from conserve_serving.lab.workloads import WorkloadSpec


def cell(label: str = "collocated", seed: int = 0) -> Cell:
    return Cell(
        cluster=cluster("paper"),
        contender=contender(label),
        workload=WorkloadSpec(source="generated:swebench", seed=seed),
    )


def one_rate(cell: Cell) -> float:
    assert cell.workload.rate_per_s is not None
    return cell.workload.rate_per_s


def row(cell: Cell, **figures) -> dict:
    slo = dict.fromkeys(("ttfet", "ttfet_without_gaps", "first_turn_ttft", "e2e", "all"), 1.0)
    return {
        "key": cell.key,
        "stretch": 1.0,
        "completion_rate_per_s": one_rate(cell),
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
            carries = self.capacity_per_s[one.contender.label] * (1 + one.workload.seed / 10)
            load = one_rate(one) / carries
            rows.append(
                row(
                    one,
                    slo={"ttfet": 1.0 - MISSES * load},
                    stretch=max(load, 1.0),
                    completion_rate_per_s=min(one_rate(one), carries),
                )
            )
        random.Random(0).shuffle(rows)  # rows are told by their key, not by their place
        return rows


def test_finds_the_rate_at_which_five_per_cent_miss() -> None:
    bench = Bench(collocated=3.7, conserve=0.21)
    cells = [cell("collocated"), cell("conserve"), cell("collocated", seed=1)]
    found = search(cells, Target.TTFET, bench.run)
    rates = [one.rate_per_s for one in found]
    assert rates == pytest.approx([3.7, 0.21, 3.7 * 1.1], rel=0.02)
    for one in found:
        assert isinstance(one, GoodputSearch)
        assert one.passed_per_s is not None and one.failed_per_s is not None
        assert one.passed_per_s < one.failed_per_s <= one.passed_per_s * 1.02
    assert bench.rounds[0] == 3  # all searches go on side by side
    assert len(bench.rounds) == max(len(one.tried) for one in found) < 12


def test_capacity_is_what_is_completed_under_overload() -> None:
    bench = Bench(collocated=3.1, conserve=0.2)
    cells = [cell("collocated"), cell("conserve")]
    found = search(cells, Target.CAPACITY, bench.run, start_per_s=1.0)
    assert [one.rate_per_s for one in found] == [3.1, 0.2]
    assert found[0].tried == [1.0, 2.0, 4.0]  # 4 is 1.29 times what it carries
    assert found[1].tried == [1.0]


def test_a_rate_just_above_capacity_is_no_overload() -> None:
    """What is completed there is still what arrives, more or less."""
    one = CapacitySearch(start_per_s=1.0)
    one.tell(1.0, row(cell(), stretch=1.2, completion_rate_per_s=0.9))
    assert one.rate_per_s is None and one.next_rate == 2.0


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        ({"conversations_incomplete": 2}, "2 conversations broke off"),
        ({"stretch": None}, "too few"),
    ],
)
def test_runs_that_say_nothing_of_capacity(figures: dict, text: str) -> None:
    (one,) = search([cell()], Target.CAPACITY, lambda cells: [row(cells[0], **figures)])
    assert one.rate_per_s is None
    assert one.error is not None and text in one.error


def test_what_is_never_overloaded_has_no_capacity() -> None:
    (one,) = search([cell()], Target.CAPACITY, lambda cells: [row(cells[0])], start_per_s=1.0)
    assert one.rate_per_s is None and one.tried[-1] == 256.0
    assert one.error is not None and "no overload" in one.error


@pytest.mark.parametrize(
    ("target", "slo"),
    [
        (Target.TTFET, {"ttfet": 0.94}),
        (Target.TTFET_WITHOUT_GAPS, {"ttfet_without_gaps": 0.94}),
        (Target.ANY, {"all": 0.94}),
    ],
)
def test_each_target_reads_its_own_share(target: Target, slo: dict) -> None:
    def passes(target: Target, slo: dict) -> bool:
        one = GoodputSearch(target=target, start_per_s=1.0)
        one.tell(1.0, row(cell(), slo=slo))
        return one.passed_per_s == 1.0

    assert not passes(target, slo)
    others = {Target.TTFET, Target.TTFET_WITHOUT_GAPS, Target.ANY} - {target}
    assert all(passes(other, slo) for other in others)
    assert passes(target, dict.fromkeys(slo, 0.95))  # 5 % may miss


@given(st.floats(0.01, 100.0), st.floats(0.5, 2.0))
def test_any_capacity_within_reach_is_found_from_any_start(capacity: float, start: float) -> None:
    one = GoodputSearch(target=Target.TTFET, start_per_s=start)
    while (rate := one.next_rate) is not None:
        one.tell(rate, row(cell(), slo={"ttfet": float(rate <= capacity)}))
    assert one.rate_per_s is not None
    assert one.rate_per_s <= capacity <= one.rate_per_s * 1.02
    assert len(one.tried) <= 18


def test_nothing_passes_or_nothing_fails() -> None:
    never, always = (GoodputSearch(target=Target.ANY, start_per_s=1.0) for _ in range(2))
    for one, met in ((never, 0.0), (always, 1.0)):
        while (rate := one.next_rate) is not None:
            one.tell(rate, row(cell(), slo={"all": met}))
    assert never.rate_per_s == 0.0
    assert always.rate_per_s == 256.0 and always.failed_per_s is None


def test_a_run_that_failed_ends_its_search_alone() -> None:
    bench = Bench(collocated=2.0, conserve=2.0)

    def run(cells: list[Cell]) -> list[dict]:
        return [
            {"key": one["key"], "failure": {"error": "DeadlockError", "text": "p0 holds"}}
            if cell_.contender.label == "conserve" and one_rate(cell_) > 1
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


def test_the_first_rate_is_a_guess_that_all_contenders_and_seeds_share() -> None:
    first = {guess_per_s(cell(label, seed)) for label in ("conserve", "oracle") for seed in (0, 7)}
    assert len(first) == 1
    (found,) = search([cell()], Target.TTFET, Bench(collocated=1.0).run)
    assert found.tried[0] == first.pop()
    small = replace(cell(), cluster=cluster("paper").with_ratio(1, 1))
    assert guess_per_s(small) < guess_per_s(cell())


def test_at_rate_changes_the_rate_alone() -> None:
    one = cell(seed=4)
    other = at_rate(one, 2.5, share_of_capacity=0.8)
    assert other.workload == replace(one.workload, rate_per_s=2.5)
    assert other.share_of_capacity == 0.8
    assert replace(other, workload=one.workload, share_of_capacity=None) == one


@given(st.floats(0.2, 5.0), st.floats(1.01, 2.0))
def test_a_good_guess_and_what_is_known_save_runs(capacity: float, step: float) -> None:
    def met(rate: float) -> dict:
        return row(cell(), slo={"ttfet": float(rate <= capacity)})

    one = GoodputSearch(target=Target.TTFET, start_per_s=1.0, step=step, tolerance=0.1)
    one.know(0.15, met(0.15))
    one.know(6.0, met(6.0))
    while (rate := one.next_rate) is not None:
        assert 0.15 < rate < 6.0
        one.tell(rate, met(rate))
    assert one.rate_per_s is not None and one.rate_per_s <= capacity <= one.rate_per_s * 1.1
    near = GoodputSearch(target=Target.TTFET, start_per_s=capacity * 0.97, step=1.1, tolerance=0.1)
    while (rate := near.next_rate) is not None:
        near.tell(rate, met(rate))
    assert len(near.tried) == 2


def test_nothing_beyond_floor_and_ceiling_is_tried() -> None:
    for met, ends in ((1.0, 3.0), (0.0, 0.4)):
        one = GoodputSearch(
            target=Target.ANY, start_per_s=1.0, step=1.2, floor_per_s=0.4, ceiling_per_s=3.0
        )
        while (rate := one.next_rate) is not None:
            one.tell(rate, row(cell(), slo={"all": met}))
        assert one.tried[-1] == ends
        assert one.tried[1] == pytest.approx(1.2 if met else 1 / 1.2)
