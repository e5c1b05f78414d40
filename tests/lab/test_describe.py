"""What a workload looks like: every figure against one worked out by hand, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conserve_serving.cli import run
from conserve_serving.cli.workload import rendered
from conserve_serving.lab.describe import DEFINITIONS, describe
from conserve_serving.lab.pool import Pool
from conserve_serving.lab.workloads import WorkloadSpec
from conserve_serving.replay.generator import recipes


def row(conversation: str, turn: int, tokens: int, new: int, answer: int, **more: object) -> str:
    counts = {"input_tokens": tokens, "new_input_tokens": new, "output_tokens": answer}
    return json.dumps({"conversation_id": conversation, "turn": turn, **counts, **more}) + "\n"


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Two sessions that begin alike, one of them with a sub-agent, a large append and a reset."""
    shared = {"shared_prefix_tokens": 800, "model": "m"}
    lines = [
        row("a", 0, 1000, 1000, 100, arrival_s=10.0, t_s=0.0, **shared),
        row("a", 1, 6100, 5000, 100, gap_s=2.0, t_s=9.0),  # a large append
        row("a", 2, 6300, 100, 200, gap_s=4.0, t_s=30.0),  # 6,200 kept: all of it
        row("a", 3, 6400, 3400, 50, gap_s=30.0, t_s=90.0),  # 3,000 of 6,500 kept: a reset
        row("a", 4, 6400, 400, 50, gap_s=0.0, t_s=99.0),  # 6,000 of 6,450 kept: trimmed
        row("a/agent", 0, 500, 500, 20, t_s=31.0),
        row("b", 0, 2000, 2000, 300, arrival_s=20.0, **shared),
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture
def figures(trace: str) -> dict[str, Any]:
    return describe(Pool.load(WorkloadSpec(source=trace)))


def test_counts_and_distributions(figures: dict[str, Any]) -> None:
    assert (figures["conversations"], figures["turns"]) == (3, 7)
    assert figures["turns_per_conversation"]["max"] == 5
    assert figures["first_input_tokens"]["mean"] == pytest.approx(3500 / 3)
    assert figures["appended_tokens"]["n"] == 4
    assert figures["appended_tokens"]["max"] == 5000
    assert figures["output_tokens"]["p50"] == 100
    assert figures["context_tokens"]["max"] == 6450
    assert figures["gap_s"]["mean"] == 9.0
    assert figures["gap_s_per_conversation"]["max"] == 36.0
    assert {turn: v["n"] for turn, v in figures["context_by_turn"].items()} == {
        "1": 3,
        "2": 1,
        "5": 1,
    }
    assert figures["context_by_turn"]["2"]["p50"] == 6200


def test_shares_of_uncached_prefill(figures: dict[str, Any]) -> None:
    tail = 5000 + 100 + 3400 + 400
    assert figures["first_turn_share"] == pytest.approx(3500 / (3500 + tail))
    assert figures["first_turn_share_warm"] == pytest.approx(1900 / (1900 + tail))
    assert figures["large_appends"] == {
        "threshold_tokens": 4096,
        "turns": 1,
        "tokens": 5000,
        "share_of_tail_turns": 0.25,
        "share_of_tail_tokens": pytest.approx(5000 / tail),
    }
    assert figures["work_tokens"]["prefill"]["max"] == 1000 + tail
    assert figures["work_tokens"]["output"]["max"] == 500
    assert figures["work_tokens"]["total"]["max"] == 1000 + tail + 500
    served = 1000 + 6100 + 6300 + 6400 + 6400 + 500
    assert figures["served_tokens"]["max"] == served


def test_resets_sharing_and_sub_agents(figures: dict[str, Any]) -> None:
    resets = figures["resets"]
    assert (resets["turns"], resets["conversations"], resets["trimmed_turns"]) == (1, 1, 1)
    assert resets["kept_share"]["p50"] == pytest.approx(3000 / 6500)
    assert resets["context_before_tokens"]["p50"] == 6500
    assert figures["shared_prefixes"]["conversations_sharing"] == 2
    assert figures["shared_prefixes"]["prefixes_of_several"] == 1
    assert figures["sub_agents"] == {"conversations": 1, "parents": 1}
    assert figures["recorded_arrivals"] == {"span_s": 10.0, "rate_per_s": pytest.approx(0.1)}


def test_caps_are_told(trace: str) -> None:
    spec = WorkloadSpec(source=trace, until_reset=True, max_turns=2, max_gap_s=1.0)
    caps = describe(Pool.load(spec))["caps"]
    assert caps["turns_after_reset_cut"] == 2
    assert caps["cut_by_max_turns"] == 1
    assert caps["gaps_shortened"] == 1
    assert caps["sub_agents_left_out"] == 1  # it is called at the third turn


def test_every_definition_is_of_a_figure(figures: dict[str, Any]) -> None:
    known = {*figures, *figures["resets"]}
    assert set(DEFINITIONS) <= known


def test_first_turns_alone_have_no_tail_shares(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(row("a", 0, 100, 100, 5))
    figures = describe(Pool.load(WorkloadSpec(source=str(path))))
    assert figures["first_turn_share"] == 1.0
    assert figures["large_appends"]["share_of_tail_turns"] is None
    assert figures["appended_tokens"]["mean"] is None
    assert figures["recorded_arrivals"] is None
    assert "–" in shown(figures)


def shown(figures: dict[str, Any], width: int = 80) -> str:
    console = Console(width=width, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(rendered(figures))
    return capture.get()


def test_the_command_shows_what_a_person_wants_to_know(
    trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["workload", "describe", trace]) == 0
    out = capsys.readouterr().out
    assert out.startswith("trace.jsonl: 3 conversations (1 sub-agents), 7 turns\n")
    for text in (
        "25% of tail turns append more than 4,096 tokens",
        "1 (25% of tail turns) in 1 conversations",
        "of a context of 6.5k 46% is kept",
        "2 conversations begin as another does, with 1 prefixes",
        "recorded over 10s, 0.1 per second",
    ):
        assert text in " ".join(out.split()), text


@pytest.mark.parametrize("name", sorted(recipes()))
def test_nothing_is_cut_off_at_80_columns(name: str) -> None:
    pool = Pool.load(WorkloadSpec(source=f"generated:{name}", pool_size=100))
    text = shown(describe(pool))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_command_takes_caps_and_prints_json(
    trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-turns", "2", "--max-gap", "1", "--answers", "recorded", "--split", "all"]
    assert run(["workload", "describe", trace, *options, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["turns"] == 3  # the sub-agent is called at the third
    assert data["spec"]["max_turns"] == 2
    assert WorkloadSpec(**data["spec"]).max_gap_s == 1.0


def test_the_command_lists_what_can_be_generated(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["workload", "list"]) == 0
    out = capsys.readouterr().out
    for name in recipes():
        assert f"generated:{name}" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.jsonl"], "none.jsonl: cannot be read"),
        (["generated:nope"], "There are: coding-agent"),
        (["generated:swebench", "--max-turns", "0"], "0 is not in the range"),
        (["generated:swebench", "--max-context", "10"], "no conversation is left"),
    ],
)
def test_what_cannot_be_described_is_said(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["workload", "describe", *arguments]) == 2
    assert says in capsys.readouterr().err
