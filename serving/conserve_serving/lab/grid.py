"""Many cells: what a grid is made of, the file its rows go to, and the processes that run it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from conserve_serving.lab.cell import FORMAT, Cell, code_hash, run_cell, training_half
from conserve_serving.lab.cluster_spec import ClusterSpec
from conserve_serving.lab.contenders import Contender
from conserve_serving.lab.errors import LabError, RunError
from conserve_serving.lab.pool import Pool
from conserve_serving.lab.workloads import WorkloadSpec
from conserve_serving.simulator.errors import SimulationError

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Every combination of what it lists.

    Attributes:
        workload: its rate and seed are replaced by each of ``rates_per_s`` and ``seeds``.
        rates_per_s: conversations per second; None: recorded arrivals as they were.
        reference: whose idle latency normalises; None: each cluster's own.
        share_of_capacity: a note on the rates, see :class:`Cell`.
    """

    clusters: Sequence[ClusterSpec]
    contenders: Sequence[Contender]
    workload: WorkloadSpec
    rates_per_s: Sequence[float | None]
    seeds: Sequence[int]
    mixed_slowdowns: Sequence[float] = (1.0,)
    links: Sequence[str | None] = (None,)
    reference: ClusterSpec | None = None
    warmup_share: float = 0.1
    share_of_capacity: float | None = None

    def cells(self) -> list[Cell]:
        """Seed by seed, so that what an interrupted run leaves behind can be paired."""
        return [
            Cell(
                cluster=cluster,
                contender=contender,
                workload=replace(self.workload, rate_per_s=rate, seed=seed),
                mixed_slowdown=mixed_slowdown,
                link=link,
                reference=self.reference,
                warmup_share=self.warmup_share,
                share_of_capacity=self.share_of_capacity,
            )
            for seed in self.seeds
            for cluster in self.clusters
            for link in self.links
            for mixed_slowdown in self.mixed_slowdowns
            for rate in self.rates_per_s
            for contender in self.contenders
        ]


# --- rows -----------------------------------------------------------------------------------------


def failed(row: Row) -> bool:
    """Whether the row says that its cell failed: ``failure`` has ``error`` and ``text``."""
    return "failure" in row


class Results:
    """Rows by key; with a file, each is appended as a line of JSON when it comes.

    Args:
        path: JSON lines; None keeps rows in memory only.
        resume: rows that are there count; otherwise the file must not exist, or be empty.

    Raises:
        LabError: the file exists and is not to be resumed, or a line is not a row.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path | None = None, *, resume: bool = False) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if path is None:
            return
        if path.exists() and path.stat().st_size and not resume:
            raise LabError(
                f"{path} exists. Give --resume to go on with what is in it, or another --out."
            )
        if path.exists():
            self.rows = read_results(path, mend=True)
        with path.open("ab"):
            pass  # it can be written: say so now and not after the first cell

    @property
    def from_other_code(self) -> int:
        """Rows of another version of the code; their figures may differ from what it gives now."""
        return sum(row.get("code") != code_hash() for row in self.rows.values())

    def get(self, cell: Cell) -> Row | None:
        """The row of a cell that has run; a failed one is to be run again."""
        row = self.rows.get(cell.key)
        return None if row is None or failed(row) else row

    def add(self, row: Row) -> None:
        """Keep a row; it is on its way to the disk when this returns."""
        self.rows[row["key"]] = row
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, separators=(",", ":")) + "\n")


def read_results(path: Path, *, mend: bool = False) -> dict[str, Row]:
    """Rows of a file of JSON lines by key, the latest of equal keys.

    A last line that was cut (the writer was killed) is passed over. A file of one row that is
    spread over lines, as ``conserve simulate --json`` writes it for people, is read as well, but
    not to be gone on with.

    Args:
        path: the file.
        mend: take the cut line out of the file, so that the next row begins a line of its own.

    Raises:
        LabError: another line is not a row, or is one of another format.
        OSError: the file cannot be read.
    """
    rows: dict[str, Row] = {}
    good = 0
    with path.open("rb") as file:
        if not mend and file.readline().strip() == b"{":
            row = _parsed(path, 1, path.read_bytes())
            return {row["key"]: row}
        file.seek(0)
        for number, line in enumerate(file, 1):
            cut = not line.endswith(b"\n")
            if line.strip() and not cut:
                row = _parsed(path, number, line)
                rows[row["key"]] = row
            if not cut:
                good += len(line)
    if mend and good < path.stat().st_size:
        os.truncate(path, good)
    return rows


def _parsed(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
        known = isinstance(row, dict) and isinstance(row["key"], str)
    except (ValueError, KeyError):
        known = False
    if not known:
        raise LabError(f"{path}, line {number}: this is no row. Remove the line, or the file.")
    if row.get("format") != FORMAT:
        raise LabError(
            f"{path}, line {number}: a row of format {row.get('format')}, this version writes "
            f"{FORMAT}. Give another --out, and run the cells anew."
        )
    return dict(row)


# --- running --------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Done:
    """What became of some cells.

    Attributes:
        rows: of those that have run, in the order of the cells; failed ones among them.
        failures: those that failed.
        interrupted: not all have run.
    """

    rows: list[Row] = field(default_factory=list)
    failures: list[Row] = field(default_factory=list)
    interrupted: bool = False


def run_cells(
    cells: Iterable[Cell],
    *,
    results: Results | None = None,
    jobs: int | None = None,
    on_done: Callable[[Row], None] | None = None,
    run: Callable[[Cell], Row] = run_cell,
) -> Done:
    """Run the cells that have no row yet, in processes of their own.

    A cell that fails is a row that says so. Ctrl-C ends the processes; what was done stays.

    Args:
        cells: what to run; equal ones run once.
        results: where rows are and go.
        jobs: processes; None: one for each core; 1: in this process.
        on_done: told of each row as it comes.
        run: what runs a cell, importable by name.

    Raises:
        LabError: a policy, a workload or a cluster cannot be used as asked; nothing has run.
        RunError: a process was killed from outside.
    """
    results = results if results is not None else Results()
    wanted = list({cell.key: cell for cell in cells}.values())
    missing = [cell for cell in wanted if results.get(cell) is None]
    _check(missing)

    def keep(row: Row) -> None:
        results.add(row)
        if on_done is not None:
            on_done(row)

    done = Done()
    workers = min(jobs or os.cpu_count() or 1, len(missing))
    try:
        if workers > 1:
            _in_processes(missing, workers, run, keep)
        else:
            for cell in missing:
                keep(_attempt(cell, run))
    except KeyboardInterrupt:
        done.interrupted = True
    done.rows = [results.rows[cell.key] for cell in wanted if cell.key in results.rows]
    done.failures = [row for row in done.rows if failed(row)]
    return done


def _check(cells: Iterable[Cell]) -> None:
    """What a person got wrong is said once, before anything runs."""
    pools = set()
    for cell in cells:
        cell.contender.check_policy()
        cell.cluster.engines(mixed_slowdown=cell.mixed_slowdown, link=cell.link)
        needed = [cell.drawn]
        if cell.contender.predictor == "realistic":
            needed.append(training_half(cell.drawn))
        for spec in needed:
            if spec.pool_key not in pools:
                pools.add(spec.pool_key)
                Pool.load(spec)


def _attempt(cell: Cell, run: Callable[[Cell], Row]) -> Row:
    """The cell's row, or the row that says why there is none."""
    try:
        return run(cell)
    except (SimulationError, LabError) as error:
        text = str(error)
        name = type(error).__name__
    except Exception as error:  # noqa: BLE001 - a bug in one cell must not cost the others: it is
        # in the row with its traceback, and the run ends with exit code 1.
        text = traceback.format_exc()
        name = type(error).__name__
    return {
        "format": FORMAT,
        "code": code_hash(),
        "key": cell.key,
        "cell": cell.to_json(),
        "failure": {"error": name, "text": text},
    }


_METHOD: Final = (
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)


def _in_processes(
    cells: Sequence[Cell],
    workers: int,
    run: Callable[[Cell], Row],
    keep: Callable[[Row], None],
) -> None:
    context = multiprocessing.get_context(_METHOD)
    if _METHOD == "forkserver":
        context.set_forkserver_preload([run_cell.__module__])
    held, leash = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(held,)
    )
    try:
        futures: list[Future[Row]] = [executor.submit(_attempt, cell, run) for cell in cells]
        for future in as_completed(futures):
            keep(future.result())
    except BaseException as error:
        leash.close()  # what still runs ends here
        if isinstance(error, BrokenProcessPool):
            raise RunError(
                "a process of the run was killed, perhaps for want of memory. What was done is "
                "kept: go on with --resume and fewer --jobs."
            ) from error
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        leash.close()
        held.close()


def _begin(held: Connection) -> None:
    """In each process: Ctrl-C is the parent's to answer, and nothing outlives the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_until_let_go, args=(held,), name="leash", daemon=True).start()


def _until_let_go(held: Connection) -> None:
    try:
        held.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
