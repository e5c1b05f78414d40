"""From a request ("replay this trace there, like so") to a run and its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from conserve_serving.replay import generator
from conserve_serving.replay.conversations import Conversation
from conserve_serving.replay.errors import GatewayUnusable, TurnFailure
from conserve_serving.replay.figures import figures
from conserve_serving.replay.gateway_api import GatewayApi
from conserve_serving.replay.ideal import ideal_for
from conserve_serving.replay.options import Clock, Options, Progress
from conserve_serving.replay.records import RunResult
from conserve_serving.replay.report import render_report
from conserve_serving.replay.runner import Replay
from conserve_serving.replay.tables import TURN_COLUMNS, turn_rows
from conserve_serving.replay.traces import TraceFormat, load_trace
from conserve_serving.replay.workload import (
    Arrivals,
    Caps,
    Workload,
    poisson_arrivals,
    recorded_arrivals,
    select,
)

#: Prefix of a trace's name that asks for a generated workload.
GENERATED: Final = "generated:"

#: Conversations per model second where neither the trace nor the user says: the middle of the
#: range the paper measured on four A40 (0.5 to 1.634).
DEFAULT_RATE_PER_S: Final = 1.0

#: Conversations of a generated workload where the user does not say how many.
DEFAULT_GENERATED: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRequest:
    """What is asked for.

    Attributes:
        trace: a file, or ``generated:NAME``.
        trace_format: None: told by the file's content.
        caps: limits; the engines' longest context is added to them.
        rate_per_s: Poisson arrivals per model second; None: the trace's own arrivals where it
            has them, else ``DEFAULT_RATE_PER_S``.
        speed: model seconds per wall second; None: the cluster's.
        options: how to send; its ``speed`` is replaced by the one above.
    """

    trace: str
    trace_format: TraceFormat | None = None
    caps: Caps = field(default_factory=Caps)
    rate_per_s: float | None = None
    speed: float | None = None
    options: Options = field(default_factory=Options)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedReplay:
    """A run that is ready to start; ``warnings`` are for people."""

    replay: Replay
    workload: Workload
    arrivals: Arrivals
    rate_per_s: float | None
    warnings: tuple[str, ...]

    async def run(self) -> RunResult:
        """Replay it; raises what :meth:`Replay.run` raises."""
        return await self.replay.run(arrivals=self.arrivals, rate_per_s=self.rate_per_s)


async def prepare(
    request: ReplayRequest,
    api: GatewayApi,
    clock: Clock,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> PreparedReplay:
    """Look at the gateway, read the trace, and plan the run.

    Raises:
        GatewayUnusable: nothing answers at the gateway's address, or not as its API promises.
        TraceError: the trace cannot be replayed.
    """
    try:
        model, model_context_tokens = await api.model()
        cluster = await api.cluster()
    except TurnFailure as failure:
        raise GatewayUnusable(
            f"no gateway answers at {api.url}: {failure}. "
            "Start one with `conserve up`, or name it with --gateway."
        ) from failure
    warnings = []
    cluster_speed = 1.0 if cluster is None else cluster.speed
    speed = cluster_speed if request.speed is None else request.speed
    if speed != cluster_speed:
        warnings.append(
            f"speed {speed:g} is not the engines' own {cluster_speed:g}: arrivals and gaps do not "
            "match what the engines can do, and times are not model seconds"
        )
    limits = [model_context_tokens, None if cluster is None else cluster.max_context_tokens()]
    caps = replace(
        request.caps,
        max_context_tokens=min(
            (limit for limit in (*limits, request.caps.max_context_tokens) if limit is not None),
            default=None,
        ),
    )
    name, conversations = _conversations(request)
    workload = select(conversations, caps, name=name)
    recorded = recorded_arrivals(workload.conversations) if request.rate_per_s is None else None
    rate_per_s = None
    if recorded is None:
        rate_per_s = request.rate_per_s or DEFAULT_RATE_PER_S
        recorded = poisson_arrivals(
            len(workload.conversations), rate_per_s=rate_per_s, seed=request.options.seed
        )
    replay = Replay(
        api=api,
        model=model,
        workload=workload,
        arrivals_s=recorded,
        options=replace(request.options, speed=speed),
        clock=clock,
        on_progress=on_progress,
    )
    return PreparedReplay(
        replay=replay,
        workload=workload,
        arrivals=Arrivals.RECORDED if rate_per_s is None else Arrivals.POISSON,
        rate_per_s=rate_per_s,
        warnings=tuple(warnings),
    )


def _conversations(request: ReplayRequest) -> tuple[str, Iterable[Conversation]]:
    if request.trace.startswith(GENERATED):
        name = request.trace.removeprefix(GENERATED)
        count = request.caps.conversations or DEFAULT_GENERATED
        return request.trace, generator.generate(
            name, conversations=count, seed=request.options.seed
        )
    path = Path(request.trace)
    return path.name, load_trace(path, request.trace_format)


def write_outputs(
    result: RunResult, *, json_path: Path | None, html_path: Path | None
) -> dict[str, Any]:
    """Compute a run's figures, and write the files that are asked for.

    The JSON has every figure at its top level, and under ``turn_records`` all turns as rows.

    Returns:
        The figures.

    Raises:
        OSError: a file cannot be written.
    """
    ideal, note = ideal_for(result.samples[0].cluster if result.samples else None)
    numbers = figures(result, ideal=ideal, ideal_note=note)
    if json_path is not None:
        rows = {"columns": TURN_COLUMNS, "rows": turn_rows(result)}
        json_path.write_text(json.dumps({**numbers, "turn_records": rows}) + "\n", "utf-8")
    if html_path is not None:
        html_path.write_text(render_report(result, numbers, ideal=ideal), "utf-8")
    return numbers
