"""The figures as a table for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from conserve_serving.replay.report import format_number, format_seconds


def render_table(figures: dict[str, Any]) -> RenderableType:
    """What a person wants to know at the end of a run.

    Args:
        figures: of :func:`conserve_serving.replay.figures.figures`.
    """
    latencies = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "p50", "p95", "p50 / ideal", "p95 / ideal"):
        latencies.add_column(column, justify="left" if not column else "right")
    for key, title in (
        ("ttfet_s", "TTFET"),
        ("first_turn_ttft_s", "first-turn TTFT"),
        ("last_turn_tbt_s", "last-turn TBT"),
        ("e2e_s", "end to end"),
    ):
        absolute, ratio = figures[key], figures[f"{key}_normalized"] or {}
        latencies.add_row(
            title,
            format_seconds(absolute["p50"]),
            format_seconds(absolute["p95"]),
            format_number(ratio.get("p50")),
            format_number(ratio.get("p95")),
        )
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="dim")
    facts.add_column()
    for name, value in _facts(figures):
        facts.add_row(name, value)
    parts: list[RenderableType] = [Text(_headline(figures), style="bold"), latencies, Text(), facts]
    parts += [Text(f"note: {note}", style="yellow") for note in figures["notes"]]
    return Group(*parts)


def _headline(figures: dict[str, Any]) -> str:
    conditions, duration = figures["conditions"], figures["duration"]
    return (
        f"{conditions['workload']['name']}: {figures['conversations_complete']} of "
        f"{figures['conversations']} conversations complete, {figures['turns']} turns, "
        f"{format_seconds(duration['model_s'])} of model time in "
        f"{format_seconds(duration['wall_s'])} (speed {format_number(conditions['speed'])}×)"
    )


def _facts(figures: dict[str, Any]) -> list[tuple[str, str | Text]]:
    transfers = figures["transfers_per_conversation"]
    share = figures["tail_turns_on_pinned_decoder"]
    detail = figures["cached_token_shortfall_detail"]
    errors: str | Text = "none"
    if figures["errors"]:
        errors = Text(_counts(figures["errors"]), style="bold red")
    return [
        (
            "KV transfers per conversation",
            f"mean {format_number(transfers['mean'])}, max {format_number(transfers['max'])}"
            + (f" ({_counts(transfers['by_reason'])})" if transfers["by_reason"] else ""),
        ),
        (
            "tail turns on the pinned decoder",
            "–" if share is None else f"{100 * share:.1f} % of {detail['tail_turns']}",
        ),
        (
            "cached-token shortfall",
            f"{format_number(figures['cached_token_shortfall'])} beyond a page "
            f"(largest {format_number(detail['max_tokens'])}, page {detail['page_tokens']})",
        ),
        (
            "tokens per joule",
            f"{format_number(figures['tokens_per_j'])} ({figures['energy_source']})",
        ),
        (
            "own time per turn (p50)",
            f"gateway {format_number(figures['gateway_overhead_ms']['p50'])} ms, "
            f"client {format_number(figures['client_delay_ms']['p50'])} ms",
        ),
        ("retries", _counts(figures["retries"]) or "none"),
        ("errors", errors),
    ]


def _counts(counts: dict[str, float]) -> str:
    return ", ".join(f"{kind} {format_number(n)}" for kind, n in counts.items())
