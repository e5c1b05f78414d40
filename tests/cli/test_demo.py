"""The demo's own part: steps one after the other, and tidy whatever happens."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from conserve_serving.cli.demo import Step, run_demo
from conserve_serving.cli.errors import ChildFailedError, CliError

if TYPE_CHECKING:
    from conftest import Cluster


def step(code: str) -> Step:
    return Step(title="a step", argv=[sys.executable, "-S", "-c", code])


async def test_steps_run_in_order_and_know_the_gateway(scene: Cluster, tmp_path: Path) -> None:
    supervisor = scene.supervisor()
    note = f"import os; open({str(tmp_path / 'steps')!r}, 'a').write(os.environ[{{!r}}] + '\\n')"
    steps = [step(note.format("CONSERVE_BASE_URL")), step(note.format("OPENAI_BASE_URL"))]
    assert await run_demo(supervisor, steps) == 0
    assert (tmp_path / "steps").read_text().split() == [f"{supervisor.url}/v1"] * 2
    assert supervisor.gateway.pid is None


async def test_a_failing_step_ends_the_demo(scene: Cluster, tmp_path: Path) -> None:
    supervisor = scene.supervisor()
    never = step(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ChildFailedError, match="exit code 3"):
        await run_demo(supervisor, [step("raise SystemExit(3)"), never])
    assert not (tmp_path / "ran").exists()
    assert [child.pid for child in supervisor.engines.values()] == [None, None]


async def test_a_step_that_takes_too_long_is_ended(scene: Cluster) -> None:
    supervisor = scene.supervisor()
    stuck = step("import threading; threading.Event().wait()")
    with pytest.raises(CliError, match=r"more than 0\.1 s"):
        await run_demo(supervisor, [stuck], step_timeout_s=0.1)
    assert supervisor.gateway.pid is None


async def test_an_interrupt_stops_step_and_cluster(scene: Cluster, tmp_path: Path) -> None:
    supervisor = scene.supervisor()
    fifo = tmp_path / "running"
    os.mkfifo(fifo)
    code = f"import threading; open({str(fifo)!r}, 'w').write('x'); threading.Event().wait()"
    demo = asyncio.create_task(run_demo(supervisor, [step(code)]))
    assert await asyncio.to_thread(fifo.read_text) == "x", "the step runs"
    os.kill(os.getpid(), signal.SIGINT)
    assert await demo == 1
    assert supervisor.gateway.pid is None
