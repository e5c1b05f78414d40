"""``conserve simulate``: one contender, one workload, one cluster, in virtual time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from conserve_serving.cli.cell_table import cell_table
from conserve_serving.cli.lab_options import Setup, contender_help, lab_errors, lab_options
from conserve_serving.cli.lab_tables import plain_console
from conserve_serving.cli.params import FiniteRange, check_writable
from conserve_serving.lab.cell import Cell, run_cell
from conserve_serving.lab.contenders import contender
from conserve_serving.lab.pool import Pool

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(epilog="\b\nContenders:\n" + contender_help())
@click.option("--policy", default="conserve", show_default=True, help="A contender, see below.")
@click.option("--cluster", "cluster_name", default="paper", show_default=True, help="A cluster.")
@click.option(
    "--rate",
    type=FiniteRange(min=0, min_open=True),
    help="Conversations per second.  [default: 1, or as recorded with --arrivals recorded]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of draws and arrivals.")
@click.option(
    "--interference",
    type=FiniteRange(min=-1, min_open=True),
    default=0.0,
    show_default=True,
    help="How much longer a step that prefills and decodes takes than the two apart: 0.25 is 25 %.",
)
@click.option("--link", help="Name of a link instead of the cluster's.")
@lab_options
@click.option("--json", "json_path", type=_FILE, help="Write all figures here.")
def simulate(
    *,
    policy: str,
    cluster_name: str,
    rate: float | None,
    seed: int,
    interference: float,
    link: str | None,
    json_path: Path | None,
    progress: bool,
    **options: Any,
) -> None:
    """Run one workload on one cluster under one policy, and print what came out.

    The scheduler is the very class that serves traffic; engines, links and time are simulated.
    `conserve compare` runs many of these; docs/laboratory.md defines every figure.
    """
    check_writable(json_path)
    with lab_errors():
        setup = Setup.read(options)
        recorded = setup.workload.arrivals == "recorded"
        workload = replace(
            setup.workload, seed=seed, rate_per_s=rate or (None if recorded else 1.0)
        )
        cell = Cell(
            cluster=setup.cluster(cluster_name),
            contender=contender(policy),
            workload=workload,
            mixed_slowdown=1.0 + interference,
            link=link,
            reference=setup.reference,
            warmup_share=setup.warmup_share,
        )
        row = _run(cell, show_progress=progress)
    plain_console().print(cell_table(row))
    if json_path is not None:
        json_path.write_text(json.dumps(row, indent=1) + "\n", "utf-8")
        click.echo(f"written: {json_path}", err=True)


def _run(cell: Cell, *, show_progress: bool) -> dict[str, Any]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("turns ·"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not show_progress,
        transient=True,
    )
    pool = Pool.load(cell.drawn).conversations
    count = cell.workload.conversations or len(pool)
    expected = count * sum(len(c.turns) for c in pool) / len(pool)
    task = bar.add_task("simulating", total=round(expected))
    with bar:
        return run_cell(cell, on_progress=lambda turns: bar.update(task, completed=turns))
