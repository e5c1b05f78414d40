"""`conserve up` as a person or a script calls it: real engines, the real gateway."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conserve_serving.cli import run

PATIENCE_S = 60.0


@contextmanager
def up(run_dir: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`conserve up` for a script, ready; its process and its announcement."""
    argv = [sys.executable, "-m", "conserve_serving.cli", "up", "--announce", "--port", "0"]
    argv += ["--exit-with-parent", "--speed", "50", "--run-dir", str(run_dir), *options]
    with subprocess.Popen(  # noqa: S603 - our own module
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            ready = process.stdout.readline()
            assert ready, process.stderr.read()
            yield process, json.loads(ready)
        finally:
            process.kill()


def chat(url: str, conversation: str) -> dict[str, str]:
    """One turn; the response's headers, in lower case."""
    body = {
        "model": "Qwen/Qwen3-0.6B",
        "max_tokens": 8,
        "messages": [{"role": "user", "content": "Where does the time go? " * 400}],
    }
    request = urllib.request.Request(  # noqa: S310 - a loopback URL
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={
            "Content-Type": "application/json",
            "X-ConServe-Conversation-ID": conversation,
            "Authorization": "Bearer someone",
        },
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:  # noqa: S310 - same
        return {name.lower(): value for name, value in response.headers.items()}


def test_up_serves_explains_itself_and_drains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with up(tmp_path) as (process, ready):
        assert ready["ready"] is True
        assert ready["url"] == f"http://127.0.0.1:{ready['port']}"
        assert Path(ready["run_dir"]) == tmp_path

        headers = chat(ready["url"], "chat-1")
        assert headers["x-conserve-prefill-engine"] == "p0"
        decoder = headers["x-conserve-decode-engine"]
        assert decoder in {"d0", "d1"}

        argv = ["explain", "chat-1", "--gateway", ready["url"], "--api-key", "someone"]
        assert run(argv) == 0
        told = capsys.readouterr().out
        assert f"conversation chat-1: open, 1 turn, lives on {decoder}" in told
        assert "KV was handed over" in told
        assert f"prefilled on p0, decoded on {decoder}" in told

        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
        assert "drained and stopped" in err
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", ready["port"]), timeout=1.0)
    for name in ("p0", "d0", "d1", "gateway"):
        assert (tmp_path / f"{name}.log").exists()
    assert not (tmp_path / "store").exists()


def test_up_ends_with_the_script_that_started_it(tmp_path: Path) -> None:
    with up(tmp_path) as (process, ready):
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=PATIENCE_S) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", ready["port"]), timeout=1.0)


def test_nothing_outlives_a_killed_up(tmp_path: Path) -> None:
    with up(tmp_path) as (process, ready):
        urls = re.findall(r"http://127\.0\.0\.1:(\d+)", (tmp_path / "gateway.toml").read_text())
        ports = [ready["port"], *map(int, urls)]
        assert len(ports) == 4
        # A process holds its end of an accepted connection until it ends.
        watched = [socket.create_connection(("127.0.0.1", port), PATIENCE_S) for port in ports]
        process.kill()
        for connection in watched:
            with connection:
                assert connection.recv(1) == b""
