"""The engine as a process of its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conserve_serving.engines.emulated.__main__ import main
from conserve_serving.engines.http import HttpPool

COMMAND = [sys.executable, "-m", "conserve_serving.engines.emulated"]


def launch(*options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [*COMMAND, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ready(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    line: dict[str, Any] = json.loads(process.stdout.readline())
    assert line["ready"] is True
    return line


async def test_it_announces_its_port_serves_and_ends_with_its_parent(tmp_path: Path) -> None:
    process = launch(
        *("--port", "0", "--speed", "50", "--engine-id", "d0", "--role", "decode"),
        *("--store", str(tmp_path), "--model", "some/model", "--exit-with-parent"),
    )
    try:
        told = ready(process)
        assert told["engine"] == "d0"
        pool = HttpPool("127.0.0.1", told["port"])
        body = json.dumps({"prompt": "x", "max_tokens": 3}).encode()
        headers = [(b"content-type", b"application/json")]
        response = await pool.request("POST", "/v1/completions", headers, body)
        assert json.loads(await response.read())["usage"]["completion_tokens"] == 3
        pool.close()
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()


def test_sigterm_ends_it() -> None:
    process = launch("--port", "0")
    try:
        ready(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile", "abacus"], "abacus"),
        (["--speed", "0"], "speed is 0.0: give a positive factor"),
        (["--page-size", "0"], "page_tokens is 0"),
        (["--ack-url", "ftp://x"], "give an http:// address"),
        (["--kv-capacity-tokens", "5"], "kv_capacity_tokens is too small"),
    ],
)
def test_impossible_settings_end_it_with_a_reason(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--port", "0", *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
