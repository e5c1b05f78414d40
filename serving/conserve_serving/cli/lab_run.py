"""Running cells behind a progress bar, as `conserve compare` and `conserve reproduce` do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from conserve_serving.lab.cell import Cell, run_cell
from conserve_serving.lab.grid import Results, Row, failed, run_cells


class Runner:
    """Runs cells behind one progress bar, and remembers what went wrong.

    Args:
        results: where rows are and go.
        jobs: processes; None: one for each core.
        show_progress: whether there is a bar.
        run: what runs a cell.
    """

    def __init__(
        self,
        results: Results,
        jobs: int | None,
        *,
        show_progress: bool,
        run: Callable[[Cell], Row] = run_cell,
    ) -> None:
        self._results = results
        self._jobs = jobs
        self._run = run
        self.failures: dict[str, Row] = {}
        self.interrupted = False
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs ·"),
            TimeElapsedColumn(),
            TextColumn("·"),
            TimeRemainingColumn(),
            TextColumn("left{task.fields[more]}"),
            console=Console(stderr=True),
            disable=not show_progress,
            transient=True,
        )

    def begin(self, what: str, cells: int | None) -> TaskID:
        """A stage of the run."""
        return self.bar.add_task(what, total=cells, more="")

    def run(self, cells: Sequence[Cell], task: TaskID) -> list[Row]:
        """The cells' rows, failed ones among them; fewer where it was interrupted."""
        if self.interrupted:
            return []
        there = sum(self._results.get(cell) is not None for cell in cells)
        self.bar.advance(task, there)

        def on_done(row: Row) -> None:
            if failed(row):
                self.failures[row["key"]] = row
            more = f" · {len(self.failures)} failed" if self.failures else ""
            self.bar.update(task, advance=1, more=more)

        done = run_cells(
            cells, results=self._results, jobs=self._jobs, on_done=on_done, run=self._run
        )
        self.interrupted = done.interrupted
        return done.rows

    def say_failures(self, console: Console) -> None:
        """A line for each cell that failed."""
        for row in self.failures.values():
            cell, failure = row["cell"], row["failure"]
            console.print(
                f"failed: {cell['contender']['label']} on {cell['cluster']['name']} at "
                f"{cell['workload']['rate_per_s']:g}/s, seed {cell['workload']['seed']}: "
                f"{failure['error']}: {failure['text']}",
                style="red",
                markup=False,
                highlight=False,
            )
