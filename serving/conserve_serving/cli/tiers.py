"""``conserve tiers``: on which cluster, load and workload conversation-level placement wins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import TaskID
from rich.table import Table
from rich.text import Text

from conserve_serving.cli.lab_options import (
    RATES,
    CommaList,
    contender_help,
    find_cluster,
    find_contenders,
    lab_errors,
)
from conserve_serving.cli.lab_run import Runner
from conserve_serving.cli.lab_tables import plain_console
from conserve_serving.cli.params import FiniteRange, check_writable
from conserve_serving.cli.workload import cap_options
from conserve_serving.lab import tier_tables, tier_text
from conserve_serving.lab.cell import Cell, run_cell
from conserve_serving.lab.cluster_spec import ClusterSpec
from conserve_serving.lab.errors import RunError
from conserve_serving.lab.grid import Results, Row, failed
from conserve_serving.lab.report import document, render
from conserve_serving.lab.report.carried import carried
from conserve_serving.lab.report.rows import Rows
from conserve_serving.lab.tier_verdicts import SiteVerdict, verdicts
from conserve_serving.lab.tiers import (
    CONTENDERS,
    REFERENCES,
    SHARES,
    TOLERANCE,
    WORKLOADS,
    Plan,
    clusters_of,
    reference_of,
    run_plan,
    with_right_sized,
)
from conserve_serving.lab.workloads import WorkloadSpec

_AT_LEAST_ONE = click.IntRange(min=1)
_FILE = click.Path(dir_okay=False, path_type=Path)
_STYLES = {
    document.Tone.GOOD: "green",
    document.Tone.BAD: "red",
    document.Tone.SOFT: "dim",
}
#: Of a trace, where nothing is said.
_CONVERSATIONS = 200
_SECTIONS = ("tiers", "losses", "where", "conditions")


@click.command(epilog="\b\nContenders:\n" + contender_help())
@click.option(
    "--workloads",
    type=CommaList(click.Choice(list(WORKLOADS))),
    help=f"Generated ones, of {', '.join(WORKLOADS)}.  [default: all]",
)
@click.option("--trace", help="A trace, or generated:NAME, instead; the caps below are for it.")
@cap_options
@click.option(
    "--model",
    type=click.Choice(list(REFERENCES)),
    default="8b",
    show_default=True,
    help="Qwen3-8B or Qwen3-32B: which clusters, and whose idle latency the SLOs are made of.",
)
@click.option(
    "--clusters",
    "names",
    type=CommaList(click.STRING),
    help="Only these.  [default: all of that model, docs/clusters.md]",
)
@click.option(
    "--clusters-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Clusters of your own (docs/clusters.md); name them in --clusters.",
)
@click.option(
    "--right-sized",
    is_flag=True,
    help="Add equal tiers that cost, and that draw, about as much as each unlike cluster.",
)
@click.option(
    "--policies",
    type=CommaList(click.STRING),
    default=",".join(CONTENDERS),
    help="Contenders, see below.  [default: ConServe's three and the strongest others]",
)
@click.option("--seeds", type=_AT_LEAST_ONE, default=3, show_default=True, help="Runs of each.")
@click.option(
    "--conversations",
    type=_AT_LEAST_ONE,
    help=f"Of each run.  [default: about 1,000 turns; of a trace {_CONVERSATIONS}]",
)
@click.option(
    "--tolerance",
    type=FiniteRange(min=0, max=1, min_open=True, max_open=True),
    default=TOLERANCE,
    show_default=True,
    help="Searches end when the loads that pass and fail are this close.",
)
@click.option(
    "--loads",
    "shares",
    type=RATES,
    default=",".join(map(str, SHARES)),
    show_default=True,
    help="Loads at which all are compared, as shares of the best contender's goodput there.",
)
@click.option(
    "--interference",
    type=FiniteRange(min=-1, min_open=True),
    default=0.25,
    show_default=True,
    help="How much longer steps that prefill and decode take than the two apart.",
)
@click.option("--link", help="A link instead of the clusters'.")
@click.option("--jobs", type=_AT_LEAST_ONE, help="Processes.  [default: one for each core]")
@click.option("--rows", "rows_path", type=_FILE, help="Append each run's figures here.")
@click.option("--resume", is_flag=True, help="Runs that --rows has already are not run again.")
@click.option("--json", "json_path", type=_FILE, help="Write verdicts and figures here.")
@click.option(
    "--html",
    "html_path",
    type=_FILE,
    default="tiers.html",
    show_default=True,
    help="Write the report here.",
)
@click.option("--markdown", "markdown_path", type=_FILE, help="Write its summary here.")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
@click.pass_context
def tiers(
    ctx: click.Context,
    /,
    *,
    workloads: tuple[str, ...] | None,
    trace: str | None,
    model: str,
    names: tuple[str, ...] | None,
    clusters_file: Path | None,
    right_sized: bool,
    policies: tuple[str, ...],
    seeds: int,
    conversations: int | None,
    tolerance: float,
    shares: tuple[float, ...],
    interference: float,
    link: str | None,
    jobs: int | None,
    rows_path: Path | None,
    resume: bool,
    json_path: Path | None,
    html_path: Path,
    markdown_path: Path | None,
    progress: bool,
    **caps: Any,
) -> None:
    """Say where dedicating a tier, hosting everywhere, or another policy carries most, and why.

    On each cluster the highest load at which 95 % of the conversations meet their SLOs is searched
    for every contender, with the same conversations under each seed; then all run at the same
    loads. SLOs are the same in seconds everywhere: multiples of what one H100 alone takes.

    The table compares the best of ConServe's contenders with the best other policy: on the same
    hardware, per dollar, per rated watt, and on equal tiers of about the same rent. With --rows and
    --resume it goes on where it was. The exit code is 1 when a run failed or was interrupted.
    """
    if resume and rows_path is None:
        raise click.UsageError("--resume needs --rows: the file to go on with.")
    check_writable(rows_path, json_path, html_path, markdown_path)
    if trace is not None and workloads is not None:
        raise click.UsageError("--trace and --workloads contradict each other.")
    given = [name for name in caps if _typed(ctx, name)]
    if trace is None and given:
        raise click.UsageError(f"{', '.join(sorted(given))}: caps are for --trace; give one.")
    said = Console(stderr=True)
    with lab_errors():
        plan = Plan(
            clusters=_clusters(model, names, clusters_file, right_sized=right_sized),
            contenders=find_contenders(policies),
            workloads=_workloads(workloads, trace, conversations, caps),
            seeds=seeds,
            reference=reference_of(model),
            mixed_slowdown=1.0 + interference,
            link=link,
            tolerance=tolerance,
            shares=shares,
        )
        results = Results(rows_path, resume=resume)
        if stale := results.from_other_code:
            said.print(
                f"warning: {stale} of {len(results.rows)} rows in {rows_path} come from another "
                "version of the code. Give another --rows to run them again.",
                style="yellow",
                soft_wrap=True,
            )
        runner = Runner(
            results, jobs, show_progress=progress, run=ctx.obj or run_cell
        )  # tests put theirs there
        rows, errors = _run(plan, runner)
        runner.say_failures(said)
        good = [row for row in rows if not failed(row)]
        if not good:
            raise RunError("no run came to its end: there is nothing to report.")
        read = Rows(good)
        capacities, _ = carried(read)
        found = verdicts(read, capacities)
        report = render(
            rows,
            title="Unlike tiers: where conversation-level placement wins",
            subtitle="through the scheduler that serves, in virtual time; "
            f"SLOs in multiples of {plan.reference.title}",
            summary=tier_text.summary(found),
            capacities=capacities,
            sections=_SECTIONS,
            verdicts=(
                tier_tables.table(found),
                tier_tables.carried(found),
                tier_tables.at_loads(found),
                *tier_tables.notes(found),
            ),
        )
        html_path.write_text(report.html, "utf-8")
        if markdown_path is not None:
            markdown_path.write_text(report.markdown, "utf-8")
        if json_path is not None:
            data = tier_tables.figures(found) | {"searches_without_answer": errors}
            json_path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    _tell(found)
    for path in (rows_path, json_path, html_path, markdown_path):
        if path is not None:
            said.print(f"written: {path}", soft_wrap=True)
    if runner.interrupted:
        go_on = "the same command with --resume goes on" if rows_path else "give --rows to resume"
        said.print(f"interrupted: the report covers what was done; {go_on}.")
    if runner.interrupted or runner.failures:
        raise SystemExit(1)


def _typed(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _clusters(
    model: str, names: tuple[str, ...] | None, file: Path | None, *, right_sized: bool
) -> list[ClusterSpec]:
    found = clusters_of(model) if names is None else [find_cluster(name, file) for name in names]
    return with_right_sized(found) if right_sized else found


def _workloads(
    names: tuple[str, ...] | None,
    trace: str | None,
    conversations: int | None,
    caps: dict[str, Any],
) -> list[WorkloadSpec]:
    if trace is not None:
        return [WorkloadSpec(source=trace, conversations=conversations or _CONVERSATIONS, **caps)]
    chosen = [WORKLOADS[name] for name in names or WORKLOADS]
    if conversations is None:
        return chosen
    return [replace(one, conversations=conversations) for one in chosen]


def _run(plan: Plan, runner: Runner) -> tuple[list[Row], list[str]]:
    tasks: dict[str, TaskID] = {}

    def run(cells: Sequence[Cell], stage: str) -> list[Row]:
        if stage not in tasks:
            tasks[stage] = runner.begin(stage, None)
        return runner.run(cells, tasks[stage])

    with runner.bar:
        return run_plan(plan, run)


def _tell(found: Sequence[SiteVerdict]) -> None:
    console = plain_console()
    console.print(_table(tier_tables.table(found)))
    for note in tier_tables.notes(found):
        console.print(note.text, soft_wrap=True, markup=False)
        console.print()
    for line in tier_text.summary(found):
        console.print(line, soft_wrap=True, markup=False)


def _table(of: document.Table) -> Table:
    table = Table(title=of.caption)
    for name in of.columns:
        table.add_column(name, overflow="fold")
    for row in of.rows:
        table.add_row(*map(_cell, row))
    return table


def _cell(of: document.Cell) -> Text:
    text = Text(of.text, _STYLES.get(of.tone, ""))
    if of.detail:
        text.append(f"\n{of.detail}", "dim")
    return text
