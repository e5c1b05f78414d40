"""The HTML report: one self-contained file, readable without a network, in light and dark."""

from __future__ import annotations

import importlib.resources
import math
from typing import Any, Final

import jinja2
from markupsafe import Markup

from conserve_serving.replay import charts
from conserve_serving.replay.latencies import Ideal, conversation_latencies
from conserve_serving.replay.records import RunResult
from conserve_serving.replay.tables import (
    CONVERSATION_COLUMNS,
    TURN_COLUMNS,
    conversation_rows,
    turn_rows,
)

#: Longer tables are cut in the HTML (the JSON has every row).
MAX_TABLE_ROWS: Final = 2_000

_CDFS: Final = (
    ("first_turn_ttft", "First-turn TTFT"),
    ("ttfet", "TTFET"),
    ("last_turn_tbt", "Last-turn TBT"),
    ("e2e", "E2E"),
)


def render_report(result: RunResult, figures: dict[str, Any], *, ideal: Ideal | None) -> str:
    """The report of a run.

    Args:
        result: what was measured.
        figures: of :func:`conserve_serving.replay.figures.figures`.
        ideal: as given to it.

    Returns:
        HTML, UTF-8.
    """
    records = [record for record in result.conversations if record.turns]
    end_s = max(
        (
            t.last_token_s if t.last_token_s is not None else t.due_s
            for record in records
            for t in record.turns
        ),
        default=0.0,
    )
    names = [e.id for sample in result.samples for e in sample.cluster.engines]
    for record in records:
        for turn in record.turns:
            names += [name for name in (turn.prefill_engine, turn.decode_engine) if name]
    classes = charts.engine_classes(names)
    complete = [conversation_latencies(record) for record in records if record.complete]
    cdfs = []
    for name, title in _CDFS:
        values = [value for latencies in complete if (value := latencies[name]) is not None]
        in_ms = name == "last_turn_tbt"
        scaled = [value * 1000 for value in values] if in_ms else values
        cdfs.append(_svg(charts.cdf(scaled, title=title, unit=" ms" if in_ms else " s")))
    conversations, turns = conversation_rows(result, ideal), turn_rows(result)
    text = (
        importlib.resources.files(__package__)
        .joinpath("templates/report.html.j2")
        .read_text("utf-8")
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(num=format_number, sec=format_seconds)
    return environment.from_string(text).render(
        f=figures,
        c=figures["conditions"],
        classes=classes,
        own_lanes=len(records) <= charts.OWN_LANES,
        timeline=_svg(charts.timeline(records, classes, end_s)),
        occupancy=_svg(charts.occupancy(result.samples, classes, end_s))
        if len(result.samples) > 1
        else None,
        cdfs=cdfs,
        conversation_columns=CONVERSATION_COLUMNS,
        conversations=conversations[:MAX_TABLE_ROWS],
        conversations_total=len(conversations),
        turn_columns=TURN_COLUMNS,
        turns=turns[:MAX_TABLE_ROWS],
        turns_total=len(turns),
    )


def _svg(text: str) -> Markup:
    return Markup(text)  # noqa: S704 - our own SVG; names in it are escaped where it is made


def format_number(value: object) -> str:
    """A value as people read it: of what is no whole number, three significant digits.

    A dash stands for what is unknown, ``no limit`` for infinity.
    """
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "no limit"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    exponent = int(f"{value:.2e}".rpartition("e")[2])  # of the rounded value: 9.996 is 10.0
    return f"{value:,.{min(max(0, 2 - exponent), 6)}f}"


def format_seconds(value: float | None) -> str:
    """A duration with its unit: milliseconds below one second."""
    if value is None:
        return "–"
    return f"{value * 1000:.3g} ms" if abs(value) < 1 else f"{format_number(value)} s"
