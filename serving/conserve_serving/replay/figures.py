"""The figures of a run, as plain JSON data.

Definitions (also in the output, under ``definitions``): TTFET is the time from a conversation's
arrival to the first token of its last turn; first-turn TTFT to the first token of turn 1; E2E to
the last token of the last turn; last-turn TBT is the mean gap between tokens of the last turn.
Percentiles are over conversations, by linear interpolation between closest ranks. ``_normalized``
figures are ratios to :mod:`conserve_serving.replay.ideal`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Final

from conserve_serving.replay.cluster import counter_delta
from conserve_serving.replay.energy import energy_used
from conserve_serving.replay.latencies import SLO_FACTOR, Ideal, distribution, latency_figures
from conserve_serving.replay.records import ConversationRecord, RunResult, TurnRecord

#: Page size taken where no engine says its own (the page size the project's engines use).
_DEFAULT_PAGE_TOKENS: Final = 64

#: Above this share of the median first-turn TTFT, the time of gateway and client is worth a note.
_OWN_TIME_SHARE: Final = 0.05

DEFINITIONS: Final = {
    "ttfet_s": "time to first effective token: conversation arrival to first token of its last "
    "turn, tool gaps included",
    "ttfet_without_gaps_s": "ttfet_s less the time spent waiting for the client between turns",
    "first_turn_ttft_s": "conversation arrival to first token of turn 1",
    "last_turn_tbt_s": "per conversation: mean gap between tokens of its last turn",
    "last_turn_token_gap_s": "all gaps between tokens of last turns, pooled; tokens that came in "
    "one event have a gap of 0",
    "e2e_s": "conversation arrival to last token of its last turn",
    "_normalized": "ratio to the same conversation alone on the idle cluster at batch 1 (1.0 is "
    "the physical limit)",
    "percentiles": "over completely answered conversations, linear interpolation between closest "
    "ranks",
    "time": "model seconds: wall seconds × speed; client and gateway time is multiplied too",
    "slo_attainment": f"share of conversations within {SLO_FACTOR:g} × their ideal",
    "tail_turns_on_pinned_decoder": "share of tail turns that ran on the decoder of the turn "
    "before",
    "cached_token_shortfall": "over tail turns: tokens of kept context that were not found in "
    "the cache, beyond the one page each that rounding costs",
    "tokens_per_j": "(prompt + output tokens) of answered turns, cached ones included, per joule "
    "of all engines over the run, idle included",
    "gateway_overhead_ms": "wall time a turn spent in the gateway itself, before it went upstream",
    "client_delay_ms": "wall time from when a turn was due to when it was sent (this program's "
    "own delay, waits for a connection included); turns without retries",
    "new_tokens_per_j": "the same with each token of a conversation counted once (new input + "
    "output)",
    "tail_turn_ttft_s": "tail turns: from when the turn was due to its first token, pooled",
}


def figures(result: RunResult, *, ideal: Ideal | None, ideal_note: str) -> dict[str, Any]:
    """All figures of a run.

    Args:
        result: what was measured.
        ideal: where normalised figures come from; None: they are null.
        ideal_note: which hardware the ideal stands on, or why there is none.
    """
    turns = [turn for record in result.conversations for turn in record.turns]
    answered = [turn for turn in turns if turn.answered]
    energy = energy_used(result.samples)
    page_tokens = _page_tokens(result)
    out: dict[str, Any] = {
        "conversations": len(result.conversations),
        "conversations_complete": sum(record.complete for record in result.conversations),
        "turns": len(answered),
        "errors": _errors(result),
        "retries": dict(Counter(kind for turn in turns for kind in turn.retries)),
        **latency_figures(result, ideal),
        "tail_turn_ttft_s": distribution(
            turn.first_token_s - turn.due_s
            for turn in answered
            if turn.index > 1 and turn.first_token_s is not None
        ),
        "transfers_per_conversation": _transfers(result),
        "tail_turns_on_pinned_decoder": _pinned_share(result.conversations),
        **_shortfall(result.conversations, page_tokens),
        **_tokens_per_joule(answered, energy.joules),
        "energy_j": energy.joules,
        "energy_source": energy.source,
        "energy_j_by_engine": energy.by_engine,
        "tokens": {
            "prompt": sum(turn.prompt_tokens or 0 for turn in answered),
            "new_input": sum(turn.turn.new_input_tokens for turn in answered),
            "output": sum(turn.output_tokens or 0 for turn in answered),
            "cached": sum(turn.cached_tokens or 0 for turn in answered),
            "first_turn_cached": sum(
                turn.cached_tokens or 0
                for turn in answered
                if turn.index == 1 and not turn.transfers
            ),
        },
        "output_ids": dict(Counter(t.output_ids for t in answered if t.output_ids)),
        "gateway_overhead_ms": distribution(
            turn.overhead_ms for turn in answered if turn.overhead_ms is not None
        ),
        "client_delay_ms": distribution(
            1000 * (turn.sent_s - turn.due_s) / result.speed
            for turn in answered
            if turn.sent_s is not None and not turn.retries
        ),
        "scheduler": _scheduler_counters(result),
        "duration": {"wall_s": result.wall_s, "model_s": result.wall_s * result.speed},
        "interrupted": result.interrupted,
        "conditions": _conditions(result, ideal_note=ideal_note, page_tokens=page_tokens),
        "definitions": DEFINITIONS,
    }
    out["notes"] = _notes(result, out)
    return out


# --- placement ------------------------------------------------------------------------------------


def _transfers(result: RunResult) -> dict[str, Any]:
    known = [
        max(seen)
        for record in result.conversations
        if (seen := [t.transfers for t in record.turns if t.transfers is not None])
    ]
    return {
        "mean": sum(known) / len(known) if known else None,
        "max": max(known, default=None),
        "conversations_by_count": {str(n): c for n, c in sorted(Counter(known).items())},
        "by_reason": _delta(result, "transfers_by_reason"),
    }


def _pinned_share(conversations: Iterable[ConversationRecord]) -> float | None:
    pinned = total = 0
    for record in conversations:
        for before, turn in zip(record.turns, record.turns[1:], strict=False):
            if before.decode_engine is not None and turn.decode_engine is not None:
                total += 1
                pinned += before.decode_engine == turn.decode_engine
    return pinned / total if total else None


def _shortfall(conversations: Iterable[ConversationRecord], page_tokens: int) -> dict[str, Any]:
    short: list[int] = []
    unknown = 0
    for record in conversations:
        for turn in record.turns[1:]:
            if not turn.answered:
                continue
            if turn.cached_tokens is None:
                unknown += 1
            else:
                short.append(max(0, turn.turn.kept_tokens - turn.cached_tokens))
    beyond = [tokens - page_tokens for tokens in short if tokens > page_tokens]
    return {
        "cached_token_shortfall": sum(beyond) if short else None,
        "cached_token_shortfall_detail": {
            "turns_short": len(beyond),
            "tail_turns": len(short),
            "max_tokens": max(short, default=None),
            "raw_tokens": sum(short),
            "page_tokens": page_tokens,
            "turns_unknown": unknown,
        },
    }


def _page_tokens(result: RunResult) -> int:
    engines = result.samples[0].cluster.engines if result.samples else ()
    return max((e.page_tokens for e in engines if e.page_tokens), default=_DEFAULT_PAGE_TOKENS)


def _scheduler_counters(result: RunResult) -> dict[str, dict[str, float]]:
    names = {name for sample in result.samples[-1:] for name in sample.cluster.counters}
    return {name: grown for name in sorted(names) if (grown := _delta(result, name))}


def _delta(result: RunResult, name: str) -> dict[str, float]:
    if not result.samples:
        return {}
    before, after = result.samples[0].cluster.counters, result.samples[-1].cluster.counters
    return counter_delta(before, after, name)


# --- the rest -------------------------------------------------------------------------------------


def _errors(result: RunResult) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for record in result.conversations:
        for turn in record.turns:
            if turn.error is not None:
                kinds[turn.error] += 1
            elif not turn.answered:
                kinds["interrupted"] += 1
    if result.end_failures:
        kinds["end_failed"] = result.end_failures
    return dict(kinds)


def _tokens_per_joule(answered: Iterable[TurnRecord], joules: float | None) -> dict[str, Any]:
    once = whole = 0
    for turn in answered:
        once += turn.turn.new_input_tokens + (turn.output_tokens or 0)
        whole += (turn.prompt_tokens or 0) + (turn.output_tokens or 0)
    known = joules is not None and joules > 0
    return {
        "tokens_per_j": whole / joules if known and joules else None,
        "new_tokens_per_j": once / joules if known and joules else None,
    }


def _conditions(result: RunResult, *, ideal_note: str, page_tokens: int) -> dict[str, Any]:
    workload = asdict(result.workload)
    del workload["conversations"]
    cluster = result.samples[0].cluster if result.samples else None
    return {
        "workload": workload,
        "seed": result.seed,
        "arrivals": str(result.arrivals),
        "rate_per_s": result.rate_per_s,
        "speed": result.speed,
        "gateway_url": result.gateway_url,
        "gateway": None if cluster is None else _fields(cluster.gateway),
        "model": result.model,
        "engines": []
        if cluster is None
        else [
            {
                "id": engine.id,
                "tier": engine.tier,
                "profile": engine.profile,
                "kv_capacity_tokens": engine.kv_capacity_tokens,
            }
            for engine in cluster.engines
        ],
        "page_tokens": page_tokens,
        "connections": result.connections,
        "waits_for_socket": result.waits_for_socket,
        "ideal": ideal_note,
    }


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def _notes(result: RunResult, out: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    notes = []
    workload = result.workload
    if workload.scale is not None:
        notes.append(
            f"The trace's token counts were multiplied by {workload.scale:g}: times are not the "
            "trace's."
        )
    if workload.cut_by_context or workload.dropped_by_context:
        notes.append(
            f"{workload.cut_by_context} conversations were cut, and {workload.dropped_by_context} "
            "dropped, at the turn that exceeds the longest context the engines can hold."
        )
    if out["tokens"]["first_turn_cached"]:
        notes.append(
            f"{out['tokens']['first_turn_cached']} tokens of first turns were already cached: "
            "the engines have seen these prompts. Use another --seed, or fresh engines."
        )
    by_reason = out["transfers_per_conversation"]["by_reason"]
    seen = sum(
        max((t.transfers for t in record.turns if t.transfers is not None), default=0)
        for record in result.conversations
    )
    if result.samples and sum(by_reason.values()) != seen:
        notes.append(
            f"The cluster counted {sum(by_reason.values()):g} transfers, the replies {seen}: "
            "transfers by reason include other clients' traffic."
        )
    if not set(out["output_ids"]) <= {"reply"}:
        notes.append(
            "Token ids of some answers were not in the reply; histories may differ from what "
            "the engine generated, which costs cached tokens."
        )
    own_s = sum(out[name]["p50"] or 0.0 for name in ("gateway_overhead_ms", "client_delay_ms"))
    own_s *= result.speed / 1000
    ttft_s = out["first_turn_ttft_s"]["p50"]
    if ttft_s and result.speed > 1 and own_s > _OWN_TIME_SHARE * ttft_s:
        notes.append(
            f"Gateway and client took {own_s:.3g} model seconds of a median turn, because the "
            f"engines run {result.speed:g}× faster than the wall. Latencies are too long by that; "
            "run the engines slower, or on an idle machine."
        )
    if result.waits_for_socket:
        notes.append(
            f"{result.waits_for_socket} turns waited for one of {result.connections} client "
            "connections; their wait is in the figures. Raise --connections."
        )
    if result.interrupted:
        notes.append("The run was interrupted: the figures cover what had finished.")
    return notes
