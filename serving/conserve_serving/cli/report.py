"""``conserve report``: from the rows of many runs to a page and a summary."""

from __future__ import annotations

from pathlib import Path

import click

from conserve_serving.cli.lab_options import CommaList, lab_errors
from conserve_serving.cli.params import FiniteRange, check_writable
from conserve_serving.lab.errors import LabError
from conserve_serving.lab.grid import read_results
from conserve_serving.lab.report import SECTIONS, render
from conserve_serving.lab.report.paper import PAPER

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument(
    "rows", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--html", "html_path", type=_FILE, help="Write the page here: one file.")
@click.option("--markdown", "markdown_path", type=_FILE, help="Write the summary here.")
@click.option("--title", default="Policies compared", show_default=True, help="Heading.")
@click.option(
    "--ours",
    type=CommaList(click.STRING),
    help="Contenders that are ConServe's, the most important first.  [default: conserve*]",
)
@click.option(
    "--rate",
    type=FiniteRange(min=0, min_open=True),
    help="Load of the bars, the sensitivities and of where the time goes."
    "  [default: the highest that ConServe carries]",
)
@click.option(
    "--sections",
    type=CommaList(click.Choice(SECTIONS)),
    default=",".join(SECTIONS),
    help="Only these, of " + ", ".join(SECTIONS) + ".",
)
@click.option(
    "--paper/--no-paper",
    default=False,
    show_default=True,
    help="Draw the paper's figures beside those of its testbed (at --rate 1.634).",
)
def report(
    *,
    rows: tuple[Path, ...],
    html_path: Path | None,
    markdown_path: Path | None,
    title: str,
    ours: tuple[str, ...] | None,
    rate: float | None,
    sections: tuple[str, ...],
    paper: bool,
) -> None:
    """Make a report of the rows that `conserve compare --out ROWS` wrote.

    Load curves with intervals, every policy at one load, clusters compared at equal hardware, cost
    and power, where ConServe does not win, what the answer hangs on, where the time goes, and the
    conditions. Of equal runs in several files the last counts. Equal rows give an equal page.
    """
    if html_path is None and markdown_path is None:
        raise click.UsageError("give --html FILE or --markdown FILE, or both.")
    check_writable(html_path, markdown_path)
    with lab_errors():
        known = {key: row for path in rows for key, row in read_results(path).items()}
        if not known:
            names = ", ".join(map(str, rows))
            raise LabError(f"{names}: there is no row in it. Run `conserve compare --out` first.")
        made = render(
            list(known.values()),
            title=title,
            ours=ours,
            rate_per_s=rate,
            sections=sections,
            paper=PAPER if paper else (),
        )
        for path, text in ((html_path, made.html), (markdown_path, made.markdown)):
            if path is not None:
                path.write_text(text, encoding="utf-8")
                click.echo(f"written: {path}", err=True)
