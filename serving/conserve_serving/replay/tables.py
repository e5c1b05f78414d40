"""A run as rows: what the JSON keeps, and what the HTML report lists."""

from __future__ import annotations

from typing import Any, Final

from conserve_serving.replay.latencies import Ideal, conversation_latencies
from conserve_serving.replay.records import RunResult

TURN_COLUMNS: Final = (
    "conversation",
    "turn",
    "due_s",
    "sent_s",
    "first_token_s",
    "last_token_s",
    "prompt_tokens",
    "new_input_tokens",
    "output_tokens",
    "cached_tokens",
    "prefill_engine",
    "decode_engine",
    "transfers",
    "reason",
    "retries",
    "error",
)

CONVERSATION_COLUMNS: Final = (
    "conversation",
    "arrival_s",
    "turns",
    "first_input_tokens",
    "decode_engines",
    "transfers",
    "first_turn_ttft_s",
    "ttfet_s",
    "ttfet_s_normalized",
    "last_turn_tbt_s",
    "e2e_s",
    "retries",
    "error",
)


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def turn_rows(result: RunResult) -> list[list[Any]]:
    """One row per turn, in ``TURN_COLUMNS``; times in model seconds since the start."""
    return [
        [
            record.conversation.id,
            turn.index,
            _round(turn.due_s),
            _round(turn.sent_s),
            _round(turn.first_token_s),
            _round(turn.last_token_s),
            turn.prompt_tokens,
            turn.turn.new_input_tokens,
            turn.output_tokens,
            turn.cached_tokens,
            turn.prefill_engine,
            turn.decode_engine,
            turn.transfers,
            turn.reason,
            turn.retries,
            turn.error,
        ]
        for record in result.conversations
        for turn in record.turns
    ]


def conversation_rows(result: RunResult, ideal: Ideal | None) -> list[list[Any]]:
    """One row per conversation, in ``CONVERSATION_COLUMNS``; latencies of complete ones only."""
    rows = []
    for record in result.conversations:
        latencies = conversation_latencies(record) if record.complete else {}
        ttfet_s = latencies.get("ttfet")
        normalized = (
            ttfet_s / ideal.latency(record.conversation).ttfet_s
            if ideal is not None and ttfet_s is not None
            else None
        )
        engines = dict.fromkeys(t.decode_engine for t in record.turns if t.decode_engine)
        rows.append(
            [
                record.conversation.id,
                _round(record.arrival_s),
                f"{sum(t.answered for t in record.turns)}/{len(record.conversation.turns)}",
                record.conversation.turns[0].input_tokens,
                " → ".join(engines),
                max((t.transfers for t in record.turns if t.transfers is not None), default=None),
                _round(latencies.get("first_turn_ttft")),
                _round(ttfet_s),
                _round(normalized),
                _round(latencies.get("last_turn_tbt")),
                _round(latencies.get("e2e")),
                sum(len(t.retries) for t in record.turns),
                ", ".join(sorted({t.error for t in record.turns if t.error})),
            ]
        )
    return rows
