"""``conserve replay``: a trace's conversations through a running gateway, and the figures."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from conserve_serving.cli.params import FiniteRange, check_writable
from conserve_serving.replay import options as replay_options
from conserve_serving.replay.errors import ReplayError
from conserve_serving.replay.gateway_api import GatewayApi, pool_for
from conserve_serving.replay.records import RunResult
from conserve_serving.replay.session import (
    PreparedReplay,
    ReplayRequest,
    prepare,
    write_outputs,
)
from conserve_serving.replay.terminal import render_table
from conserve_serving.replay.traces import TraceFormat
from conserve_serving.replay.workload import Caps

_POSITIVE = FiniteRange(min=0, min_open=True)
_AT_LEAST_ONE = click.IntRange(min=1)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("trace")
@click.option(
    "--gateway",
    default="http://127.0.0.1:8000",
    envvar="CONSERVE_BASE_URL",
    show_default=True,
    help="URL of a running gateway.",
)
@click.option(
    "--api-key",
    envvar="CONSERVE_API_KEY",
    help="Sent as bearer token; the admin token, where the gateway has one."
    "  [default: $CONSERVE_API_KEY]",
)
@click.option(
    "--format",
    "trace_format",
    type=click.Choice([str(name) for name in TraceFormat]),
    help="How the trace is written; told by its content if left out.",
)
@click.option("--conversations", type=_AT_LEAST_ONE, help="The trace's first N only.")
@click.option("--max-turns", type=_AT_LEAST_ONE, help="The first K turns of each only.")
@click.option(
    "--scale", type=_POSITIVE, help="Multiply the trace's token counts, to fit a small model."
)
@click.option("--max-gap", type=FiniteRange(min=0), help="Shorten longer gaps to this (seconds).")
@click.option(
    "--rate",
    type=_POSITIVE,
    help="Poisson arrivals per (model) second; else the trace's own arrivals, else 1 per second.",
)
@click.option(
    "--speed", type=_POSITIVE, help="Model seconds per wall second; else the cluster's own."
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Names arrivals, generated conversations and token ids.",
)
@click.option(
    "--vocabulary",
    type=click.IntRange(min=2),
    help="Token ids of the model, where it has fewer than 17,384: an engine may die of others.",
)
@click.option(
    "--connections",
    type=_AT_LEAST_ONE,
    default=256,
    show_default=True,
    help="Turns in flight at once.",
)
@click.option(
    "--stall-timeout",
    type=_POSITIVE,
    default=300.0,
    show_default=True,
    help="Wall seconds without a byte after which an attempt has failed.",
)
@click.option("--json", "json_path", type=_FILE, help="Write all figures and turns here.")
@click.option("--html", "html_path", type=_FILE, help="Write a self-contained report here.")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
def replay(
    *,
    trace: str,
    gateway: str,
    api_key: str | None,
    trace_format: str | None,
    conversations: int | None,
    max_turns: int | None,
    scale: float | None,
    max_gap: float | None,
    rate: float | None,
    speed: float | None,
    seed: int,
    vocabulary: int | None,
    connections: int,
    stall_timeout: float,
    json_path: Path | None,
    html_path: Path | None,
    progress: bool,
) -> None:
    """Send a trace's conversations through a running gateway, and print what came out.

    TRACE is a file (JSON lines, Mooncake's JSON lines or CSV; plain or gzip), or generated:NAME
    with NAME one of those that `conserve workload list` shows.

    Ctrl-C ends the run early and shows what was measured so far. The exit code is 0 when every
    turn was answered with the trace's exact token counts, 1 otherwise.
    """
    check_writable(json_path, html_path)
    request = ReplayRequest(
        trace=trace,
        trace_format=None if trace_format is None else TraceFormat(trace_format),
        caps=Caps(conversations=conversations, max_turns=max_turns, max_gap_s=max_gap, scale=scale),
        rate_per_s=rate,
        speed=speed,
        options=replay_options.Options(
            seed=seed,
            vocabulary=vocabulary,
            connections=connections,
            stall_timeout_s=stall_timeout,
        ),
    )
    console = Console(stderr=True)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as loop:
            url = gateway.rstrip("/").removesuffix("/v1")
            result = loop.run(_run(request, url, api_key, console, show_progress=progress))
        figures = write_outputs(result, json_path=json_path, html_path=html_path)
    except (ReplayError, OSError) as error:
        raise click.ClickException(str(error)) from error
    Console().print(render_table(figures))
    for path in (json_path, html_path):
        if path is not None:
            console.print(f"written: {path}", soft_wrap=True)
    if figures["errors"] or result.interrupted:
        raise SystemExit(1)


async def _run(
    request: ReplayRequest,
    url: str,
    api_key: str | None,
    console: Console,
    *,
    show_progress: bool,
) -> RunResult:
    pool = pool_for(url)
    loop = asyncio.get_running_loop()
    # Not the loop's own clock: uvloop's stands still within a turn of the loop.
    clock = replay_options.Clock(now=time.perf_counter)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("turns · {task.fields[more]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not show_progress,
        transient=True,
    )
    task = bar.add_task("replaying", total=None, more="")

    def show(progress: replay_options.Progress) -> None:
        more = f"{progress.conversations_open} conversations open"
        for count, what in ((progress.retries, "retries"), (progress.errors, "errors")):
            more += f" · {count} {what}" if count else ""
        bar.update(task, completed=progress.turns_done, more=more)

    try:
        api = GatewayApi(pool, url=url, api_key=api_key)
        prepared = await prepare(request, api, clock, on_progress=show)
        for warning in prepared.warnings:
            console.print(f"warning: {warning}", style="yellow")
        bar.update(task, total=sum(len(c.turns) for c in prepared.workload.conversations))
        loop.add_signal_handler(signal.SIGINT, _stopper(prepared, loop))
        with bar:
            return await prepared.run()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        pool.close()


def _stopper(prepared: PreparedReplay, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    def stop() -> None:
        loop.remove_signal_handler(signal.SIGINT)  # a second Ctrl-C ends the program at once
        prepared.replay.stop()

    return stop


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed (it is not on Windows)."""
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return uvloop.new_event_loop
