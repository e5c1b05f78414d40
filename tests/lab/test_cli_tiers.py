"""`conserve tiers` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conserve_serving.cli import run
from conserve_serving.cli.tiers import tiers as command
from conserve_serving.lab.cell import Cell, run_cell
from conserve_serving.lab.grid import Row, failed, read_results
from conserve_serving.simulator.errors import DeadlockError

SMALL = ["--trace", "generated:swebench", "--pool", "20", "--max-turns", "2"]
SMALL += ["--conversations", "20", "--seeds", "2", "--clusters", "h100-3a100,2h100"]
SMALL += ["--policies", "conserve,collocated_speed", "--tolerance", "0.5", "--loads", "0.8"]
SMALL += ["--jobs", "1", "--no-progress"]


def paths(folder: Path) -> list[str]:
    return [
        *("--rows", str(folder / "rows.jsonl"), "--html", str(folder / "page.html")),
        *("--markdown", str(folder / "page.md"), "--json", str(folder / "figures.json")),
    ]


def test_two_small_clusters_are_judged_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tiers", *SMALL, *paths(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "h100-3a100: conserve" in said or "h100-3a100: Nobody" in said
    assert "By arithmetic dedicated tiers carry" in said
    assert "Intervals are over 2 paired seeds" in said

    data = json.loads((tmp_path / "figures.json").read_text())
    assert [site["cluster"] for site in data["sites"]] == ["h100-3a100", "2h100"]
    assert data["searches_without_answer"] == []
    for site in data["sites"]:
        assert set(site["goodput_per_s"]) == {"conserve", "collocated_speed"}
        for found in site["goodput_per_s"].values():
            assert found["Gany"]["value"] <= found["Gf"]["value"]
    rows = read_results(tmp_path / "rows.jsonl")
    cells = [row["cell"] for row in rows.values()]
    assert {cell["reference"]["name"] for cell in cells} == {"1-h100-qwen3-8b"}
    assert {cell["mixed_slowdown"] for cell in cells} == {1.25}
    page, markdown = ((tmp_path / name).read_text() for name in ("page.html", "page.md"))
    for text in (page, markdown):
        assert "Where conversation-level placement wins, ties or loses" in text
        assert "What each part can carry" in text
    assert data["sites"][0]["verdict"] in markdown.replace("\\", "")

    lines = (tmp_path / "rows.jsonl").read_text()
    assert run(["tiers", *SMALL, *paths(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(["tiers", *SMALL, *paths(tmp_path), "--resume"]) == 0
    assert capsys.readouterr().out == said
    assert (tmp_path / "rows.jsonl").read_text() == lines


def test_a_failed_run_is_told_and_the_rest_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails_for_conserve_under_seed_1(cell: Cell) -> Row:
        if cell.workload.seed == 1 and cell.contender.label == "conserve":
            raise DeadlockError("p0 holds [1]")
        return run_cell(cell)

    argv = [*SMALL, *paths(tmp_path), "--clusters", "2h100"]
    with pytest.raises(SystemExit) as ended:
        command.main(argv, obj=fails_for_conserve_under_seed_1, standalone_mode=False)
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert "DeadlockError: p0 holds [1]" in told.err
    assert "2h100" in told.out
    data = json.loads((tmp_path / "figures.json").read_text())
    assert any("conserve on 2h100" in one for one in data["searches_without_answer"])
    assert any(failed(row) for row in read_results(tmp_path / "rows.jsonl").values())


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--resume"], "--resume needs --rows"),
        (["--html", "/no/such/folder/page.html"], "Make it first"),
        (["--max-turns", "5"], "max_turns: caps are for --trace"),
        (["--trace", "generated:swebench", "--workloads", "swebench"], "contradict each other"),
        (["--clusters", "moon"], "moon"),
        (["--clusters", "32b-4h100"], "Give clusters of one model"),
        (["--policies", "nobody"], "no contender 'nobody'"),
        (["--workloads", "nothing"], "nothing"),
        (["--tolerance", "1"], "--tolerance"),
    ],
)
def test_what_cannot_be_done_says_what_to_change(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tiers", *argv, "--no-progress"]) == 2
    assert text in " ".join(capsys.readouterr().err.split())
