"""What a report is made of: sections of text, tables and figures; how they are written down is
decided elsewhere (``html``, ``markdown``)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from conserve_serving.lab.stats import Estimate


class Tone(StrEnum):
    """What a cell says at a glance; its words say the same, for those who do not see colours."""

    PLAIN = "plain"
    GOOD = "good"
    EVEN = "even"
    BAD = "bad"
    SOFT = "soft"
    OURS = "ours"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table; ``detail`` stands below, smaller."""

    text: str
    tone: Tone = Tone.PLAIN
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns and rows; ``texts`` names the columns that hold words, not figures."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    texts: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class LegendEntry:
    """A name and the picture (inline SVG) that stands for it."""

    label: str
    sample: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Panels that share one legend.

    Attributes:
        title, help: above the panels.
        panels: inline SVG, each with its own caption.
        legend: shared by the panels.
        data: the figures that are drawn, for those who want to read them.
        wide: panels are as wide as the page, not side by side.
    """

    title: str
    panels: tuple[str, ...]
    help: str = ""
    legend: tuple[LegendEntry, ...] = ()
    data: Table | None = None
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph; ``missing`` ones say what the rows did not have."""

    text: str
    missing: bool = False


Block: TypeAlias = Table | Figure | Note


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what stands below it.

    Attributes:
        id: names it in links and in the argument ``sections`` of ``render``.
        own_page: begins on a new page in print.
    """

    id: str
    title: str
    blocks: tuple[Block, ...]
    help: str = ""
    own_page: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A figure to see first."""

    name: str
    big: str
    small: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Both forms of a report; equal rows give equal text."""

    html: str
    markdown: str


class Outcome(StrEnum):
    """Whether a claim holds in our rows."""

    MET = "met"
    PARTLY = "partly"
    NOT_MET = "not met"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What the paper says beside what we saw.

    Attributes:
        claim: in words, with what it is against.
        paper: the paper's figure, with its unit.
        ours: our figure; an estimate is written with its interval.
        unit: of ``ours``, where that is an estimate.
        outcome: whether it holds.
        loads: at which loads it does.
        reached: the same in a few words.
        reason: why ours differs.
    """

    claim: str
    paper: str
    ours: Estimate | str
    outcome: Outcome
    unit: str = ""
    loads: str = ""
    reached: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """An assumption or a circumstance.

    Attributes:
        name, value: what it is.
        confidence: of a profile's grades (measured, published, derived, assumed) or in words.
        source: where it is from.
    """

    name: str
    value: str
    confidence: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperValue:
    """A figure of the paper, drawn as a tick beside our bar.

    Attributes:
        contender: label of the contender it is drawn beside.
        metric: name of one of ``metrics.METRICS``.
        rate_per_s: arrivals it belongs to.
        value: the figure.
    """

    contender: str
    metric: str
    rate_per_s: float
    value: float
