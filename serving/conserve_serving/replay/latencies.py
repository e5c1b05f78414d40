"""Latencies of conversations, their distributions, and their ratios to the ideal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

from conserve_serving.replay.conversations import Conversation
from conserve_serving.replay.ideal import IdealLatency
from conserve_serving.replay.records import ConversationRecord, RunResult, TurnRecord

#: A turn meets its service level at up to this many times its ideal latency (the paper's SLO).
SLO_FACTOR: Final = 5.0


class Ideal(Protocol):
    """Where ideal latencies come from."""

    def latency(self, conversation: Conversation) -> IdealLatency:
        """The conversation's latency alone."""


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """Percentile of ascending values by linear interpolation; None when there are none."""
    if not ordered:
        return None
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def distribution(values: Iterable[float]) -> dict[str, float | int | None]:
    """p50, p95, p99, mean, max and n of some values; all but n are None when there are none."""
    ordered = sorted(values)
    return {
        "p50": percentile(ordered, 0.50),
        "p95": percentile(ordered, 0.95),
        "p99": percentile(ordered, 0.99),
        "mean": math.fsum(ordered) / len(ordered) if ordered else None,
        "max": ordered[-1] if ordered else None,
        "n": len(ordered),
    }


def latency_figures(result: RunResult, ideal: Ideal | None) -> dict[str, Any]:
    """The latency figures of a run, absolute and normalised, by their names in the JSON."""
    names = ("ttfet", "ttfet_without_gaps", "first_turn_ttft", "last_turn_tbt", "e2e")
    absolute: dict[str, list[float]] = {name: [] for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    gaps: list[float] = []
    for record in result.conversations:
        if not record.complete:
            continue
        measured = conversation_latencies(record)
        gaps += _token_gaps(record.turns[-1])
        limit = None if ideal is None else ideal.latency(record.conversation)
        limits = {} if limit is None else _limits(limit)
        for name, value in measured.items():
            if value is None:
                continue
            absolute[name].append(value)
            at_best = limits.get(name)
            if at_best:
                ratios[name].append(value / at_best)
    out: dict[str, Any] = {}
    for name in names:
        out[f"{name}_s"] = distribution(absolute[name])
        out[f"{name}_s_normalized"] = distribution(ratios[name]) if ideal is not None else None
    out["last_turn_token_gap_s"] = distribution(gaps)
    out["slo_attainment"] = (
        None
        if ideal is None
        else {
            name: sum(r <= SLO_FACTOR for r in ratios[name]) / len(ratios[name])
            for name in names
            if ratios[name]
        }
    )
    return out


def conversation_latencies(record: ConversationRecord) -> dict[str, float | None]:
    """One complete conversation's latencies in model seconds, by the figures' names."""
    first, last = record.turns[0], record.turns[-1]
    if first.first_token_s is None or last.first_token_s is None or last.last_token_s is None:
        raise ValueError(f"conversation {record.conversation.id!r} is not complete")
    waited = sum(
        following.due_s - (turn.last_token_s or following.due_s)
        for turn, following in zip(record.turns, record.turns[1:], strict=False)
    )
    tokens = last.output_tokens or 0
    decode_s = last.last_token_s - last.first_token_s
    return {
        "ttfet": last.first_token_s - record.arrival_s,
        "ttfet_without_gaps": last.first_token_s - record.arrival_s - waited,
        "first_turn_ttft": first.first_token_s - record.arrival_s,
        "last_turn_tbt": decode_s / (tokens - 1) if tokens > 1 else None,
        "e2e": last.last_token_s - record.arrival_s,
    }


def _limits(limit: IdealLatency) -> dict[str, float | None]:
    return {
        "ttfet": limit.ttfet_s,
        "ttfet_without_gaps": limit.ttfet_s - limit.gaps_s,
        "first_turn_ttft": limit.first_turn_ttft_s,
        "last_turn_tbt": limit.last_turn_tbt_s,
        "e2e": limit.e2e_s,
    }


def _token_gaps(turn: TurnRecord) -> list[float]:
    if turn.token_times_s is None or turn.token_counts is None:
        return []
    times, counts = turn.token_times_s, turn.token_counts
    gaps = [0.0] * (counts[0] - 1)
    for before, after, count in zip(times, times[1:], counts[1:], strict=False):
        gaps.append(after - before)
        gaps += [0.0] * (count - 1)
    return gaps
