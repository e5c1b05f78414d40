"""`conserve up --engine sglang` over the stand-in: the real supervisor, launchers and gateway."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conserve_serving.cli import run

STAND_IN = Path(__file__).with_name("stand_in")
PATIENCE_S = 60.0


def write_tiers(folder: Path, **does: str) -> Path:
    """A file without a word on what kind of engines they are; the command line says it."""
    path = folder / "cluster.toml"
    text = f'[handoff]\npath = "{folder}/kv"\nmax_bytes = 1000000\n'
    for gpu, role in ((2, "prefill"), (3, "decode")):
        env = f'{{PYTHONPATH = "{STAND_IN}", STAND_IN = "{does.get(role, "")}"}}'
        text += (
            f'[[tiers]]\nrole = "{role}"\nmodel = "/models/q"\nserved_model_name = "q"\n'
            f'gpus = [{gpu}]\npython = "{sys.executable}"\nenv = {env}\n'
        )
    path.write_text(text)
    return path


@contextmanager
def up(config: Path, run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "conserve_serving.cli", "up", "--engine", "sglang", "--port", "0"]
    argv += ["--announce", "--exit-with-parent", "--config", str(config), "--run-dir", str(run_dir)]
    with subprocess.Popen(  # noqa: S603 - our own module
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as reply:  # noqa: S310 - a loopback URL
        return json.load(reply)


def hear(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    heard = []
    for line in process.stderr:
        heard.append(line)
        if words in line:
            return
    raise AssertionError(f"never heard {words!r}: {''.join(heard)}")


def test_engines_are_started_restarted_and_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = tmp_path / "family"
    family.touch()
    config = write_tiers(tmp_path, decode=f"family={family}")
    with up(config, tmp_path / "run") as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline() or "null")
        assert ready is not None, process.stderr and process.stderr.read()
        cluster = get(f"{ready['url']}/conserve/v1/cluster")
        assert {e["id"]: e["state"] for e in cluster["engines"]} == {"p0": "ready", "d0": "ready"}

        urls = {e["id"]: e["url"] for e in get(f"{ready['url']}/conserve/v1/engines")["engines"]}
        told = get(f"{urls['d0']}/server_info")
        store = json.loads(told["hicache_storage_backend_extra_config"])
        assert store["role"] == "decode"
        assert store["ack_url"] == f"{ready['url']}/conserve/v1/handoffs"
        assert store["path"] == f"{tmp_path}/kv"
        assert told["env"]["CUDA_VISIBLE_DEVICES"] == "3"

        assert run(["doctor", "--url", ready["url"]]) == 0, capsys.readouterr().out
        told = capsys.readouterr().out
        assert "hands KV over (file, role prefill)" in told
        assert told.endswith("all is well\n")

        ids = [int(word) for word in family.read_text().split()]
        family.write_text("")
        os.kill(ids[-1], signal.SIGKILL)  # SGLang's first process
        hear(process, "d0 ended (a process of the engine was killed (SIGKILL)")
        hear(process, f"d0 is back on port {urls['d0'].rpartition(':')[2]}")

        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
    for pid in (*ids, *map(int, family.read_text().split())):
        assert not Path(f"/proc/{pid}").exists() or _is_zombie(pid)
    assert "loading weights" in (tmp_path / "run" / "d0.log").read_text()
    assert (tmp_path / "kv").is_dir(), "a folder that the file names is not ours to remove"


def test_first_failure_is_told_while_others_still_load(tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.write_text("sglang serve: error: unrecognized arguments: --frobnicate\n")
    config = write_tiers(tmp_path, prefill=f"say={words} exit=2", decode="mute")
    with up(config, tmp_path / "run") as process:
        assert process.wait(timeout=PATIENCE_S) == 1
        assert process.stderr is not None
        err = process.stderr.read()
    what, remedy = err.splitlines()[-2:]
    assert what == "error: p0: SGLang does not know the flag --frobnicate"
    assert remedy.startswith("  fix: correct it in tiers.flags")
    assert "p0.log" in remedy


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
