"""``conserve compare``: contenders over loads and seeds, in several processes, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from conserve_serving.cli.lab_options import (
    RATES,
    CommaList,
    Setup,
    contender_help,
    find_contenders,
    lab_errors,
    lab_options,
)
from conserve_serving.cli.lab_run import Runner
from conserve_serving.cli.lab_tables import comparison, goodput_table, place_title, plain_console
from conserve_serving.cli.params import FiniteRange, check_writable
from conserve_serving.lab.cell import Cell, run_cell
from conserve_serving.lab.contenders import Contender
from conserve_serving.lab.errors import LabError
from conserve_serving.lab.goodput import Search, Target, at_rate, search
from conserve_serving.lab.grid import Grid, Results, Row, failed
from conserve_serving.lab.workloads import Arrivals

#: Fewer are a transient or a draw of luck, and the command says so.
_ENOUGH_SEEDS = 12
_ENOUGH_CONVERSATIONS = 1000
_AT_LEAST_ONE = click.IntRange(min=1)


@click.command(epilog="\b\nContenders:\n" + contender_help())
@click.option(
    "--policies",
    type=CommaList(click.STRING),
    default="conserve,collocated,per_turn-10-wrong",
    show_default=True,
    help="Contenders, see below; all: every one.",
)
@click.option("--baseline", help="Whom the others are compared with.  [default: the last one]")
@click.option(
    "--rates",
    type=RATES,
    help="Conversations per second.  [default: 1, or as recorded with --arrivals recorded]",
)
@click.option(
    "--rates-of-capacity",
    type=RATES,
    help="Shares of each contender's own capacity, which is searched first.",
)
@click.option(
    "--goodput",
    type=CommaList(click.Choice([str(target) for target in Target])),
    help="Search the highest rate that is completed (capacity), or at which at most 5 % miss "
    "the SLO of ttfet, of ttfet_without_gaps, of any.",
)
@click.option(
    "--seeds",
    type=_AT_LEAST_ONE,
    default=_ENOUGH_SEEDS,
    show_default=True,
    help="How many: 0, 1, 2, …",
)
@click.option(
    "--interference",
    type=CommaList(FiniteRange(min=-1, min_open=True)),
    default="0",
    show_default=True,
    help="How much longer steps that prefill and decode take than the two apart: 0,0.25,0.5.",
)
@click.option(
    "--cluster",
    "clusters",
    type=CommaList(click.STRING),
    default="paper",
    show_default=True,
    help="Clusters.",
)
@click.option("--link", "links", type=CommaList(click.STRING), help="Links instead of theirs.")
@lab_options
@click.option("--jobs", type=_AT_LEAST_ONE, help="Processes.  [default: one for each core]")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append each run's figures here, a line of JSON each.",
)
@click.option("--resume", is_flag=True, help="Runs that --out has already are not run again.")
@click.pass_obj
def compare(
    run: Callable[[Cell], Row] | None,  # tests put what runs a cell here
    /,
    *,
    policies: tuple[str, ...],
    baseline: str | None,
    rates: tuple[float, ...] | None,
    rates_of_capacity: tuple[float, ...] | None,
    goodput: tuple[str, ...] | None,
    seeds: int,
    interference: tuple[float, ...],
    clusters: tuple[str, ...],
    links: tuple[str, ...] | None,
    jobs: int | None,
    out: Path | None,
    resume: bool,
    progress: bool,
    **options: Any,
) -> None:
    """Compare contenders at the same loads, with the same conversations at the same times.

    Prints a table for each load: means over seeds with 95 % intervals, and each contender's change
    against the baseline, paired by seed (green: a win, red: a loss, beyond 2 % and certain).

    Ctrl-C ends the run and prints what is done; with --out and --resume the same command goes on
    from there. The exit code is 1 when a run failed or was interrupted.
    """
    if resume and out is None:
        raise click.UsageError("--resume needs --out: the file to go on with.")
    check_writable(out)
    said = Console(stderr=True)
    with lab_errors():
        setup = Setup.read(options)
        contenders = find_contenders(policies)
        chosen = _baseline(baseline, contenders)
        usual = None if setup.workload.arrivals is Arrivals.RECORDED else 1.0
        grid = Grid(
            clusters=[setup.cluster(name) for name in clusters],
            contenders=contenders,
            workload=setup.workload,
            rates_per_s=rates or (() if rates_of_capacity or goodput else (usual,)),
            seeds=range(seeds),
            mixed_slowdowns=[1.0 + share for share in interference],
            links=links or (None,),
            reference=setup.reference,
            warmup_share=setup.warmup_share,
        )
        results = Results(out, resume=resume)
        if stale := results.from_other_code:
            said.print(
                f"warning: {stale} of {len(results.rows)} rows in {out} come from another version "
                "of the code. Give another --out to run them again.",
                style="yellow",
                soft_wrap=True,
            )
        runner = Runner(results, jobs, show_progress=progress, run=run or run_cell)
        with runner.bar:
            tables = _run(grid, runner, rates_of_capacity or (), goodput or (), chosen)
    console = plain_console()
    for table in tables:
        console.print(table)
    if seeds < _ENOUGH_SEEDS or (setup.workload.conversations or 0) < _ENOUGH_CONVERSATIONS:
        console.print(
            f"note: {seeds} seeds of {setup.workload.conversations} conversations: no claim about "
            f"steady state. That needs {_ENOUGH_SEEDS} and {_ENOUGH_CONVERSATIONS:,}.",
            style="yellow",
        )
    runner.say_failures(said)
    if runner.interrupted:
        go_on = (
            "the same command with --resume goes on from here" if out else "give --out to resume"
        )
        said.print(f"interrupted: the tables cover what was done; {go_on}.")
    if out is not None:
        said.print(f"written: {out}", soft_wrap=True)
    if runner.interrupted or runner.failures:
        raise SystemExit(1)


def _run(
    grid: Grid,
    runner: Runner,
    shares: Sequence[float],
    targets: Sequence[str],
    baseline: str,
) -> list[Any]:
    """Runs everything that was asked for; returns its tables."""
    tables: list[Any] = []
    wanted = dict.fromkeys(Target(name) for name in targets)
    if shares:
        wanted[Target.CAPACITY] = None
    base = replace(grid, rates_per_s=(1.0,)).cells()
    cells = grid.cells()
    for target in wanted:
        searches = _search(base, target, runner)
        if str(target) in targets:
            tables += _goodput_tables(base, searches, target, baseline)
        if target is Target.CAPACITY:
            cells += _at_shares(base, searches, shares)
    if cells:
        rows = runner.run(cells, runner.begin("comparing", len({cell.key for cell in cells})))
        tables += comparison([row for row in rows if not failed(row)], baseline=baseline)
    return tables


def _search(base: Sequence[Cell], target: Target, runner: Runner) -> list[Search]:
    task = runner.begin(f"searching ({target})", None)
    return search(base, target, lambda cells: runner.run(cells, task))


def _at_shares(
    base: Sequence[Cell], searches: Sequence[Search], shares: Sequence[float]
) -> list[Cell]:
    """Cells at shares of a contender's capacity: its mean over seeds, so that seeds share rates."""
    capacities: dict[str, list[float]] = {}
    for cell, found in zip(base, searches, strict=True):
        if found.rate_per_s:
            capacities.setdefault(_without_seed(cell), []).append(found.rate_per_s)
    return [
        at_rate(cell, share * sum(known) / len(known), share_of_capacity=share)
        for share in shares
        for cell in base
        if (known := capacities.get(_without_seed(cell)))
    ]


def _goodput_tables(
    base: Sequence[Cell], searches: Sequence[Search], target: Target, baseline: str
) -> list[Any]:
    """A table for each cluster, link and interference."""
    places: dict[str, dict[str, list[float | None]]] = {}
    for cell, found in zip(base, searches, strict=True):
        place = place_title(cell.cluster.name, cell.link, cell.mixed_slowdown)
        by_label = places.setdefault(place, {})
        by_label.setdefault(cell.contender.label, []).append(found.rate_per_s)
    tables = []
    for place, found_by_label in places.items():
        tables += [goodput_table(found_by_label, target, place=place, baseline=baseline), ""]
    return tables


def _without_seed(cell: Cell) -> str:
    return at_rate(replace(cell, workload=replace(cell.workload, seed=0)), 1.0).key


def _baseline(name: str | None, contenders: Sequence[Contender]) -> str:
    labels = [one.label for one in contenders]
    if name is None:
        return labels[-1]
    if name not in labels:
        raise LabError(f"--baseline {name} is none of the --policies: {', '.join(labels)}.")
    return name
