"""`conserve up` and `conserve serve`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from conserve_serving.cli.cluster_file import attached_config, plan_cluster, read_config
from conserve_serving.cli.errors import EXIT_FAILED, EXIT_OK, BadInputError, CliError
from conserve_serving.cli.live import Reporter
from conserve_serving.cli.params import FiniteRange
from conserve_serving.cli.ports import DEFAULT_PORT
from conserve_serving.cli.stopping import StopSignals
from conserve_serving.cli.supervisor import ClusterPlan, Supervisor
from conserve_serving.engines.sglang.flags import SglangEngine

_CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Configuration file (TOML). Default: 1 prefiller and 2 decoders, emulated.",
)
_ENGINE = click.option(
    "--engine",
    type=click.Choice(["sglang", "emulated"]),
    help="What tiers run that do not attach to running engines: replaces the file's engine.",
)
_PORT = click.option("--port", type=click.IntRange(0, 65535), help="Port of the gateway; 0: any.")


@click.command()
@_CONFIG
@_ENGINE
@_PORT
@click.option(
    "--speed",
    type=FiniteRange(min=0, min_open=True),
    help="Run emulated engines this many times faster than the wall clock.",
)
@click.option("--no-live", is_flag=True, help="Plain lines instead of the live view.")
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for logs. Default: a new one under the system's temporary folder.",
)
@click.option(
    "--announce",
    is_flag=True,
    help="For scripts: print one JSON line with port and URL"
    " on stdout when the cluster is up, and nothing else there.",
)
@click.option(
    "--exit-with-parent",
    is_flag=True,
    help="For scripts: drain and stop when stdin reaches its end.",
)
def up(
    *,
    config_path: Path | None,
    engine: str | None,
    port: int | None,
    speed: float | None,
    no_live: bool,
    run_dir: Path | None,
    announce: bool,
    exit_with_parent: bool,
) -> int:
    """Start engines and the gateway from one file, and watch them work.

    Ctrl-C drains: running turns finish, then everything stops. A second Ctrl-C stops at once.
    """
    config = read_config(config_path, engine=engine)
    if speed is not None and any(tier.engine == "sglang" for tier in config.tiers):
        raise BadInputError(
            "--speed is for emulated engines; the configuration has SGLang tiers",
            remedy="leave it out, or run the same tiers emulated: --engine emulated",
        )
    run_dir = make_run_dir(run_dir)
    plan = plan_cluster(config, port=port, speed=speed, run_dir=run_dir)
    console = Console(stderr=announce)
    reporter = Reporter(console, live=console.is_terminal and not no_live and not announce)
    asked = port is not None or "port" in config.gateway.model_fields_set
    if not asked and plan.reserved.port != DEFAULT_PORT:
        reporter.say(
            f"port {DEFAULT_PORT} is taken: the gateway will listen on {plan.reserved.port}"
        )
    supervisor = Supervisor(plan, run_dir=run_dir, notify=reporter.notify)

    def ready() -> None:
        if announce:
            line = {"ready": True, "port": plan.reserved.port, "url": supervisor.url}
            click.echo(json.dumps(line | {"run_dir": str(run_dir)}))
        else:
            _say_what_next(reporter, supervisor)

    reporter.say(f"starting {_engines_in_words(plan)}the gateway")
    reporter.say(f"logs are in {run_dir}")
    return asyncio.run(_up(supervisor, reporter, ready, stop_with_stdin=exit_with_parent))


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Configuration file (TOML) whose tiers are attached by URL.",
)
@_PORT
def serve(config_path: Path, port: int | None) -> int:
    """Run the gateway alone, in front of engines that run already."""
    config = read_config(config_path)
    to_start = [tier.engine for tier in config.tiers if not tier.urls]
    if to_start:
        raise BadInputError(
            f"{config_path} has {to_start[0]} tiers without urls, and `conserve serve` starts no "
            "engines",
            remedy="use `conserve up`, or give every tier its urls",
        )
    if any(tier.engine == "sglang" for tier in config.tiers):
        # To the gateway engines are URLs; how they are started means nothing to it.
        config_path = make_run_dir(None) / "gateway.toml"
        config_path.touch(mode=0o600)
        config_path.write_text(attached_config(config), encoding="utf-8")
    argv = [sys.executable, "-m", "conserve_serving.gateway", "--config", str(config_path)]
    if port is not None:
        argv += ["--port", str(port)]
    # The gateway takes this process's place: signals and the exit code are its own.
    os.execv(sys.executable, argv)  # noqa: S606 - our own interpreter and module


def _engines_in_words(plan: ClusterPlan) -> str:
    real = sum(isinstance(engine, SglangEngine) for engine in plan.engines)
    words = [
        f"{number} {kind} engine{'s' * (number != 1)}"
        for number, kind in ((len(plan.engines) - real, "emulated"), (real, "SGLang"))
        if number
    ]
    return " and ".join(words) + " and " if words else ""


def make_run_dir(run_dir: Path | None) -> Path:
    """The folder for this run's logs, made if need be.

    Raises:
        BadInputError: it cannot be made.
    """
    if run_dir is None:
        return Path(tempfile.mkdtemp(prefix="conserve-"))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise BadInputError(
            f"--run-dir {run_dir}: {failure.strerror}", remedy="name a folder that can be written"
        ) from failure
    return run_dir


async def _up(
    supervisor: Supervisor,
    reporter: Reporter,
    ready: Callable[[], None],
    *,
    stop_with_stdin: bool,
) -> int:
    """Run until a signal, then drain. The exit code."""
    signals = StopSignals(supervisor.kill)
    if stop_with_stdin:
        _when_stdin_ends(asyncio.get_running_loop(), signals.stopping)

    failure = await until_stopped(supervisor, reporter, signals.stopping, ready)
    if failure is None:
        reporter.notify("draining: running turns finish first (Ctrl-C again stops at once)")
    in_time = await supervisor.stop()
    if failure is not None:
        raise failure
    if signals.count > 1 or not in_time:
        reporter.notify("stopped before everything had drained")
        return EXIT_FAILED
    reporter.notify("drained and stopped")
    return EXIT_OK


async def until_stopped(
    supervisor: Supervisor,
    reporter: Reporter,
    stopping: asyncio.Event,
    ready: Callable[[], None],
) -> CliError | None:
    """Start the cluster and show it until ``stopping`` is set, or it cannot go on.

    Returns:
        Why it could not go on, or None.
    """
    stop = asyncio.create_task(stopping.wait())
    start = asyncio.create_task(supervisor.start())
    tasks: list[asyncio.Task[Any]] = [stop, start]
    try:
        await asyncio.wait([stop, start], return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            return None
        await start
        ready()
        shown = asyncio.create_task(reporter.run(supervisor.gateway_http(timeout_s=2.0)))
        kept = asyncio.create_task(supervisor.run())
        tasks += [shown, kept]
        await asyncio.wait(tasks[:1] + tasks[2:], return_when=asyncio.FIRST_COMPLETED)
        for task in (shown, kept):
            if task.done():
                await task
    except CliError as failure:
        return failure
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return None


def _when_stdin_ends(loop: asyncio.AbstractEventLoop, stopping: asyncio.Event) -> None:
    """Set ``stopping`` when the parent closes our stdin or is gone."""

    def wait() -> None:
        while os.read(0, 65536):  # not sys.stdin: its lock must be free when the interpreter ends
            pass
        with contextlib.suppress(RuntimeError):  # the loop ended first
            loop.call_soon_threadsafe(stopping.set)

    threading.Thread(target=wait, name="stdin", daemon=True).start()


def _say_what_next(reporter: Reporter, supervisor: Supervisor) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    request = {"model": supervisor.model or "MODEL", "messages": messages}
    body = json.dumps(request, separators=(",", ":"))
    for line in (
        f"ConServe is up at {supervisor.url}. From another terminal:",
        "",
        f"  export OPENAI_BASE_URL={supervisor.url}/v1 OPENAI_API_KEY=none",
        "  curl -i $OPENAI_BASE_URL/chat/completions \\",
        f"  -d '{body}'",
        f"  conserve replay TRACE --gateway {supervisor.url}",
        "",
    ):
        reporter.say(line)
    if supervisor.model is None:
        reporter.say("No engine has joined yet: turns are answered with 503 until one does.")
