"""`conserve up` with real engines: started, used, looked at, killed, restarted, drained, gone."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.sglang

CONSERVE = [sys.executable, "-m", "conserve_serving.cli"]
WAIT_S = 420.0


@pytest.fixture
def config(sglang_testbed: Any, tmp_path: Path) -> Path:
    """One prefiller and one decoder as in docs/deploy, and what makes them run on a CPU."""
    bed = sglang_testbed
    engine = bed.prefiller
    flags = [*engine_flags(engine.command), "--max-running-requests", "16"]
    environment = {
        name: engine.environment[name]
        for name in ("PYTHONPATH", "SGLANG_USE_CPU_ENGINE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
    }
    environment["TORCH_EXTENSIONS_DIR"] = engine.environment["TORCH_EXTENSIONS_DIR"]
    text = "[scheduler]\nhandoff_min_tokens = 64\nhandoff_floor_tokens = 64\n"
    text += "[handoff]\nprefetch_threshold_tokens = 16\n"
    for role in ("prefill", "decode"):
        text += (
            f'[[tiers]]\nrole = "{role}"\nengine = "sglang"\nmodel = {json.dumps(str(bed.model))}\n'
        )
        text += f'served_model_name = "tiny"\npage_tokens = {bed.page_tokens}\n'
        text += f"kv_capacity_tokens = 20000\npython = {json.dumps(engine.command[0])}\n"
        text += f"flags = {json.dumps(flags)}\n"
        pairs = ", ".join(f"{name} = {json.dumps(value)}" for name, value in environment.items())
        text += f"env = {{ {pairs} }}\n"
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    return path


def engine_flags(command: list[str]) -> list[str]:
    """The test bed's flags for a CPU, out of one of its commands."""
    start = command.index("--device")
    end = command.index("--max-running-requests")
    return list(command[start:end])


@pytest.fixture
def cluster(config: Path, tmp_path: Path) -> Iterator[tuple[Any, str, Path]]:
    """`conserve up`, ready. Gives the process, the gateway's URL and the run folder."""
    run = tmp_path / "run"
    command = [*CONSERVE, "up", "--engine", "sglang", "--config", str(config), "--port", "0"]
    command += ["--announce", "--exit-with-parent", "--run-dir", str(run)]
    with (
        (tmp_path / "up.log").open("wb") as log,
        subprocess.Popen(  # noqa: S603 -- our own command
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as up,
    ):
        assert up.stdout is not None
        line = up.stdout.readline()
        assert line, (tmp_path / "up.log").read_text()
        try:
            yield up, json.loads(line)["url"], run
        finally:
            assert up.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                up.stdin.close()
            up.wait(120)


def ask(url: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 0, timeout=120)
    sent = {"Content-Type": "application/json", **headers}
    data = None if body is None else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, data, sent)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    named = {name.lower(): value for name, value in response.getheaders()}
    return response.status, named, json.loads(text)


def complete(url: str, prompt: list[int], tokens: int) -> tuple[dict[str, str], list[int]]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    status, headers, answer = ask(
        url, "/v1/completions", body, **{"X-ConServe-Conversation-ID": "c"}
    )
    assert status == 200, answer
    ids: list[int] = answer["choices"][0]["token_ids"]
    return headers, ids


def states(url: str) -> dict[str, str]:
    return {
        engine["id"]: engine["state"] for engine in ask(url, "/conserve/v1/cluster")[2]["engines"]
    }


def test_a_cluster_from_start_to_end(
    cluster: tuple[Any, str, Path], config: Path, random_ids: Any
) -> None:
    up, url, run = cluster
    assert states(url) == {"p0": "ready", "d0": "ready"}
    prompt = random_ids(500)
    headers, first = complete(url, prompt, 8)
    assert headers["x-conserve-prefill-engine"] == "p0"
    assert headers["x-conserve-decode-engine"] == "d0"
    assert headers["x-conserve-transfers"] == "1"

    doctor = subprocess.run(  # noqa: S603 -- our own command
        [*CONSERVE, "doctor", "--url", url], capture_output=True, text=True, check=False
    )
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr

    # A decoder that dies is started again, and its conversation goes on with the same text.
    context = [*prompt, *first, *random_ids(40)]
    _, expected = complete(url, context, 8)
    before = ask(url, "/conserve/v1/cluster")[2]
    (decoder,) = [engine for engine in before["engines"] if engine["id"] == "d0"]
    os.kill(listener(decoder["url"]), signal.SIGKILL)
    until = time.monotonic() + WAIT_S
    while True:
        (now,) = [e for e in ask(url, "/conserve/v1/cluster")[2]["engines"] if e["id"] == "d0"]
        if now["state"] == "ready" and now["epoch"] > decoder["epoch"]:
            break
        assert time.monotonic() < until, "d0 did not come back"
        time.sleep(0.5)
    headers, again = complete(url, context, 8)
    assert again == expected
    assert headers["x-conserve-decode-engine"] == "d0"

    assert up.stdin is not None
    up.stdin.close()
    assert up.wait(120) == 0
    assert (run / "p0.log").stat().st_size > 0
    with pytest.raises(OSError, match="refused"):
        ask(url, "/health")


def listener(url: str) -> int:
    """The process that listens at a URL's port."""
    port = urllib.parse.urlsplit(url).port
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and int(fields[1].split(":")[1], 16) == port:
            inodes.add(f"socket:[{fields[9]}]")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                for handle in (entry / "fd").iterdir():
                    if str(handle.readlink()) in inodes:
                        return int(entry.name)
    raise AssertionError(f"nobody listens at {url}")
