"""Where the time goes: seconds up to the first token of the last turn, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from conserve_serving.lab.report import svg
from conserve_serving.lab.report.atrate import chosen_rate
from conserve_serving.lab.report.bars import Stack
from conserve_serving.lab.report.bars import stacks as draw_stacks
from conserve_serving.lab.report.context import Context, say, strong
from conserve_serving.lab.report.document import (
    Block,
    Cell,
    Figure,
    LegendEntry,
    Note,
    Section,
    Table,
)
from conserve_serving.lab.report.metrics import Metric
from conserve_serving.lab.report.rows import Place
from conserve_serving.lab.report.style import PARTS, colour
from conserve_serving.lab.stats import Estimate

MAX_PLACES: Final = 8
_SETS: Final = (("all", "all conversations"), ("p95", "those at and beyond the p95"))


def section(context: Context) -> Section:
    """Every place at one load."""
    blocks: list[Block] = []
    for place in context.rows.main_places()[:MAX_PLACES]:
        rate = chosen_rate(context, place)
        if rate is not None and (figure := _figure(context, place, rate)) is not None:
            blocks.append(figure)
    if not blocks:
        blocks.append(Note("No row says where the time went.", missing=True))
    return Section(
        id="where",
        title="Where the time goes",
        help="Mean seconds of a conversation from its arrival to the first token of its last turn "
        "(TTFET), over all turns. Waiting is orange and yellow, work is blue.",
        blocks=tuple(blocks),
    )


def _part(chosen: str, part: str) -> Metric:
    return Metric(name=part, title=part, path=("where", chosen, part), unit="s")


def _figure(context: Context, place: Place, rate_per_s: float) -> Figure | None:
    labels = sorted(context.rows.contenders(place), key=lambda label: label not in context.ours)
    drawn, rows = [], []
    used: set[str] = set()
    for chosen, title in _SETS:
        stacks = []
        for label in labels:
            parts: Mapping[str, Estimate | None] = {
                part: context.rows.estimate(place, label, rate_per_s, _part(chosen, part))
                for part, _, _ in PARTS
            }
            if not any(parts.values()):
                continue
            values = {part: 0.0 if e is None else e.value for part, e in parts.items()}
            used |= {part for part, value in values.items() if value > 0}
            stacks.append(
                Stack(
                    name=context.looks[label].short,
                    parts=tuple((values[part], colour(hue)) for part, _, hue in PARTS),
                    strong=label in context.ours,
                )
            )
            figures: list[Any] = [parts[part] for part, _, _ in PARTS]
            rows.append(
                (
                    Cell(title),
                    strong(label, label in context.ours),
                    *(Cell(say(figure)) for figure in figures),
                )
            )
        if stacks:
            drawn.append(
                draw_stacks(
                    stacks,
                    title=f"{title[0].upper()}{title[1:]}, seconds",
                    label=f"Where the time goes, {title}, {place.at(rate_per_s)}",
                )
            )
    if not drawn:
        return None
    return Figure(
        title=place.at(rate_per_s),
        help=str(place.setting),
        panels=tuple(drawn),
        legend=tuple(
            LegendEntry(label=name, sample=svg.swatch(hue))
            for part, name, hue in PARTS
            if part in used
        ),
        data=Table(
            columns=("conversations", "policy", *(f"{name} (s)" for _, name, _ in PARTS)),
            rows=tuple(rows),
            texts=frozenset({"policy"}),
        ),
        wide=True,
    )
