"""Real processes: start, readiness, crash, back-off, stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from conserve_serving.cli.children import Backoff, Child, ChildSpec, ChildState, describe_end
from conserve_serving.cli.errors import ChildFailedError, PortInUseError

SCRIPT = Path(__file__).with_name("scripted_child.py")
#: Far more than anything here takes; a test that needs it has failed.
PATIENCE_S = 20.0


class Scene:
    """Makes children that run the scripted program, and ends what a test leaves behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notices: list[str] = []
        self.heard: asyncio.Queue[str] = asyncio.Queue()
        self.pauses_s: list[float] = []
        self.now_s = 0.0
        self.children: list[Child] = []

    def child(
        self,
        *behaviours: str,
        port: int = 0,
        ready_timeout_s: float = PATIENCE_S,
        grace_s: float = PATIENCE_S,
        env: Mapping[str, str] = {},
        echo: Callable[[bytes], None] | None = None,
    ) -> Child:
        def command(port: int) -> list[str]:
            return [sys.executable, "-S", "-E", str(SCRIPT), "--port", str(port), *behaviours]

        spec = ChildSpec(
            name="d0",
            command=command,
            port=port,
            log_path=self.folder / "d0.log",
            env=env,
            ready_timeout_s=ready_timeout_s,
            grace_s=grace_s,
            echo=echo,
            backoff=Backoff(first_s=1.0, longest_s=4.0, healthy_s=30.0, give_up_after=5),
        )
        child = Child(spec, notify=self.notify, clock=lambda: self.now_s, sleep=self.sleep)
        self.children.append(child)
        return child

    def notify(self, message: str) -> None:
        self.notices.append(message)
        self.heard.put_nowait(message)

    async def sleep(self, pause_s: float) -> None:
        self.pauses_s.append(pause_s)
        self.now_s += pause_s


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    for child in scene.children:
        child.kill()
        await child.stop()


async def watch_until(scene: Scene, child: Child, words: str) -> None:
    """Watch the child until it is said of it."""
    watch = asyncio.create_task(child.watch())
    try:
        async with asyncio.timeout(PATIENCE_S):
            while words not in await scene.heard.get():
                pass
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


async def test_ready_child_tells_its_port_and_stops_when_asked(scene: Scene) -> None:
    child = scene.child("say=warming up", "ready", "say=serving")
    port = await child.start()
    assert child.state is ChildState.READY
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S):
        pass
    pid = child.pid
    assert pid is not None
    assert await child.stop()
    assert child.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    log = (scene.folder / "d0.log").read_text().splitlines()
    assert log[0] == "warming up"
    assert log[-1] == "serving"


async def test_crash_before_ready_shows_the_last_words(scene: Scene) -> None:
    child = scene.child("say=no such profile: x100", "crash=7")
    with pytest.raises(ChildFailedError) as caught:
        await child.start()
    assert "ended before it was ready (exit code 7)" in caught.value.what
    assert "no such profile: x100" in caught.value.detail
    assert str(scene.folder / "d0.log") in caught.value.remedy
    assert child.pid is None


async def test_port_in_use_is_named(scene: Scene) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"port {port}.*in use"):
            await scene.child("ready", port=port).start()


async def test_silent_child_is_given_up_and_ended(scene: Scene) -> None:
    child = scene.child("ignore-term", "mute", ready_timeout_s=0.3)
    with pytest.raises(ChildFailedError, match=r"not ready after 0\.3 s"):
        await child.start()
    assert child.pid is None


async def test_crashed_child_comes_back_on_its_port(scene: Scene) -> None:
    child = scene.child("ready")
    port = await child.start()
    child.kill()
    await watch_until(scene, child, "is back")
    assert child.restarts == 1
    assert child.port == port
    assert child.state is ChildState.READY
    assert scene.pauses_s == [1.0]
    assert scene.notices == [
        "d0 ended (killed by SIGKILL); starting it again in 1 s",
        f"d0 is back on port {port}",
    ]


async def test_pauses_double_and_then_the_child_is_left_alone(scene: Scene) -> None:
    broken = scene.folder / "broken"
    child = scene.child(f"crash-if={broken}", "ready")
    await child.start()
    broken.touch()
    child.kill()
    with pytest.raises(ChildFailedError, match=r"crashed 5 times in a row.*exit code 3"):
        async with asyncio.timeout(PATIENCE_S):
            await child.watch()
    assert scene.pauses_s == [1.0, 2.0, 4.0, 4.0]
    assert child.state is ChildState.GAVE_UP


async def test_healthy_time_forgets_earlier_crashes(scene: Scene) -> None:
    child = scene.child("ready")
    await child.start()
    for _ in range(2):
        scene.now_s += 31.0
        child.kill()
        await watch_until(scene, child, "is back")
    assert scene.pauses_s == [1.0, 1.0]


async def test_child_that_ignores_sigterm_is_killed_after_its_grace(scene: Scene) -> None:
    child = scene.child("ignore-term", "deaf", "ready", grace_s=0.1)
    await child.start()
    assert not await child.stop()
    assert child.pid is None
    assert await child.stop(), "there was nothing left to stop"


def test_child_ends_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    """SIGKILL leaves no time for clean-up: the closed pipe alone must end the child."""
    supervisor = f"""
import asyncio, pathlib, sys
from conserve_serving.cli.children import Child, ChildSpec
def command(port):
    return [sys.executable, "-S", {str(SCRIPT)!r}, "--port", str(port), "ready"]
async def main():
    log = pathlib.Path({str(tmp_path)!r}, "log")
    spec = ChildSpec(name="d0", command=command, port=0, log_path=log)
    child = Child(spec, notify=print)
    print(await child.start(), child.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    argv = [sys.executable, "-c", supervisor]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:  # noqa: S603 - our own text
        assert process.stdout is not None
        port, pid = map(int, process.stdout.readline().split())
        # The child holds this connection open until it ends.
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
            process.kill()
            with contextlib.suppress(ConnectionResetError):  # it ended before it had accepted
                assert connection.recv(1) == b""
    assert pid > 0


def test_ends_are_told_in_words() -> None:
    assert describe_end(2) == "exit code 2"
    assert describe_end(-15) == "killed by SIGTERM"
    assert describe_end(-64) == "killed by SIGRTMAX"
    assert describe_end(None) == "still running"


# --- what a child says of itself ----------------------------------------------------------------

FAILED = '{"failed": "the GPU is out of memory", "remedy": "end others on it", "evidence": "OOM"}'


async def test_notes_of_a_starting_child_are_passed_on(scene: Scene) -> None:
    seen: list[bytes] = []
    child = scene.child('say={"note": "loading weights"}', "say={broken", "ready", echo=seen.append)
    await child.start()
    assert scene.notices == ["d0: loading weights"]
    assert b"{broken\n" in seen, "what is not for us is output like any other"
    assert b"".join(seen) == (scene.folder / "d0.log").read_bytes()


async def test_child_that_says_why_it_fails_is_quoted(scene: Scene) -> None:
    child = scene.child("say=noise", f"say={FAILED}", "crash=1")
    with pytest.raises(ChildFailedError, match="d0: the GPU is out of memory") as caught:
        await child.start()
    assert caught.value.remedy.startswith("end others on it")
    assert "d0.log" in caught.value.remedy
    assert caught.value.detail == "OOM"


async def test_child_that_says_why_it_crashed_later_is_quoted(scene: Scene) -> None:
    broken = scene.folder / "broken"
    child = scene.child(f"say-if={broken}:{FAILED}", f"crash-if={broken}", "ready")
    await child.start()
    broken.touch()
    child.kill()
    with pytest.raises(ChildFailedError, match="crashed 5 times in a row") as caught:
        async with asyncio.timeout(PATIENCE_S):
            await child.watch()
    assert "the GPU is out of memory" in caught.value.what
    assert caught.value.remedy.startswith("end others on it; read ")


async def test_child_gets_the_variables_it_needs(scene: Scene) -> None:
    child = scene.child("say-env=CONSERVE_TEST", "ready", env={"CONSERVE_TEST": "here it is"})
    await child.start()
    assert "here it is" in (scene.folder / "d0.log").read_text()
