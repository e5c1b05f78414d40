"""`conserve simulate` and `conserve compare` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conserve_serving.cli import run
from conserve_serving.cli.compare import compare as compare_command
from conserve_serving.lab.cell import Cell, run_cell
from conserve_serving.lab.grid import Row, failed, read_results
from conserve_serving.simulator.errors import DeadlockError

SMALL = ["--conversations", "30", "--pool", "30", "--max-turns", "3", "--no-progress"]


def test_simulate_prints_figures_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "row.json"
    assert run(["simulate", "--policy", "conserve", *SMALL, "--json", str(path)]) == 0
    said = capsys.readouterr().out
    row = json.loads(path.read_text())
    assert row["cell"]["contender"]["label"] == "conserve"
    assert row["cell"]["mixed_slowdown"] == 1.0
    assert "conserve on paper: generated:swebench, 30 conversations" in said
    for title in ("TTFET", "first-turn TTFT", "last-turn TBT", "tokens per joule", "p0", "prefill"):
        assert title in said
    assert f"{row['latency']['ttfet_s_normalized']['p95']:.2f}" in said


def test_simulate_takes_every_part_of_a_cell(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    argv = ["simulate", "--policy", "per_turn-perfect:biased", "--cluster", "h100-3a100"]
    argv += ["--rate", "0.5", "--seed", "4", "--interference", "0.25", "--link", "nvlink"]
    argv += ["--reference", "4a100", "--warmup", "0.2", "--arrivals", "bursty", "--split", "test"]
    assert run([*argv, *SMALL, "--json", str(path)]) == 0
    cell = json.loads(path.read_text())["cell"]
    assert cell["contender"]["predictor"] == "biased"
    assert cell["cluster"]["name"] == "h100-3a100"
    assert cell["reference"]["name"] == "4a100"
    assert (cell["mixed_slowdown"], cell["link"], cell["warmup_share"]) == (1.25, "nvlink", 0.2)
    workload = cell["workload"]
    assert (workload["rate_per_s"], workload["seed"], workload["split"]) == (0.5, 4, "test")
    assert (workload["arrivals"], workload["max_turns"]) == ("bursty", 3)


def test_simulate_on_a_cluster_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[clusters.mine]\ntitle = "two"\n'
        'groups = [{ count = 1, tier = "prefill", profile = "a40-qwen3-0.6b" },'
        ' { count = 1, tier = "decode", profile = "a40-qwen3-0.6b" }]\n'
    )
    argv = ["simulate", "--clusters-file", str(file), *SMALL]
    assert run([*argv, "--cluster", "mine"]) == 0
    assert "conserve on mine" in capsys.readouterr().out
    assert run([*argv, "--cluster", "theirs"]) == 2
    assert "mine.toml has mine; the package has paper" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["simulate", "--policy", "nobody"], "no contender 'nobody'. There are: conserve"),
        (["simulate", "--cluster", "moon"], "moon"),
        (["simulate", "--link", "string"], "string"),
        (["simulate", "--trace", "generated:nothing"], "nothing"),
        (["simulate", "--trace", "/no/such/file.jsonl"], "/no/such/file.jsonl"),
        (["simulate", "--rate", "0"], "--rate"),
        (["simulate", "--arrivals", "recorded"], "'recorded'"),
        (["simulate", "--json", "/no/such/folder/x.json"], "Make it first"),
        (["compare", "--rates", "1,x"], "'x' is not a valid float"),
        (["compare", "--rates", ","], "give at least one"),
        (["compare", "--policies", "conserve,nobody"], "no contender 'nobody'"),
        (["compare", "--baseline", "oracle"], "none of the --policies"),
        (["compare", "--resume"], "--resume needs --out"),
        (["compare", "--out", "/no/such/folder/r.jsonl"], "Make it first"),
        (["compare", "--seeds", "0"], "--seeds"),
    ],
)
def test_what_cannot_be_done_says_what_to_change(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*argv, "--no-progress"]) == 2
    assert text in " ".join(capsys.readouterr().err.split())


def compare(*argv: str) -> int:
    return run(["compare", "--policies", "collocated,conserve", *SMALL, "--seeds", "2", *argv])


def test_compare_prints_a_table_for_each_load_with_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.jsonl"
    argv = ["--rates", "0.5,1", "--baseline", "collocated", "--interference", "0,0.5"]
    assert compare(*argv, "--out", str(out), "--jobs", "2") == 0
    said = capsys.readouterr().out
    for title in ("interference +0 %, 0.5 conv", "interference +50 %, 1 conv", "2 seeds"):
        assert title in said
    assert said.count("collocated") == 4
    assert "no claim about steady state" in said
    rows = list(read_results(out).values())
    assert len(rows) == 2 * 2 * 2 * 2
    # The mean that is printed is that of the file, and the change is against the baseline.
    at = {
        (row["cell"]["contender"]["label"], row["cell"]["workload"]["seed"]): row
        for row in rows
        if row["cell"]["workload"]["rate_per_s"] == 1 and row["cell"]["mixed_slowdown"] == 1
    }
    ours, theirs = (
        [at[label, seed]["latency"]["ttfet_s_normalized"]["p95"] for seed in (0, 1)]
        for label in ("conserve", "collocated")
    )
    assert f"{sum(ours) / 2:.2f} [" in said
    assert f"{100 * (sum(ours) / sum(theirs) - 1):+.1f} % [" in said or (
        f"{100 * (sum(ours) / sum(theirs) - 1):+.0f} % [" in said
    )


def test_compare_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.jsonl"
    assert compare("--rates", "1", "--out", str(out), "--jobs", "1") == 0
    first = capsys.readouterr().out
    assert compare("--rates", "1", "--out", str(out)) == 2
    assert "--resume" in capsys.readouterr().err
    lines = out.read_text()
    assert compare("--rates", "1", "--out", str(out), "--resume") == 0
    assert capsys.readouterr().out == first
    assert out.read_text() == lines
    stale = [json.loads(line) | {"code": "older"} for line in lines.splitlines()]
    out.write_text("".join(json.dumps(row) + "\n" for row in stale))
    assert compare("--rates", "1", "--out", str(out), "--resume") == 0
    assert "4 of 4 rows" in capsys.readouterr().err


def test_compare_tells_failures_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails_under_seed_1(cell: Cell) -> Row:
        if cell.workload.seed == 1:
            raise DeadlockError("p0 holds [1]")
        return run_cell(cell)

    out = tmp_path / "r.jsonl"
    argv = ["--policies", "collocated,conserve", *SMALL, "--seeds", "2", "--jobs", "1"]
    with pytest.raises(SystemExit) as ended:
        compare_command.main(
            [*argv, "--out", str(out)], obj=fails_under_seed_1, standalone_mode=False
        )
    assert ended.value.code == 1
    told = capsys.readouterr()
    said = " ".join(told.err.split())
    assert "failed: conserve on paper at 1/s, seed 1: DeadlockError: p0 holds [1]" in said
    assert "(1 seed)" in told.out
    assert sum(failed(row) for row in read_results(out).values()) == 2


@pytest.mark.slow
def test_compare_searches_goodput_and_capacity_and_loads_relative_to_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--conversations", "120", "--goodput", "ttfet,capacity", "--rates-of-capacity", "0.6"]
    assert compare(*argv, "--jobs", "2") == 0
    said = capsys.readouterr().out
    assert "goodput: at most 5 % miss the TTFET SLO" in said
    assert "capacity: completed under overload" in said
    assert "60 % of each one's capacity" in said


def test_arrivals_as_recorded_are_compared_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --rates they were stretched to one a second; a row of `simulate` was no row."""
    trace = tmp_path / "shop.jsonl"
    lines = [
        {
            "conversation_id": f"c{number}",
            "turn": turn,
            "gap_s": 0.5 if turn else 0.0,
            "arrival_s": 3.0 * number,
            "input_tokens": 900 + 200 * turn,
            "new_input_tokens": 900 if not turn else 200,
            "output_tokens": 60,
        }
        for number in range(6)
        for turn in range(2)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, row = tmp_path / "rows.jsonl", tmp_path / "row.json"
    asked = ["--trace", str(trace), "--arrivals", "recorded", "--conversations", "6"]
    asked += ["--no-progress"]
    argv = ["compare", "--policies", "collocated,conserve", "--seeds", "1", *asked]
    assert run([*argv, "--out", str(rows), "--jobs", "1"]) == 0
    assert "paper, interference +0 %, recorded arrivals (1 seed)" in capsys.readouterr().out
    found = list(read_results(rows).values())
    assert [one["cell"]["workload"]["rate_per_s"] for one in found] == [None, None]
    assert found[0]["virtual_s"] > 15.0

    assert run(["simulate", "--policy", "oracle", *asked, "--json", str(row)]) == 0
    assert [one["cell"]["contender"]["label"] for one in read_results(row).values()] == ["oracle"]
    # It is read, and nothing is appended to it: a line after it would make it unreadable.
    whole = row.read_bytes()
    assert run([*argv, "--out", str(row), "--resume", "--jobs", "1"]) != 0
    assert "this is no row" in capsys.readouterr().err
    assert row.read_bytes() == whole
    page = tmp_path / "page.html"
    assert run(["report", str(rows), str(row), "--html", str(page)]) == 0
    assert "at recorded arrivals" in page.read_text("utf-8")
