"""From rows to a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from conserve_serving.lab.errors import LabError
from conserve_serving.lab.report import (
    atrate,
    conditions,
    curves,
    losses,
    paperside,
    sensitivity,
    tiers,
    where,
)
from conserve_serving.lab.report.carried import Capacities, carried
from conserve_serving.lab.report.context import Context
from conserve_serving.lab.report.document import (
    Block,
    Claim,
    Condition,
    PaperValue,
    Report,
    Section,
)
from conserve_serving.lab.report.html import to_html
from conserve_serving.lab.report.markdown import to_markdown
from conserve_serving.lab.report.rows import Rows

#: Sections in the order of the page.
SECTIONS: Final = (
    "claims",
    "curves",
    "bars",
    "tiers",
    "losses",
    "sensitivity",
    "where",
    "conditions",
)
#: A page beyond this is refused: it is to be mailed and opened anywhere.
MAX_HTML_BYTES: Final = 3_000_000


def render(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    subtitle: str = "",
    summary: Sequence[str] = (),
    ours: Sequence[str] | None = None,
    claims: Sequence[Claim] = (),
    paper: Sequence[PaperValue] = (),
    rate_per_s: float | None = None,
    capacities: Capacities | None = None,
    conditions_given: Sequence[Condition] = (),
    sections: Sequence[str] = SECTIONS,
    verdicts: Sequence[Block] = (),
) -> Report:
    """A report of many cells.

    Args:
        rows: of ``lab.cell.run_cell``, as read from a file of JSON lines.
        title, subtitle, summary: above everything; the summary in paragraphs.
        ours: labels of the contenders that are ConServe's, the most important first; None: all
            whose policy begins with ``conserve``.
        claims: the paper's claims beside what came out.
        paper: the paper's figures, drawn beside ours in the bars.
        rate_per_s: the load of the bars, the sensitivities and of where the time goes; None: at
            each place the highest that one of ours carries.
        capacities: what each cluster's parts can carry; None: counted here, which reads the
            workloads.
        conditions_given: assumptions and circumstances that the rows do not have.
        verdicts: who wins on which cluster, instead of the report's own tables that say so
            (``lab.tier_tables``).
        sections: which, in the page's order whatever the order here.

    Returns:
        HTML and Markdown; equal arguments give equal text.

    Raises:
        LabError: the rows cannot be used (the text says which and why), a section does not exist,
            or the page came out larger than ``MAX_HTML_BYTES``.
    """
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise LabError(
            f"sections: there is no section {unknown[0]!r}. There are: {', '.join(SECTIONS)}."
        )
    context = Context.of(Rows(rows), ours, rate_per_s=rate_per_s)
    uncounted: dict[str, str] = {}
    if capacities is None and "tiers" in sections:
        capacities, uncounted = carried(context.rows)
    met = losses.meetings(context)
    made: dict[str, Callable[[], Section]] = {
        "claims": lambda: paperside.section(claims),
        "curves": lambda: curves.section(context),
        "bars": lambda: atrate.section(context, paper=paper),
        "tiers": lambda: tiers.section(context, capacities or {}, uncounted, verdicts=verdicts),
        "losses": lambda: losses.section(context, met),
        "sensitivity": lambda: sensitivity.section(context),
        "where": lambda: where.section(context),
        "conditions": lambda: conditions.section(context, conditions_given),
    }
    page = [made[name]() for name in SECTIONS if name in sections]
    arguments: dict[str, Any] = {
        "title": title,
        "subtitle": subtitle,
        "summary": summary,
        "tiles": (*conditions.tiles(context), *losses.tiles(met)),
        "sections": [section for section in page if section.blocks],
        "footer": "Made by conserve report from the rows alone; equal rows give an equal file.",
    }
    html = to_html(**arguments)
    if len(html.encode()) > MAX_HTML_BYTES:
        raise LabError(
            f"the page would have {len(html.encode()) / 1e6:.1f} MB; {MAX_HTML_BYTES / 1e6:g} MB "
            "is the most. Give fewer rows or fewer sections, or several reports."
        )
    return Report(html=html, markdown=to_markdown(**arguments))
