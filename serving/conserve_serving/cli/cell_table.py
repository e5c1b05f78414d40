"""What `conserve simulate` prints: one run as a person wants to read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from conserve_serving.cli.lab_tables import bare_table
from conserve_serving.replay.report import format_number, format_seconds

Row = Mapping[str, Any]

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
    table = bare_table("", "p50", "p95", "p99", "p50 / idle", "p95 / idle")
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
    table = bare_table("time to TTFET, mean seconds", "all", "slowest 5 %", "slowest 5 % / idle")
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
    table = bare_table("engine", "profile", *columns)
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
