"""``conserve reproduce``: the paper's testbed and claims, asked of this scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from conserve_serving.cli.lab_options import RATES, CommaList, lab_errors
from conserve_serving.cli.lab_run import Runner
from conserve_serving.cli.lab_tables import plain_console
from conserve_serving.cli.params import check_writable
from conserve_serving.cli.workload import cap_options
from conserve_serving.lab.errors import RunError
from conserve_serving.lab.grid import Results, Row, failed
from conserve_serving.lab.report import Claim, Outcome, render
from conserve_serving.lab.report.context import say
from conserve_serving.lab.report.paper import PAPER, RATE_PER_S
from conserve_serving.lab.report.rows import Rows
from conserve_serving.lab.reproduce import claims, figures
from conserve_serving.lab.studies import PAPER_MAX_TURNS, Size, Study, studies
from conserve_serving.lab.workloads import WorkloadSpec

_AT_LEAST_ONE = click.IntRange(min=1)
_FILE = click.Path(dir_okay=False, path_type=Path)
_STUDIES = (
    "transient",
    "steady",
    "interference",
    "capped",
    "tiers",
    "policies",
    "links",
    "ratio",
)
_STYLES = {Outcome.MET: "green", Outcome.NOT_MET: "red", Outcome.PARTLY: "yellow"}


@click.command()
@click.option(
    "--trace",
    default="generated:swebench",
    show_default=True,
    help="The paper's trace, or any other; a file, or generated:NAME.",
)
@cap_options
@click.option(
    "--all-turns",
    is_flag=True,
    help=f"Do not cap conversations at {PAPER_MAX_TURNS} turns, as the paper does.",
)
@click.option(
    "--rates",
    type=RATES,
    help="Loads as the paper sends them.  [default: the paper's; uncapped: shares of capacity]",
)
@click.option("--seeds", type=_AT_LEAST_ONE, default=12, show_default=True, help="Runs of each.")
@click.option(
    "--conversations",
    type=_AT_LEAST_ONE,
    default=1000,
    show_default=True,
    help="Of each steady run.",
)
@click.option(
    "--transient-conversations",
    type=_AT_LEAST_ONE,
    default=255,
    show_default=True,
    help="Of each other run: the paper's number.",
)
@click.option(
    "--studies",
    "only",
    type=CommaList(click.Choice(_STUDIES)),
    help="Only these, of " + ", ".join(_STUDIES) + ".",
)
@click.option("--jobs", type=_AT_LEAST_ONE, help="Processes.  [default: one for each core]")
@click.option("--rows", "rows_path", type=_FILE, help="Append each run's figures here.")
@click.option("--resume", is_flag=True, help="Runs that --rows has already are not run again.")
@click.option("--json", "json_path", type=_FILE, help="Write claims and curves here.")
@click.option(
    "--html",
    "html_path",
    type=_FILE,
    default="reproduction.html",
    show_default=True,
    help="Write the report here.",
)
@click.option("--markdown", "markdown_path", type=_FILE, help="Write its summary here.")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
def reproduce(
    *,
    trace: str,
    all_turns: bool,
    rates: tuple[float, ...] | None,
    seeds: int,
    conversations: int,
    transient_conversations: int,
    only: tuple[str, ...] | None,
    jobs: int | None,
    rows_path: Path | None,
    resume: bool,
    json_path: Path | None,
    html_path: Path,
    markdown_path: Path | None,
    progress: bool,
    **caps: Any,
) -> None:
    """Ask the paper's claims of this scheduler: same testbed, same loads, honest baselines.

    Runs ConServe and its rivals in virtual time through the scheduler that serves traffic, with
    queueing, transfers and idle power in, and says at which loads each claim holds, with 95 %
    intervals over seeds. Minutes on two cores; with --rows and --resume it goes on where it was.

    The exit code is 1 when a run failed or was interrupted; whether claims hold does not matter.
    """
    if resume and rows_path is None:
        raise click.UsageError("--resume needs --rows: the file to go on with.")
    check_writable(rows_path, json_path, html_path, markdown_path)
    if all_turns and caps["max_turns"] is not None:
        raise click.UsageError("--all-turns and --max-turns contradict each other.")
    if not all_turns and caps["max_turns"] is None:
        caps["max_turns"] = PAPER_MAX_TURNS
    with lab_errors():
        workload = WorkloadSpec(source=trace, **caps)
        size = Size(
            seeds=seeds,
            conversations=conversations,
            transient_conversations=transient_conversations,
        )
        chosen = studies(workload, size, rates_per_s=rates, only=only)
        runner = Runner(Results(rows_path, resume=resume), jobs, show_progress=progress)
        done = _run(chosen, runner)
        said = Console(stderr=True)
        runner.say_failures(said)
        good = [row for row in done if not failed(row)]
        if not good:
            raise RunError("no run came to its end: there is nothing to report.")
        made = claims(Rows(good))
        _write(
            done,
            made,
            chosen,
            json_path=json_path,
            html_path=html_path,
            markdown_path=markdown_path,
        )
    plain_console().print(claim_table(made))
    for path in (rows_path, json_path, html_path, markdown_path):
        if path is not None:
            said.print(f"written: {path}", soft_wrap=True)
    if runner.interrupted:
        go_on = "the same command with --resume goes on" if rows_path else "give --rows to resume"
        said.print(f"interrupted: the report covers what was done; {go_on}.")
    if runner.interrupted or runner.failures:
        raise SystemExit(1)


def _run(chosen: list[Study], runner: Runner) -> list[Row]:
    rows: list[Row] = []
    with runner.bar:
        for study in chosen:
            task = runner.begin(f"{study.name}: {study.about}", len(study.cells))
            rows += runner.run(study.cells, task)
    return rows


def _write(
    rows: list[Row],
    made: list[Claim],
    chosen: list[Study],
    *,
    json_path: Path | None,
    html_path: Path,
    markdown_path: Path | None,
) -> None:
    if json_path is not None:
        text = json.dumps(figures(Rows(rows), made), indent=1)
        json_path.write_text(text + "\n", "utf-8")
    spec = chosen[0].cells[0].workload
    workload = Path(spec.source).name.split(".")[0]
    if spec.max_turns:
        workload += f", first {spec.max_turns} turns"
    loads = {cell.workload.rate_per_s for study in chosen for cell in study.cells}
    paper = RATE_PER_S in loads
    report = render(
        rows,
        title="The paper's claims, asked again",
        subtitle=f"{workload}: ConServe and its rivals, through the scheduler that serves, in "
        "virtual time",
        claims=made,
        paper=PAPER if paper else (),
        rate_per_s=RATE_PER_S if paper else None,
    )
    html_path.write_text(report.html, "utf-8")
    if markdown_path is not None:
        markdown_path.write_text(report.markdown, "utf-8")


def claim_table(made: list[Claim]) -> Table:
    """The claims for a terminal; the report has every load and the reasons."""
    table = Table(title="The paper's claims beside ours: change at the highest load, 95 % interval")
    table.add_column("claim")
    for name in ("paper", "ours", "met?", "reached at"):
        table.add_column(name)
    for one in made:
        ours = one.ours if isinstance(one.ours, str) else say(one.ours, one.unit)
        style = _STYLES.get(one.outcome, "")
        table.add_row(one.claim, one.paper, ours, f"[{style}]{one.outcome}[/]", one.reached)
    return table
