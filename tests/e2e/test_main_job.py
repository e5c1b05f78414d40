"""The product's main job with real processes: a cluster, a replay, and what the report says."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ONE_PLUS_THREE = """
[[tiers]]
role = "prefill"
count = 1
[[tiers]]
role = "decode"
count = 3
"""
SPEED = 6
CONSERVE = [sys.executable, "-m", "conserve_serving.cli"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """One prefiller and three decoders behind a gateway, each a process. Gives the URL."""
    config = tmp_path / "cluster.toml"
    config.write_text(ONE_PLUS_THREE)
    command = [*CONSERVE, "up", "--config", str(config), "--port", "0", "--speed", str(SPEED)]
    command += ["--announce", "--exit-with-parent", "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(  # noqa: S603 -- our own command
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as up:
        assert up.stdout is not None
        assert up.stdin is not None
        yield json.loads(up.stdout.readline())["url"]
        up.stdin.close()
        assert up.wait(60) == 0


def replay(url: str, out: Path, *args: str) -> subprocess.Popen[str]:
    command = [*CONSERVE, "replay", "generated:swebench", "--gateway", url, "--no-progress"]
    command += ["--conversations", "60", "--max-turns", "5", "--rate", "0.8", *args]
    command += ["--json", str(out / "figures.json"), "--html", str(out / "report.html")]
    return subprocess.Popen(  # noqa: S603 -- our own command
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def figures(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "figures.json").read_text())
    return loaded


def ask(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as reply:  # noqa: S310 -- loopback
        return json.load(reply)


def test_every_conversation_moves_once_and_stays(cluster: str, tmp_path: Path) -> None:
    run = replay(cluster, tmp_path)
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 0, printed
    found = figures(tmp_path)
    assert found["conversations"] == 60
    assert found["errors"] == {}
    short = ask(f"{cluster}/conserve/v1/cluster")["counters"]["placements_by_reason"].get(
        "first_turn_short", 0
    )
    transfers = found["transfers_per_conversation"]
    assert transfers["max"] == 1
    assert transfers["by_reason"] == {"first_turn": 60 - short}
    assert found["tail_turns_on_pinned_decoder"] == 1.0
    assert found["cached_token_shortfall"] == 0
    assert found["energy_source"].startswith("modelled")
    for name in ("ttfet_s", "first_turn_ttft_s", "last_turn_tbt_s", "e2e_s"):
        assert 0 < found[name]["p50"] <= found[name]["p95"]
        assert found[f"{name}_normalized"]["p50"] > 0
    assert "<svg" in (tmp_path / "report.html").read_text()
    engines = ask(f"{cluster}/conserve/v1/cluster")["engines"]
    assert {e["kv_held_tokens"] + e["parked_tokens"] for e in engines} == {0}


def test_a_killed_decoder_loses_no_conversation(cluster: str, tmp_path: Path) -> None:
    run = replay(cluster, tmp_path)
    victim = None
    while victim is None and run.poll() is None:  # until a decoder is in the middle of tails
        tails = Counter(
            c["decode_engine"]
            for c in ask(f"{cluster}/conserve/v1/conversations")["conversations"]
            if c["state"] != "ended" and 2 <= c["turns"] <= 4
        )
        for engine in ask(f"{cluster}/conserve/v1/cluster")["engines"]:
            if tails[engine["id"]] >= 2 and engine["running"]:
                victim = engine["id"]
    assert victim is not None
    kill_engine(victim, tmp_path)
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 0, printed
    found = figures(tmp_path)
    assert found["conversations"] == 60
    assert found["errors"] == {}
    counters = ask(f"{cluster}/conserve/v1/cluster")["counters"]
    assert counters["moves_by_reason"].get("engine_lost", 0) >= 1
    moved = found["transfers_per_conversation"]["by_reason"]
    assert moved["first_turn"] + counters["placements_by_reason"].get("first_turn_short", 0) >= 60
    assert set(moved) <= {"first_turn", "engine_lost", "retry"}
    assert found["tail_turns_on_pinned_decoder"] < 1.0


def kill_engine(engine: str, run_dir: Path) -> None:
    """Kill -9 the process of this cluster that runs ``engine``."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if b"--engine-id" not in words or str(run_dir).encode() not in b" ".join(words):
                continue
            if words[words.index(b"--engine-id") + 1] == engine.encode():
                os.kill(int(entry.name), signal.SIGKILL)
                return
    raise AssertionError(f"no process of engine {engine}")


def test_the_demo_runs_as_the_readme_says(tmp_path: Path) -> None:
    command = [*CONSERVE, "demo", "--out", str(tmp_path)]
    run = subprocess.run(  # noqa: S603 -- our own command
        command, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "KV transfers per conversation" in run.stdout
    assert list(tmp_path.glob("*.html"))
