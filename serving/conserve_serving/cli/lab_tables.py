"""What `conserve compare` prints: pure functions from rows to tables."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from conserve_serving.lab.goodput import Target
from conserve_serving.lab.stats import Estimate, Verdict, difference, mean, ratio, verdict
from conserve_serving.replay.report import format_number

Row = Mapping[str, Any]

#: Columns where no terminal says how many there are.
_PLAIN_WIDTH: Final = 160
_STYLE: Final = {Verdict.WIN: "green", Verdict.LOSS: "red", Verdict.TIE: "dim"}


def plain_console() -> Console:
    """Standard output; wide enough for a table where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH)


# --- many cells -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A column: where it is in a row, and which way is better.

    A ``share`` is shown in per cent and compared by percentage points: next to none, twice as many
    are still next to none.
    """

    title: str
    of: Callable[[Row], float | None]
    higher_is_better: bool = False
    share: bool = False


def _p95(name: str) -> Callable[[Row], float | None]:
    return lambda row: row["latency"][name]["p95"]


FIGURES: Final = (
    Figure(title="TTFET p95\n/ idle", of=_p95("ttfet_s_normalized")),
    Figure(title="first-turn TTFT p95\n/ idle", of=_p95("first_turn_ttft_s_normalized")),
    Figure(title="last-turn TBT p95\n/ idle", of=_p95("last_turn_tbt_s_normalized")),
    Figure(title="E2E p95\n/ idle", of=_p95("e2e_s_normalized")),
    Figure(
        title="%\nwithin SLO",
        of=lambda row: row["slo"]["all"],
        higher_is_better=True,
        share=True,
    ),
    Figure(title="tokens\nper joule", of=lambda row: row["tokens_per_j"], higher_is_better=True),
)


def comparison(rows: Sequence[Row], *, baseline: str) -> Iterable[RenderableType]:
    """A table for each cluster, link, interference and load, contenders against the baseline.

    Args:
        rows: that did not fail.
        baseline: label of the contender that the others are compared with.
    """
    points: dict[tuple[Any, ...], dict[str, dict[int, Row]]] = {}
    for row in rows:
        cell = row["cell"]
        share = cell["share_of_capacity"]
        point = (
            cell["cluster"]["name"],
            cell["link"],
            cell["mixed_slowdown"],
            share is None,
            cell["workload"]["rate_per_s"] if share is None else share,
        )
        seeds = points.setdefault(point, {}).setdefault(cell["contender"]["label"], {})
        seeds[cell["workload"]["seed"]] = row
    for point, contenders in points.items():
        yield _point_table(point, contenders, baseline)
        yield Text()


def place_title(cluster: str, link: str | None, mixed_slowdown: float) -> str:
    """Where contenders meet, in words."""
    over = f", link {link}" if link else ""
    return f"{cluster}{over}, interference +{100 * (mixed_slowdown - 1):g} %"


def _point_table(
    point: tuple[Any, ...], contenders: Mapping[str, Mapping[int, Row]], baseline: str
) -> RenderableType:
    cluster, link, slowdown, by_rate, load = point
    seeds = max(map(len, contenders.values()))
    title = place_title(cluster, link, slowdown)
    if load is None:
        title += ", recorded arrivals"
    elif by_rate:
        title += f", {load:g} conversations/s"
    else:
        title += f", {100 * load:g} % of each one's capacity"
    table = bare_table("", *(figure.title for figure in FIGURES), "KV\ntransfers")
    for label, by_seed in contenders.items():
        runs = list(by_seed.values())
        name = Text(label)
        rates = [row["cell"]["workload"]["rate_per_s"] for row in runs]
        if not by_rate:
            name.append(f"\n{format_number(math.fsum(rates) / len(rates))}/s", style="dim")
        if sum(bool(row["saturated"]) for row in runs) * 2 > len(runs):
            name.append("\nsaturated", style="yellow")
        others = contenders.get(baseline, {}) if label != baseline else {}
        moved = [row["transfers_per_conversation"]["mean"] or 0.0 for row in runs]
        table.add_row(
            name,
            *(_compared(figure, by_seed, others) for figure in FIGURES),
            format_number(round(math.fsum(moved) / len(moved), 3)),
        )
    return Group(Text(f"{title} ({seeds} seed{'s' * (seeds != 1)})", style="bold"), table)


def _compared(figure: Figure, ours: Mapping[int, Row], theirs: Mapping[int, Row]) -> Text:
    values = {seed: value for seed, row in ours.items() if (value := figure.of(row)) is not None}
    if not values:
        return Text("–")
    say = _hundredths if figure.share else format_number
    text = Text(_interval(mean(list(values.values())), say))
    others = {seed: value for seed, row in theirs.items() if (value := figure.of(row)) is not None}
    paired = [seed for seed in values if seed in others]
    a, b = [values[seed] for seed in paired], [others[seed] for seed in paired]
    if not paired or not (figure.share or min(b) > 0):
        return text
    found = difference(a, b) if figure.share else ratio(a, b)
    none = 0.0 if figure.share else 1.0
    said = verdict(found, higher_is_better=figure.higher_is_better, none=none)
    text.append("\n")
    text.append(
        _change(found, none=none, unit="pp" if figure.share else "%"),
        style=_STYLE.get(said, "dim"),
    )
    return text


def goodput_table(
    found: Mapping[str, Sequence[float | None]], target: Target, *, place: str, baseline: str
) -> RenderableType:
    """What each contender carries.

    Args:
        found: rates by contender, one for each seed in the same order; None where a run failed.
        target: which highest rate.
        place: cluster, link and interference, as the title says them.
        baseline: label of the contender that the others are compared with.
    """
    titles = {
        Target.CAPACITY: "capacity: completed under overload",
        Target.TTFET: "goodput: at most 5 % miss the TTFET SLO",
        Target.TTFET_WITHOUT_GAPS: "goodput: at most 5 % miss the TTFET SLO, gaps left out",
        Target.ANY: "goodput: at most 5 % miss any SLO",
    }
    table = bare_table("", "conversations/s", f"against {baseline}")
    for label, rates in found.items():
        known = [rate for rate in rates if rate is not None]
        value = _interval(mean(known), format_number) if known else "–"
        change = Text("")
        pairs = [
            (ours, theirs)
            for ours, theirs in zip(rates, found.get(baseline, ()), strict=False)
            if ours is not None and theirs
        ]
        if label != baseline and pairs:
            compared = ratio([a for a, _ in pairs], [b for _, b in pairs])
            said = verdict(compared, higher_is_better=True)
            change = Text(_change(compared), style=_STYLE.get(said, "dim"))
        table.add_row(label, value, change)
    return Group(Text(f"{place}, {titles[target]}", style="bold"), table)


def _interval(of: Estimate, say: Callable[[float], str]) -> str:
    return say(of.value) if of.n < 2 else f"{say(of.value)} [{say(of.low)}, {say(of.high)}]"


def _change(of: Estimate, *, none: float = 1.0, unit: str = "%") -> str:
    def percent(value: float) -> str:
        change = 100 * (value - none)
        return f"{change:+.1f}" if abs(change) < 9.95 else f"{change:+.0f}"

    if of.n < 2:
        return f"{percent(of.value)} {unit}"
    return f"{percent(of.value)} {unit} [{percent(of.low)}, {percent(of.high)}]"


def _hundredths(share: float) -> str:
    return f"{100 * share:.3g}"


# --- words ----------------------------------------------------------------------------------------


def bare_table(*columns: str) -> Table:
    """A table without lines: the first column to the left, figures to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    return table
