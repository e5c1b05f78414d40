"""What `conserve simulate` and `conserve compare` print: pure functions from rows to tables."""

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
from conserve_serving.replay.report import format_number, format_seconds

Row = Mapping[str, Any]

#: Columns where no terminal says how many there are.
_PLAIN_WIDTH: Final = 160
_STYLE: Final = {Verdict.WIN: "green", Verdict.LOSS: "red", Verdict.TIE: "dim"}

_LATENCIES: Final = (
    ("ttfet_s", "TTFET"),
    ("ttfet_without_gaps_s", "TTFET without gaps"),
    ("first_turn_ttft_s", "first-turn TTFT"),
    ("tail_turn_ttft_s", "tail-turn TTFT"),
    ("last_turn_tbt_s", "last-turn TBT"),
    ("e2e_s", "end to end"),
)
_PARTS: Final = (
    ("held", "held for room, or behind another turn"),
    ("prefill_queue", "queued for prefill"),
    ("prefill", "prefill"),
    ("handoff", "KV on its way"),
    ("decoder_wait", "waiting at the decoder"),
    ("decode", "decode of earlier turns"),
    ("gaps", "tool gaps"),
)


def plain_console() -> Console:
    """Standard output; wide enough for a table where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH)


# --- one cell -------------------------------------------------------------------------------------


def cell_table(row: Row) -> RenderableType:
    """One run as a person wants to read it.

    Args:
        row: of :func:`conserve_serving.lab.cell.run_cell`.
    """
    parts: list[RenderableType] = [
        Text(_headline(row), style="bold"),
        Text(),
        _latencies(row["latency"], gaps=bool(_part(row, "all", "gaps"))),
        Text(),
        _facts(row),
        Text(),
        _where(row),
        Text(),
        _engines(row["engines"]),
    ]
    parts += [Text(f"note: {note}", style="yellow") for note in _notes(row)]
    return Group(*parts)


def _headline(row: Row) -> str:
    cell, virtual = row["cell"], format_seconds(row["virtual_s"])
    rate = cell["workload"]["rate_per_s"]
    return (
        f"{cell['contender']['label']} on {cell['cluster']['name']}: {row['workload']['name']}, "
        f"{row['conversations']:,} conversations, {row['turns']:,} turns"
        + (f" at {rate:g} conversations/s" if rate else " as recorded")
        + f"; {virtual} of virtual time in {format_seconds(row['wall_s'])}"
    )


def _latencies(latency: Mapping[str, Any], *, gaps: bool) -> Table:
    table = _table("", "p50", "p95", "p99", "p50 / idle", "p95 / idle")
    for key, title in _LATENCIES:
        if key == "ttfet_without_gaps_s" and not gaps:
            continue
        absolute, alone = latency[key], latency.get(f"{key}_normalized", {})
        table.add_row(
            title,
            *(format_seconds(absolute[p]) for p in ("p50", "p95", "p99")),
            *(format_number(alone.get(p)) for p in ("p50", "p95")),
        )
    return table


def _facts(row: Row) -> Table:
    slo, tokens = row["slo"], row["tokens"]
    transfers = row["transfers_per_conversation"]
    rates = [row["arrival_rate_per_s"], row["completion_rate_per_s"]]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    met = ", ".join(
        f"{name} {_percent(slo[key])}"
        for key, name in (
            ("ttfet", "TTFET"),
            ("first_turn_ttft", "first-turn TTFT"),
            ("last_turn_tbt", "last-turn TBT"),
            ("e2e", "E2E"),
        )
    )
    low, high = row["tokens_per_j_high"], row["tokens_per_j_low"]
    for name, value in (
        (f"within {slo['factor']:g} × idle", f"{_percent(slo['all'])} in all ({met})"),
        (
            "tokens per joule",
            f"{format_number(row['tokens_per_j'])}, {format_number(low)} to {format_number(high)} "
            "between the power models (modelled, idle power included)",
        ),
        (
            "KV transfers",
            f"mean {format_number(transfers['mean'])} per conversation, max "
            f"{format_number(transfers['max'])}{_reasons(row['transfers'])}",
        ),
        (
            "tokens",
            f"{tokens['prompt']:,} prompt ({_share(tokens['cached'], tokens['prompt'])} cached), "
            f"{tokens['output']:,} output, {tokens['recomputed']:,} computed again",
        ),
        (
            "KV out of memory",
            f"{row['parks']:,} parked, {row['evicted_tokens']:,} tokens evicted, "
            f"{row['dropped_tokens']:,} dropped, {row['retractions']:,} requests put back",
        ),
        ("held", _reasons(row["holds"]).strip(" ()") or "none"),
        ("arrived, finished per s", " → ".join(format_number(rate) for rate in rates)),
    ):
        table.add_row(name, value)
    return table


def _where(row: Row) -> RenderableType:
    where = row["where"]
    if where["all"] is None:
        return Text("no conversation was finished")
    table = _table("time to TTFET, mean seconds", "all", "slowest 5 %", "slowest 5 % / idle")
    for part, title in _PARTS:
        values = [where[name][part] for name in ("all", "p95", "p95_normalized")]
        if any(values):
            table.add_row(title, *(format_number(round(value, 3)) for value in values))
    for key, title, style in (
        ("ttfet_s", "TTFET", "bold"),
        ("ideal_ttfet_s", "alone, on the idle cluster", "bold"),
        ("ideal_prefill", "  of it prefill", ""),
        ("ideal_decode", "  of it decode of earlier turns", ""),
    ):
        values = [where[name][key] for name in ("all", "p95", "p95_normalized")]
        table.add_row(title, *(format_number(round(value, 3)) for value in values), style=style)
    return table


def _engines(engines: Mapping[str, Any]) -> Table:
    columns = ("busy", "prefill", "decode", "mixed", "egress", "ingress")
    table = _table("engine", "profile", *columns)
    for name, use in engines.items():
        table.add_row(name, use["profile"], *(_percent(use[column]) for column in columns))
    return table


def _notes(row: Row) -> list[str]:
    notes = []
    if row["saturated"]:
        notes.append(
            f"saturated: conversations were completed {row['stretch']:.2f} times as slowly as they "
            "arrived. Latencies depend on how long the run was."
        )
    if row["conversations_incomplete"]:
        notes.append(
            f"{row['conversations_incomplete']} conversations broke off: they are in no latency, "
            "and miss every SLO."
        )
    cut, dropped = row["workload"]["cut_by_context"], row["workload"]["dropped_by_context"]
    if cut or dropped:
        notes.append(
            f"of the trace's conversations {cut} were cut and {dropped} dropped at "
            f"{row['workload']['max_context_tokens']:,} tokens, the longest context allowed."
        )
    return notes


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
    title += (
        f", {load:g} conversations/s" if by_rate else f", {100 * load:g} % of each one's capacity"
    )
    table = _table("", *(figure.title for figure in FIGURES), "KV\ntransfers")
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
    table = _table("", "conversations/s", f"against {baseline}")
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


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    return table


def _part(row: Row, group: str, part: str) -> float:
    values = row["where"][group]
    return 0.0 if values is None else float(values[part])


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"


def _share(part: int, whole: int) -> str:
    return _percent(part / whole if whole else None)


def _reasons(counts: Mapping[str, int]) -> str:
    said = ", ".join(f"{reason} {count:,}" for reason, count in counts.items() if count)
    return f" ({said})" if said else ""
