"""The launcher with real processes: readiness, why it failed, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Launch

#: Far more than anything here takes; a test that needs it has failed.
PATIENCE_S = 30.0


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """Where a server's processes write their ids."""
    path = tmp_path / "family"
    path.touch()
    return path


def all_gone(family: Path) -> bool:
    """Whether every process whose id stands in the file ends within reason."""
    ids = [int(word) for word in family.read_text().split()]
    assert len(ids) == 3
    ended = 0
    for pid in ids:
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            ended += 1
            continue
        readable, _, _ = select.select([process], [], [], PATIENCE_S)
        ended += bool(readable)
        os.close(process)
    return ended == len(ids)


def test_ready_when_it_answers_and_ended_when_told(launch: Launch, family: Path) -> None:
    one = launch(f"family={family}", "--served-model-name", "x")
    assert one.until("note") == {"note": "loading weights"}
    port = one.until("ready")["port"]
    url = f"http://127.0.0.1:{port}/server_info"
    with urllib.request.urlopen(url) as reply:
        info = json.load(reply)
    assert info["argv"][:2] == ["--served-model-name", "x"]
    assert not info["env"].get("CONSERVE_ENGINE_ENV")
    one.process.send_signal(signal.SIGTERM)
    assert one.wait() == 0
    assert all_gone(family)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_nothing_is_left_when_the_one_who_holds_the_leash_is_gone(
    launch: Launch, family: Path
) -> None:
    one = launch(f"family={family} deaf", options=("--grace-s", "0.2"))
    one.until("ready")
    one.stdin.close()
    assert one.wait() == 0
    assert all_gone(family)


def test_nothing_is_left_when_the_launcher_is_killed(launch: Launch, family: Path) -> None:
    one = launch(f"family={family} deaf")
    one.until("ready")
    one.process.kill()
    one.wait()
    assert all_gone(family)


def test_what_a_crashed_server_leaves_is_removed(launch: Launch, family: Path) -> None:
    one = launch(f"family={family} exit=3")
    assert one.until("failed")["failed"] == "SGLang ended (exit code 3)"
    assert one.wait() == 1
    assert all_gone(family)


def test_unhealthy_is_not_ready(launch: Launch, tmp_path: Path) -> None:
    healthy = tmp_path / "healthy"
    one = launch(f"slow={healthy}")
    for line in one.stdout:
        assert "ready" not in line[:10]
        if "fired up" in line:
            break
    healthy.touch()
    one.until("ready")


def test_failure_is_explained_by_the_log(launch: Launch, tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.write_text(
        "Traceback (most recent call last):\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
        "50%|#####     |\r100%|##########|\r"
        "[2026-11-25 10:00:00] Received sigquit from a child process.\n"
    )
    one = launch(f"say={words} kill=9")
    failure = one.until("failed")
    assert failure["failed"] == "the GPU is out of memory"
    assert failure["evidence"].startswith("torch.OutOfMemoryError")
    assert "nvidia-smi" in failure["remedy"]
    assert "50%|#####     |\n" in one.said, "progress bars become lines"


def test_killed_without_a_word_is_most_likely_memory(launch: Launch) -> None:
    one = launch("kill=9")
    assert "out of memory" in one.until("failed")["failed"]


def test_engine_of_the_wrong_kind_is_refused(launch: Launch) -> None:
    one = launch("pd")
    failure = one.until("failed")
    assert "disaggregation_mode is 'decode'" in failure["failed"]
    assert one.wait() == 1


def test_taken_port_is_said_at_once(launch: Launch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        one = launch("", options=("--port", str(port)))
        assert f"port {port}" in one.until("failed")["failed"]
    assert one.wait() == 1


@pytest.mark.parametrize(
    ("python", "says"),
    [
        ("/nowhere/python", "/nowhere/python cannot be run"),
        (sys.executable, "SGLang is not installed"),
    ],
)
def test_environment_without_sglang(python: str, says: str) -> None:
    argv = [sys.executable, "-m", "conserve_serving.engines.sglang.launch", "--python", python]
    done = subprocess.run(  # noqa: S603 - our own module
        argv, input="", capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    message = json.loads(done.stdout)
    assert says in message["failed"]
    assert "python" in message["remedy"]
