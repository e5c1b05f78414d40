"""The studies that are run, and what is said of the paper's claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rows import cluster, row

from conserve_serving.cli import run
from conserve_serving.lab.clusters import cluster as known_cluster
from conserve_serving.lab.report.document import Outcome
from conserve_serving.lab.report.rows import Rows
from conserve_serving.lab.reproduce import claims, figures
from conserve_serving.lab.studies import (
    PAPER_RATES_PER_S,
    Size,
    steady_rates,
    studies,
)
from conserve_serving.lab.workloads import WorkloadSpec

PAPER = WorkloadSpec(source="generated:swebench", max_turns=5)
LABELS = {
    "conserve": "conserve",
    "per_turn-10-wrong": "per_turn_10_wrong",
    "per_turn-greedy-10-wrong": "per_turn_greedy_10_wrong",
}


def rows(strengths: dict[str, float], rates: tuple[float, ...] = (1.0, 1.634), **more: Any) -> Rows:
    """Six seeds of each contender, as strong as the test says."""
    return Rows(
        [
            row(
                policy=LABELS[label],
                label=label,
                rate_per_s=rate,
                seed=seed,
                strength=strengths[label],
                **more,
            )
            for label in strengths
            for rate in rates
            for seed in range(6)
        ]
    )


def test_the_paper_is_asked_at_its_own_loads_and_other_workloads_at_shares_of_capacity() -> None:
    by_name = {study.name: study for study in studies(PAPER, Size(seeds=2))}
    transient = by_name["transient"].cells
    assert {cell.workload.rate_per_s for cell in transient} == set(PAPER_RATES_PER_S)
    assert {cell.workload.conversations for cell in transient} == {255}
    assert {cell.warmup_share for cell in transient} == {0.0}
    steady = by_name["steady"].cells
    assert {cell.workload.conversations for cell in steady} == {1000}
    assert {cell.warmup_share for cell in steady} == {0.1}
    loads = steady_rates(known_cluster("paper"), PAPER)
    assert {cell.workload.rate_per_s for cell in steady} == set(loads)
    assert list(loads) == sorted(loads)
    uncapped = WorkloadSpec(source="generated:customer-service")
    other = studies(uncapped, Size(seeds=1), only=["transient"])[0].cells
    assert not {cell.workload.rate_per_s for cell in other} & {0.75, 1.25, 1.634}


def test_every_study_meets_the_same_seeds_and_differs_in_what_it_says() -> None:
    by_name = {study.name: study for study in studies(PAPER, Size(seeds=3))}
    for study in by_name.values():
        assert {cell.workload.seed for cell in study.cells} == {0, 1, 2}
        assert len({cell.key for cell in study.cells}) == len(study.cells)
    assert {cell.mixed_slowdown for cell in by_name["interference"].cells} == {1.25, 1.5}
    assert None not in {cell.link for cell in by_name["links"].cells}
    assert {cell.cluster.name for cell in by_name["ratio"].cells} == {"paper@2p2d"}
    assert len({cell.cluster.name for cell in by_name["tiers"].cells}) == 5


def test_a_claim_is_met_where_the_change_is_as_large_as_the_paper_says() -> None:
    made = claims(rows({"conserve": 1.4, "per_turn-10-wrong": 0.6}))
    ttfet = next(one for one in made if one.claim.startswith("p95 TTFET"))
    assert ttfet.outcome in (Outcome.MET, Outcome.PARTLY)
    assert "1.634/s" in ttfet.reached
    assert not isinstance(ttfet.ours, str)
    assert ttfet.ours.value < -51.08
    assert ttfet.ours.low <= ttfet.ours.value <= ttfet.ours.high


def test_a_claim_is_not_met_where_the_baseline_is_as_good() -> None:
    made = claims(rows({"conserve": 0.9, "per_turn-10-wrong": 1.0}))
    ttfet = next(one for one in made if one.claim.startswith("p95 TTFET"))
    assert (ttfet.outcome, ttfet.reached) == (Outcome.NOT_MET, "nowhere")
    assert not isinstance(ttfet.ours, str)
    assert ttfet.ours.value > 0
    assert "(loss)" in ttfet.loads


def test_a_smaller_gain_than_the_papers_is_half_a_claim() -> None:
    made = claims(rows({"conserve": 1.0, "per_turn-10-wrong": 0.97}, rates=(1.0, 1.2)))
    ttfet = next(one for one in made if one.claim.startswith("p95 TTFET"))
    assert (ttfet.outcome, ttfet.reached) == (Outcome.PARTLY, "nowhere")
    assert "(win)" in ttfet.loads


def test_tbt_is_preserved_unless_it_is_certainly_worse() -> None:
    def tbt(ours: float) -> Outcome:
        made = claims(rows({"conserve": ours, "per_turn-10-wrong": 1.0}))
        return next(one.outcome for one in made if "last-turn TBT" in one.claim)

    assert tbt(1.3) is Outcome.MET
    assert tbt(0.6) is Outcome.NOT_MET


def test_energy_of_unlike_tiers_is_compared_across_clusters() -> None:
    capped = cluster("paper-capped")
    given = [
        row(policy="conserve", rate_per_s=1.25, seed=seed, on=on)
        for on in (cluster(), capped)
        for seed in range(6)
    ]
    for one in given:
        if one["cell"]["cluster"]["name"] == "paper-capped":
            one["tokens_per_j"] *= 1.3
    tiers = [one for one in claims(Rows(given)) if "paper-capped" in one.claim]
    assert len(tiers) == 1
    assert tiers[0].outcome is Outcome.MET
    assert "1.25/s" in tiers[0].reached


def test_every_point_is_in_the_json_with_its_interval() -> None:
    given = rows({"conserve": 1.0, "per_turn-10-wrong": 0.9})
    data = json.loads(json.dumps(figures(given, claims(given)), allow_nan=False))
    assert len(data["points"]) == 4
    point = data["points"][0]
    assert point["seeds"] == 6
    assert point["ttfet"]["low"] <= point["ttfet"]["value"] <= point["ttfet"]["high"]
    assert data["claims"][0]["paper"].startswith("−51.08")


def test_the_command_runs_resumes_and_writes_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reproduce(*more: str) -> int:
        return run(
            [
                "reproduce",
                "--studies=transient",
                "--seeds=2",
                "--transient-conversations=8",
                "--rates=0.8",
                "--jobs=1",
                "--no-progress",
                f"--rows={tmp_path / 'rows.jsonl'}",
                f"--json={tmp_path / 'out.json'}",
                f"--html={tmp_path / 'out.html'}",
                f"--markdown={tmp_path / 'out.md'}",
                *more,
            ]
        )

    assert reproduce() == 0
    said = capsys.readouterr()
    assert "−51.08 %" in said.out
    data = json.loads((tmp_path / "out.json").read_text())
    assert {point["contender"] for point in data["points"]} >= {"conserve", "per_turn-10-wrong"}
    assert "The paper" in (tmp_path / "out.html").read_text()
    written = (tmp_path / "rows.jsonl").read_text()
    assert reproduce("--resume") == 0
    assert (tmp_path / "rows.jsonl").read_text() == written


def test_wrong_use_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["reproduce", "--resume"]) == 2
    assert "--rows" in capsys.readouterr().err
    assert run(["reproduce", "--all-turns", "--max-turns=3"]) == 2
    assert "contradict" in capsys.readouterr().err
    assert run(["reproduce", f"--html={tmp_path / 'no' / 'where.html'}"]) == 2
    assert "folder does not exist" in capsys.readouterr().err
    missing = f"--html={tmp_path / 'x.html'}"
    assert run(["reproduce", "--trace=/no/such/trace.jsonl", missing]) == 2
    assert "cannot be read" in capsys.readouterr().err
