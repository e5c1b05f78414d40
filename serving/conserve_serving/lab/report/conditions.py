"""Under which conditions: what was run, what it stands on, and how much that can be trusted."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Final

from conserve_serving.engines.profile import PARTS, Confidence
from conserve_serving.lab.boards import board_of
from conserve_serving.lab.contenders import ABOUT
from conserve_serving.lab.errors import LabError
from conserve_serving.lab.report.context import Context
from conserve_serving.lab.report.document import (
    Block,
    Cell,
    Condition,
    Note,
    Section,
    Table,
    Tile,
    Tone,
)
from conserve_serving.lab.report.hardware import hardware, profile_of
from conserve_serving.lab.report.rows import say_interference, say_rate
from conserve_serving.lab.stats import CONFIDENCE, MARGIN, RESAMPLES
from conserve_serving.replay.report import format_number

_PACKAGES: Final = ("conserve-agents", "numpy", "matplotlib")
_FEW_SEEDS: Final = 12
_FEW_CONVERSATIONS: Final = 1000
_GRADES: Final = {
    Confidence.MEASURED.value: Tone.GOOD,
    Confidence.ASSUMED.value: Tone.BAD,
}


def tiles(context: Context) -> tuple[Tile, ...]:
    """How much was run, for the top of the page."""
    rows = context.rows.all
    seeds = {row.seed for row in rows}
    conversations = sum(int(row.raw.get("conversations") or 0) for row in rows)
    turns = sum(int(row.raw.get("turns") or 0) for row in rows)
    return (
        Tile(name="Runs", big=format_number(len(rows)), small=_spread(context)),
        Tile(name="Seeds", big=format_number(len(seeds)), small="paired: equal arrivals for all"),
        Tile(
            name="Conversations simulated",
            big=format_number(conversations),
            small=f"{format_number(turns)} turns",
        ),
    )


def _spread(context: Context) -> str:
    rows = context.rows.all
    clusters = len({row.place.cluster for row in rows})
    workloads = len({row.place.workload for row in rows})
    return (
        f"{_count(clusters, 'cluster')}, {_count(workloads, 'workload')}, "
        f"{_count(len(context.rows.contenders()), 'policy')}"
    )


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun.removesuffix('y')}ies" if noun.endswith("y") else f"{number} {noun}s"


def section(context: Context, given: Sequence[Condition]) -> Section:
    """Assumptions with their confidence; what was run; who was compared."""
    blocks: list[Block] = [*_warnings(context)]
    conditions = [*given, *_profiles(context), *_prices(context), _versions(context)]
    blocks.append(
        Table(
            caption="What the figures stand on",
            columns=("assumption", "value", "confidence", "source"),
            rows=tuple(
                (
                    Cell(one.name),
                    Cell(one.value),
                    Cell(one.confidence, _GRADES.get(one.confidence, Tone.PLAIN)),
                    Cell(one.source),
                )
                for one in conditions
            ),
            texts=frozenset({"assumption", "value", "confidence", "source"}),
        )
    )
    blocks += [_runs(context), _policies(context)]
    return Section(
        id="conditions",
        title="Conditions",
        help="Intervals: paired bootstrap over seeds (expanded percentiles), "
        f"{100 * CONFIDENCE:g} %, "
        f"{RESAMPLES:,} resamples; a win or a loss also exceeds {100 * MARGIN:g} %. They tell how "
        "much another draw of arrivals would change a figure. What a wrong assumption would change "
        "is in the sensitivities.",
        blocks=tuple(blocks),
    )


def _warnings(context: Context) -> Iterator[Note]:
    rows = context.rows.all
    recorded = {row.place for row in rows if row.recorded}
    drawn = [place for place in context.rows.places() if place not in recorded]
    seeds = min((context.rows.seeds(place) for place in drawn), default=_FEW_SEEDS)
    least = min(int(row.raw.get("conversations") or 0) for row in rows)
    if seeds < _FEW_SEEDS:
        yield Note(
            f"Some places have {_count(seeds, 'seed')} only; {_FEW_SEEDS} are wanted for intervals "
            "to be believed.",
            missing=True,
        )
    if any(context.rows.seeds(place) > 1 for place in recorded):
        yield Note(
            "Recorded arrivals are the same under every seed, and so are the conversations: an "
            "interval over seeds is narrow there, however much another day's trace would change.",
            missing=True,
        )
    if least < _FEW_CONVERSATIONS:
        yield Note(
            f"Some runs have {least} conversations only: near saturation that is the beginning of "
            f"a queue, not its steady state. {_FEW_CONVERSATIONS:,} are wanted.",
            missing=True,
        )
    if context.rows.failures:
        causes = sorted({str(row["failure"].get("error")) for row in context.rows.failures})
        yield Note(
            f"{_count(len(context.rows.failures), 'cell')} failed and are not in any figure: "
            f"{', '.join(causes)}.",
            missing=True,
        )


def _profiles(context: Context) -> Iterator[Condition]:
    names = dict.fromkeys(
        name for place in context.rows.places() for name in hardware(context, place).profiles
    )
    for name in names:
        profile = profile_of(name)
        if profile is None:
            yield Condition(name=f"profile {name}", value="not one of this package's")
            continue
        for grade in Confidence:
            parts = [part for part in PARTS if profile.parts[part].confidence is grade]
            if parts:
                sources = dict.fromkeys(profile.parts[part].source for part in parts)
                yield Condition(
                    name=f"profile {name}",
                    value=", ".join(parts),
                    confidence=grade.value,
                    source="; ".join(sources),
                )


def _prices(context: Context) -> Iterator[Condition]:
    gpus = dict.fromkeys(
        profile.gpu
        for place in context.rows.places()
        for name in hardware(context, place).profiles
        if (profile := profile_of(name)) is not None
    )
    for gpu in gpus:
        try:
            board = board_of(gpu)
        except LabError:
            continue
        price = board.price
        yield Condition(
            name=f"price of {gpu}",
            value=f"{price.usd_per_hour:g} USD an hour (others ask {price.low_usd_per_hour:g} to "
            f"{price.high_usd_per_hour:g}), {price.date}; rated {board.rated_w:g} W",
            confidence=price.confidence,
            source=f"{price.source}; {board.rated_source}",
        )


def _versions(context: Context) -> Condition:
    """Of what made this page; rows name their format alone."""
    versions = [f"{name} {metadata.version(name)}" for name in _PACKAGES]
    formats = sorted({str(row.raw.get("format", "?")) for row in context.rows.all})
    return Condition(
        name="versions",
        value=f"{', '.join(versions)}, Python {platform.python_version()}; "
        f"rows of format {', '.join(formats)}",
    )


def _runs(context: Context) -> Table:
    rows = []
    for place in context.rows.places():
        here = [row for row in context.rows.all if row.place == place]
        seeds = sorted({row.seed for row in here})
        rates = context.rows.rates(place)
        conversations = sorted({int(row.raw.get("conversations") or 0) for row in here})
        wall_s = sum(float(row.raw.get("wall_s") or 0) for row in here)
        virtual_s = sum(float(row.raw.get("virtual_s") or 0) for row in here)
        rows.append(
            (
                Cell(f"{place.cluster}: {hardware(context, place).title}"),
                Cell(place.workload),
                Cell(place.setting.ratio),
                Cell(say_interference(place.setting.mixed_slowdown)),
                Cell(place.setting.link),
                Cell(", ".join(say_rate(rate) for rate in rates)),
                Cell(_ranges(seeds)),
                Cell(
                    " to ".join(
                        f"{n:,}" for n in dict.fromkeys((conversations[0], conversations[-1]))
                    )
                ),
                Cell(format_number(len(here))),
                Cell(format_number(virtual_s / 3600)),
                Cell(format_number(wall_s)),
            )
        )
    return Table(
        caption="What was run",
        columns=(
            "cluster",
            "workload",
            "tiers",
            "interference",
            "link",
            "conversations/s",
            "seeds",
            "conversations a run",
            "runs",
            "simulated hours",
            "seconds of wall time",
        ),
        rows=tuple(rows),
        texts=frozenset(
            {"cluster", "workload", "tiers", "interference", "link", "conversations/s"}
        ),
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs of them joined: 0–11, 20."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)


def _policies(context: Context) -> Table:
    rows = []
    for label in context.rows.contenders():
        told = next(r.raw["cell"]["contender"] for r in context.rows.all if r.contender == label)
        changed = ", ".join(f"{k} = {v}" for k, v in (told.get("settings") or {}).items())
        predictor = told.get("predictor", "none")
        rows.append(
            (
                Cell(label),
                Cell(ABOUT.get(label, f"policy {told['policy']}")),
                Cell(str(told.get("tier_mode", ""))),
                Cell("" if predictor == "none" else str(predictor)),
                Cell(changed),
            )
        )
    return Table(
        caption="Who was compared",
        columns=("policy", "what it does", "tiers", "predictor", "settings changed"),
        rows=tuple(rows),
        texts=frozenset({"what it does", "tiers", "predictor", "settings changed"}),
    )
