"""Many cells in real processes: every one is run once, recorded once, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import grid_runs
import pytest
from grid_cells import cells

from conserve_serving.lab.cell import Cell, cell_from_json
from conserve_serving.lab.clusters import cluster
from conserve_serving.lab.contenders import Contender, contender
from conserve_serving.lab.errors import LabError
from conserve_serving.lab.grid import Grid, Results, failed, read_results, run_cells
from conserve_serving.lab.workloads import WorkloadError, WorkloadSpec

HERE = Path(__file__).parent


def test_a_grid_is_every_combination_seed_by_seed() -> None:
    grid = Grid(
        clusters=[cluster("paper"), cluster("paper").with_ratio(2, 2)],
        contenders=[contender("conserve"), contender("collocated")],
        workload=WorkloadSpec(source="generated:swebench", seed=99, rate_per_s=99.0),
        rates_per_s=(0.5, 1.0),
        seeds=(0, 1, 2),
        mixed_slowdowns=(1.0, 1.25),
        links=(None, "nvlink"),
    )
    made = grid.cells()
    assert len({cell.key for cell in made}) == len(made) == 2 * 2 * 2 * 3 * 2 * 2
    half = made[: len(made) // 3]
    assert {cell.workload.seed for cell in half} == {0}
    assert {cell.contender.label for cell in half} == {"conserve", "collocated"}
    assert {cell.workload.rate_per_s for cell in made} == {0.5, 1.0}


def test_a_cell_is_its_json_and_its_key_is_stable() -> None:
    (cell,) = cells(seeds=[7])
    again = cell_from_json(json.loads(json.dumps(cell.to_json())))
    assert again == cell
    assert again.key == cell.key
    changed = [
        replace(cell, mixed_slowdown=1.25),
        replace(cell, link="nvlink"),
        replace(cell, reference=cluster("paper")),
        replace(cell, warmup_share=0.2),
        replace(cell, share_of_capacity=0.8),
        replace(cell, cluster=cluster("paper").with_ratio(2, 2)),
        replace(cell, contender=replace(cell.contender, settings={"headroom": 0.5})),
        replace(cell, contender=replace(cell.contender, predictor="biased")),
        replace(cell, workload=replace(cell.workload, seed=8)),
        replace(cell, workload=replace(cell.workload, max_turns=5)),
    ]
    assert len({one.key for one in (cell, *changed)}) == 11
    with pytest.raises(LabError, match="no cell"):
        cell_from_json({"cluster": "paper"})


def test_rows_come_in_the_order_of_the_cells_from_several_processes(tmp_path: Path) -> None:
    wanted = cells(seeds=range(6), rates=(1.0, 2.0))
    told: list[dict] = []
    results = Results(tmp_path / "r.jsonl")
    done = run_cells(wanted, results=results, jobs=2, run=grid_runs.quick, on_done=told.append)
    assert [row["key"] for row in done.rows] == [cell.key for cell in wanted]
    assert [row["value"] for row in done.rows] == [s + 10 * r for s in range(6) for r in (1, 2)]
    assert os.getpid() not in {row["pid"] for row in done.rows}
    assert sorted(row["key"] for row in told) == sorted(cell.key for cell in wanted)
    assert read_results(tmp_path / "r.jsonl") == {row["key"]: row for row in done.rows}


def test_what_has_a_row_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run_cells(cells(seeds=range(2)), results=Results(path), jobs=1, run=grid_runs.quick)
    told: list[dict] = []
    done = run_cells(
        [*cells(seeds=range(3)), *cells(seeds=[2])],  # and equal cells run once
        results=Results(path, resume=True),
        jobs=1,
        run=grid_runs.quick,
        on_done=told.append,
    )
    assert [row["cell"]["workload"]["seed"] for row in told] == [2]
    assert len(done.rows) == 3
    assert len(path.read_text().splitlines()) == 3


def test_a_line_that_was_cut_is_run_again_and_the_file_mended(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run_cells(cells(seeds=range(3)), results=Results(path), jobs=1, run=grid_runs.quick)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert len(read_results(path)) == 2
    done = run_cells(
        cells(seeds=range(3)), results=Results(path, resume=True), jobs=1, run=grid_runs.quick
    )
    assert len(done.rows) == 3
    assert path.read_bytes() == whole


def test_a_file_is_not_overwritten_without_being_asked_to(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run_cells(cells(), results=Results(path), jobs=1, run=grid_runs.quick)
    with pytest.raises(LabError, match="--resume"):
        Results(path)


@pytest.mark.parametrize(
    ("line", "text"),
    [("nonsense", "line 2: this is no row"), ('{"key": "k", "format": 0}', "line 2: a row of for")],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, line: str, text: str) -> None:
    path = tmp_path / "r.jsonl"
    run_cells(cells(seeds=[0]), results=Results(path), jobs=1, run=grid_runs.quick)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(LabError, match=text):
        Results(path, resume=True)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path, jobs: int) -> None:
    path = tmp_path / "r.jsonl"
    wanted = cells(seeds=range(5))
    done = run_cells(wanted, results=Results(path), jobs=jobs, run=grid_runs.failing)
    assert [failed(row) for row in done.rows] == [False, True, True, True, False]
    said = [row["failure"] for row in done.failures]
    assert said[0] == {"error": "DeadlockError", "text": "p0 holds what d0 waits for"}
    assert said[1] == {"error": "ConservationError", "text": "tokens: 3 went in, 2 came out"}
    assert said[2]["error"] == "ZeroDivisionError"
    assert "grid_runs.py" in said[2]["text"]  # where the bug is
    assert [cell_from_json(row["cell"]) for row in done.failures] == wanted[1:4]
    # They are in the file; when the run is resumed they are tried again, and the new row counts.
    again = run_cells(wanted, results=Results(path, resume=True), jobs=1, run=grid_runs.quick)
    assert not again.failures
    assert len(path.read_text().splitlines()) == 8
    assert not any(failed(row) for row in read_results(path).values())


def test_a_process_that_is_killed_costs_no_row_that_was_done(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(LabError, match=r"--resume and fewer --jobs"):
        run_cells(cells(seeds=range(4)), results=Results(path), jobs=2, run=grid_runs.killed)
    for row in read_results(path).values():
        assert row["cell"]["workload"]["seed"] != 2
    done = run_cells(
        cells(seeds=range(4)), results=Results(path, resume=True), jobs=2, run=grid_runs.quick
    )
    assert len(done.rows) == 4


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_in_the_midst_keeps_what_is_done_and_leaves_no_process(
    tmp_path: Path, by: signal.Signals
) -> None:
    path = tmp_path / "r.jsonl"
    program = subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, str(HERE / "grid_main.py"), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with program:
        try:
            assert program.stdout is not None
            said = sorted(next(program.stdout) for _ in range(3))
            program.send_signal(by)
            # Its processes write to the same pipe: it ends when the last of them is gone.
            rest, _ = program.communicate(timeout=60)
        finally:
            program.kill()
    assert said == ["begun\n", "begun\n", "done\n"]
    assert rest == ("1 True\n" if by is signal.SIGINT else "")
    # What was done is there, and a later run goes on from it.
    assert [row["value"] for row in read_results(path).values()] == [10.0]
    done = run_cells(
        cells(seeds=range(4)), results=Results(path, resume=True), jobs=1, run=grid_runs.quick
    )
    assert [row["value"] for row in done.rows] == [10.0, 11.0, 12.0, 13.0]


def test_what_a_person_got_wrong_is_said_before_anything_runs() -> None:
    (cell,) = cells(seeds=[0])
    wrong: list[tuple[Cell, type[Exception], str]] = [
        (
            replace(cell, contender=Contender(label="x", policy="telepathy")),
            LabError,
            "policy 'telepathy' is unknown",
        ),
        (
            replace(cell, workload=replace(cell.workload, source="generated:nothing")),
            WorkloadError,
            "nothing",
        ),
        (replace(cell, link="string"), LabError, "string"),
        (
            replace(  # a pool of one has nothing to learn from
                cell,
                contender=contender("per_turn-realistic"),
                workload=replace(cell.workload, pool_size=1, split="test"),
            ),
            WorkloadError,
            "no conversation is left",
        ),
    ]
    for one, kind, text in wrong:
        with pytest.raises(kind, match=text):
            run_cells([cell, one], jobs=2, run=grid_runs.quick)
