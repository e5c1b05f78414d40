"""`conserve demo`: an agent and a replay on an embedded cluster, from nothing to a report."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from conserve_serving.cli.cluster_file import plan_cluster, read_config
from conserve_serving.cli.errors import (
    EXIT_FAILED,
    EXIT_OK,
    BadInputError,
    ChildFailedError,
    CliError,
)
from conserve_serving.cli.params import FiniteRange
from conserve_serving.cli.supervisor import Supervisor
from conserve_serving.cli.up import make_run_dir

AGENT = Path("example_agents/repo_explorer/agent.py")
QUESTION = "Where does the scheduler decide which decoder a conversation is pinned to?"
WORKLOAD = "generated:swebench"
#: A load that two A40 carry well, so that what is seen is the normal case.
RATE_PER_S = 0.3
MAX_TURNS = 5
MAX_GAP_S = 10.0
#: What one step may take before the demo says so and stops.
STEP_TIMEOUT_S = 150.0
#: How long an interrupted step may take to tidy up after itself.
STEP_GRACE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One program that the demo runs against its cluster.

    Attributes:
        title: what it shows.
        argv: argument list.
    """

    title: str
    argv: Sequence[str]


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out"),
    show_default=True,
    help="Folder for the report.",
)
@click.option(
    "--speed",
    type=FiniteRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Model seconds per wall second of the emulated engines.",
)
@click.option(
    "--conversations",
    type=click.IntRange(min=1),
    default=24,
    show_default=True,
    help="Conversations of the replay.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=Path(),
    help="Folder the agent explores.  [default: the current one]",
)
def demo(*, out: Path, speed: float, conversations: int, folder: Path) -> int:
    """An agent and a replay on an embedded cluster: 1 prefiller, 2 decoders, no GPU needed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise BadInputError(
            f"--out {out}: {failure.strerror}", remedy="name a folder that can be written"
        ) from failure
    run_dir = make_run_dir(None)
    plan = plan_cluster(read_config(None), port=0, speed=speed, run_dir=run_dir)
    supervisor = Supervisor(plan, run_dir=run_dir, notify=_tell)
    html, figures = out / "demo.html", out / "demo.json"
    steps = [
        Step(
            title=f"replay: {conversations} generated conversations of up to {MAX_TURNS} turns;"
            f" the engines' clock runs {speed:g} x as fast as the wall's",
            argv=[
                *(sys.executable, "-m", "conserve_serving.cli", "replay", WORKLOAD),
                *("--gateway", supervisor.url, "--conversations", str(conversations)),
                *("--rate", str(RATE_PER_S), "--max-turns", str(MAX_TURNS)),
                *("--max-gap", str(MAX_GAP_S)),
                *("--html", str(html), "--json", str(figures)),
            ],
        )
    ]
    if AGENT.exists():
        steps.insert(
            0,
            Step(
                title=f"agent: {QUESTION}",
                argv=[sys.executable, str(AGENT), "--folder", str(folder), QUESTION],
            ),
        )
    else:
        _tell(f"no agent step: {AGENT} is in the repository only; run the demo from its root")
    _tell(f"starting 1 prefiller and 2 decoders (emulated) and the gateway; logs in {run_dir}")
    code = asyncio.run(run_demo(supervisor, steps))
    if code == EXIT_OK:
        _tell(f"\nThe report: {html.resolve()}")
        _tell(f"All figures: {figures.resolve()}")
        _tell("Next: `conserve up`, and point your own agent at it.")
    return code


async def run_demo(
    supervisor: Supervisor, steps: Sequence[Step], *, step_timeout_s: float = STEP_TIMEOUT_S
) -> int:
    """Start the cluster, run every step against it, stop the cluster, whatever happens.

    Args:
        supervisor: of a cluster that has not been started.
        steps: run one after the other, their output goes to ours.
        step_timeout_s: what one step may take.

    Returns:
        The exit code: 0, or 1 when it was interrupted.

    Raises:
        CliError: the cluster did not come up, or a step failed.
    """
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted.set)
    work = asyncio.create_task(_work(supervisor, steps, step_timeout_s))
    stop = asyncio.create_task(interrupted.wait())
    try:
        await asyncio.wait([work, stop], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            _tell("interrupted: stopping")
            return EXIT_FAILED
        await work
    finally:
        for task in (work, stop):
            task.cancel()
        await asyncio.gather(work, stop, return_exceptions=True)
        await supervisor.stop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return EXIT_OK


async def _work(supervisor: Supervisor, steps: Sequence[Step], step_timeout_s: float) -> None:
    await supervisor.start()
    kept = asyncio.create_task(supervisor.run())
    try:
        for step in steps:
            running = asyncio.create_task(_run_step(step, supervisor.url, step_timeout_s))
            try:
                await asyncio.wait([running, kept], return_when=asyncio.FIRST_COMPLETED)
                if kept.done():
                    await kept
                await running
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
    finally:
        kept.cancel()
        await asyncio.gather(kept, return_exceptions=True)


async def _run_step(step: Step, url: str, timeout_s: float) -> None:
    _tell(f"\n=== {step.title}")
    env = {
        **os.environ,
        "CONSERVE_BASE_URL": f"{url}/v1",
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_KEY": os.environ.get("OPENAI_API_KEY", "none"),
    }
    process = await asyncio.create_subprocess_exec(
        *step.argv, stdin=asyncio.subprocess.DEVNULL, env=env
    )
    try:
        async with asyncio.timeout(timeout_s):
            code = await process.wait()
    except TimeoutError:
        raise CliError(
            f"this step took more than {timeout_s:g} s",
            remedy="try fewer conversations: `conserve demo --conversations 10`",
        ) from None
    finally:
        await _end(process)
    if code != 0:
        raise ChildFailedError(
            f"this step failed (exit code {code})", remedy="its own message is above"
        )


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a step that still runs; Ctrl-C at the terminal has reached it already."""
    if process.returncode is not None:
        return
    for end in (process.terminate, process.kill):
        with contextlib.suppress(ProcessLookupError):
            end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STEP_GRACE_S):
                await process.wait()
                return


def _tell(message: str) -> None:
    click.echo(message)
