"""The paper's figure beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from conserve_serving.lab.report.context import say
from conserve_serving.lab.report.document import Cell, Claim, Outcome, Section, Table, Tone

_TONES: Final = {
    Outcome.MET: Tone.GOOD,
    Outcome.PARTLY: Tone.EVEN,
    Outcome.NOT_MET: Tone.BAD,
    Outcome.NOT_RUN: Tone.SOFT,
}


def section(claims: Sequence[Claim]) -> Section:
    """One row for each claim; no blocks where there are no claims."""
    rows = tuple(
        (
            Cell(one.claim),
            Cell(one.paper),
            Cell(one.ours if isinstance(one.ours, str) else say(one.ours, one.unit)),
            Cell(str(one.outcome), _TONES[one.outcome]),
            Cell(one.loads),
            Cell(one.reason),
        )
        for one in claims
    )
    table = Table(
        columns=("claim", "paper", "ours", "met?", "at which loads", "why it differs"),
        rows=rows,
        texts=frozenset({"claim", "ours", "at which loads", "why it differs"}),
    )
    return Section(
        id="claims",
        title="The paper’s figures beside ours",
        help="Ours with its 95 % bootstrap interval over seeds.",
        blocks=(table,) if rows else (),
    )
