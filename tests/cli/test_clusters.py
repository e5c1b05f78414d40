"""`conserve clusters`: what there is, what it costs, what it can carry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conserve_serving.cli import run
from conserve_serving.lab.boards import list_links
from conserve_serving.lab.capacity import cluster_capacity
from conserve_serving.lab.clusters import cluster, list_clusters
from conserve_serving.lab.workloads import WorkloadSpec


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_clusters_and_links_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["clusters"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(maxsplit=1)[0] for line in lines if line]
    assert [name for name in [*list_clusters(), *list_links()] if name not in names] == []
    paper = next(line for line in lines if line.startswith("h100-3a100 "))
    assert paper.split()[-3:] == ["4", "8.26", "1,900"]


def test_one_cluster_and_what_it_can_carry(capsys: pytest.CaptureFixture[str]) -> None:
    trace = ["--trace", "generated:swebench", "--pool", "50", "--max-turns", "5"]
    assert run(["clusters", "h100-3a100", *trace, "--interference", "1.25"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"decode +3 × a100-qwen3-8b +376k +2\.8× +1\.7× +3\.7×", said)
    assert "8.26 USD/h (6.86 to 17.17), 1,900 W rated, 2,200 W with hosts" in said
    assert "NVIDIA A100 SXM 80 GB: 1.59 USD/h, 2026-09-25, RunPod" in said
    carried = dict(
        re.findall(r"^(dedicated tiers|hosting everywhere) +([\d.]+)", said, re.MULTILINE)
    )
    dedicated, hosting = (
        float(carried[name]) for name in ("dedicated tiers", "hosting everywhere")
    )
    assert 0.5 < dedicated < hosting < 3
    assert "limited by decode; better, by this sum: hosting everywhere" in said
    assert run(["clusters", "h100-3a100", *trace, "--link", "tcp_25g"]) == 0
    assert "limited by link" in capsys.readouterr().out


def test_what_little_can_be_carried_keeps_three_digits(capsys: pytest.CaptureFixture[str]) -> None:
    trace = ["--trace", "generated:coding-agent", "--pool", "100"]
    assert run(["clusters", "h100-3a100", *trace]) == 0
    lines = capsys.readouterr().out.partition("can carry, conversations/s")[2].splitlines()[1:7]
    found = cluster_capacity(
        cluster("h100-3a100"), WorkloadSpec(source="generated:coding-agent", pool_size=100)
    )
    assert found.dedicated_per_s < found.hosting_per_s < 0.05  # of which two decimals say little
    assert [float(line.split()[-1]) for line in lines] == [
        float(f"{value:.3g}")
        for value in (
            found.dedicated_per_s,
            found.prefill_per_s,
            found.decode_per_s,
            found.link_per_s,
            found.valve_per_s,
            found.hosting_per_s,
        )
    ]


def test_what_nothing_limits_is_said_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "one.jsonl"
    trace.write_text(
        '{"conversation_id": "a", "turn": 0, "input_tokens": 100, "output_tokens": 1}\n'
    )
    assert run(["clusters", "h100-3a100", "--trace", str(trace)]) == 0
    assert re.search(r"later prompts and decode.* no limit\n", capsys.readouterr().out)


def test_clusters_of_ones_own_come_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[clusters.mine]\ntitle = "two"\nusd_per_hour = { "NVIDIA L40S 48 GB" = 0.5 }\n'
        'groups = [{ count = 2, tier = "decode", profile = "l40s-qwen3-8b" }]\n'
    )
    assert run(["clusters", "--clusters-file", str(path)]) == 0
    first = capsys.readouterr().out.splitlines()[1]
    assert first.split() == ["mine", "two", "2", "1.00", "700"]
    assert run(["clusters", "mine", "--clusters-file", str(path)]) == 0
    assert "0.50 USD/h, your own figure" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "no cluster 'nope': choose one of paper,"),
        (["paper", "--trace", "generated:nope"], "no workload 'nope'"),
        (["paper", "--trace", "generated:swebench", "--link", "rope"], "no link 'rope'"),
        (["paper", "--interference", "0"], "--interference"),
    ],
)
def test_what_cannot_be_used_is_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(["clusters", *arguments]) == 2
    assert said in capsys.readouterr().err
