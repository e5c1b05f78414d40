"""What a workload looks like, as figures: what a scheduler's fortune depends on.

*Uncached prefill* is what must be computed if nothing is ever lost from a cache: first prompts
whole, and of later prompts what they append. Work is counted in tokens, so it is the same for
every engine. Distributions are :func:`conserve_serving.replay.latencies.distribution`, with a p5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Final

from conserve_serving.lab.cuts import is_reset
from conserve_serving.lab.pool import Pool
from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.replay.latencies import distribution, percentile

#: A turn that appends more is a large append: on the profiles shipped, prefill of that length is
#: bound by compute, and takes longer than tens of decode steps.
LARGE_APPEND_TOKENS: Final = 4096
#: Turns whose context is reported, to show how conversations grow.
GROWTH_TURNS: Final = (1, 2, 5, 10, 20, 50, 100, 200)

DEFINITIONS: Final = {
    "appended_tokens": "prompt tokens of tail turns that are not in the context before them",
    "context_tokens": "prompt and answer of a conversation's last turn",
    "context_by_turn": "prompt and answer after that many turns, of conversations that have them",
    "large_appends": f"tail turns that append more than {LARGE_APPEND_TOKENS} tokens",
    "first_turn_share": "first prompts' share of all uncached prefill tokens",
    "first_turn_share_warm": "the same, where prefixes that several conversations share are cached",
    "resets": "tail turns that keep less than half of the context before them",
    "trimmed_turns": "other tail turns that keep less than the whole context before them",
    "work_tokens": "tokens to compute per conversation: uncached prefill, and answers",
    "served_tokens": "prompt and answer of every turn, cached tokens included",
    "gap_s": "delays before tail turns, on the client's side",
}


def describe(pool: Pool) -> dict[str, Any]:
    """Figures of a pool, ready for JSON.

    Args:
        pool: the workload after its caps.

    Returns:
        Distributions over conversations or turns, shares between 0 and 1 (None where there is
        nothing to take a share of), and under ``definitions`` what each of them is.
    """
    conversations = pool.conversations
    tails = [(before, turn) for c in conversations for before, turn in pairwise(c.turns)]
    turns = [turn for c in conversations for turn in c.turns]
    first = [c.turns[0].input_tokens for c in conversations]
    prefill = [_prefill(c) for c in conversations]
    output = [sum(turn.output_tokens for turn in c.turns) for c in conversations]
    return {
        "name": pool.name,
        "conversations": len(conversations),
        "turns": len(turns),
        "turns_per_conversation": _spread(len(c.turns) for c in conversations),
        "first_input_tokens": _spread(first),
        "appended_tokens": _spread(turn.new_input_tokens for _, turn in tails),
        "output_tokens": _spread(turn.output_tokens for turn in turns),
        "context_tokens": _spread(c.turns[-1].context_tokens for c in conversations),
        "context_by_turn": _growth(conversations),
        "gap_s": _spread(turn.gap_s for _, turn in tails),
        "gap_s_per_conversation": _spread(sum(t.gap_s for t in c.turns) for c in conversations),
        "first_turn_share": _share(sum(first), sum(prefill)),
        "first_turn_share_warm": _warm_share(pool, sum(prefill)),
        "first_turn_share_per_conversation": _spread(
            mine / whole for mine, whole in zip(first, prefill, strict=True)
        ),
        "large_appends": _large_appends([turn.new_input_tokens for _, turn in tails]),
        "resets": _resets(conversations, tails),
        "shared_prefixes": _shared_prefixes(pool),
        "sub_agents": {
            "conversations": sum(c.parent is not None for c in conversations),
            "parents": len({c.parent for c in conversations} - {None}),
        },
        "work_tokens": {
            "prefill": _spread(prefill),
            "output": _spread(output),
            "total": _spread(map(sum, zip(prefill, output, strict=True))),
        },
        "served_tokens": _spread(
            sum(t.input_tokens + t.output_tokens for t in c.turns) for c in conversations
        ),
        "recorded_arrivals": _recorded(conversations),
        "caps": _caps(pool),
        "definitions": DEFINITIONS,
    }


def _prefill(conversation: Conversation) -> int:
    """Uncached prefill tokens of a conversation: a first prompt is all new, whatever it says."""
    tail = sum(turn.new_input_tokens for turn in conversation.turns[1:])
    return conversation.turns[0].input_tokens + tail


def _spread(values: Iterable[float]) -> dict[str, float | int | None]:
    ordered = sorted(values)
    return {"p5": percentile(ordered, 0.05), **distribution(ordered)}


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _growth(conversations: Sequence[Conversation]) -> dict[str, dict[str, float | int | None]]:
    return {
        str(number): _spread(
            c.turns[number - 1].context_tokens for c in conversations if len(c.turns) >= number
        )
        for number in GROWTH_TURNS
        if any(len(c.turns) >= number for c in conversations)
    }


def _large_appends(appended: Sequence[int]) -> dict[str, Any]:
    large = [tokens for tokens in appended if tokens > LARGE_APPEND_TOKENS]
    return {
        "threshold_tokens": LARGE_APPEND_TOKENS,
        "turns": len(large),
        "tokens": sum(large),
        "share_of_tail_turns": _share(len(large), len(appended)),
        "share_of_tail_tokens": _share(sum(large), sum(appended)),
    }


def _resets(
    conversations: Sequence[Conversation], tails: Sequence[tuple[Turn, Turn]]
) -> dict[str, Any]:
    resets = [(before, turn) for before, turn in tails if is_reset(turn, before)]
    trimmed = sum(turn.kept_tokens < before.context_tokens for before, turn in tails)
    return {
        "turns": len(resets),
        "share_of_tail_turns": _share(len(resets), len(tails)),
        "conversations": sum(
            any(is_reset(turn, before) for before, turn in pairwise(c.turns)) for c in conversations
        ),
        "context_before_tokens": _spread(before.context_tokens for before, _ in resets),
        "kept_share": _spread(turn.kept_tokens / before.context_tokens for before, turn in resets),
        "appended_tokens": _spread(turn.new_input_tokens for _, turn in resets),
        "trimmed_turns": trimmed - len(resets),
    }


def _shared_prefixes(pool: Pool) -> dict[str, Any]:
    conversations, shared = pool.conversations, pool.shared_prefix_names
    return {
        "conversations": sum(c.shared_prefix_tokens > 0 for c in conversations),
        "prefixes": len({c.shared_prefix_name for c in conversations if c.shared_prefix_tokens}),
        "prefixes_of_several": len(shared),
        "conversations_sharing": sum(c.shared_prefix_name in shared for c in conversations),
        "tokens": _spread(c.shared_prefix_tokens for c in conversations if c.shared_prefix_tokens),
    }


def _warm_share(pool: Pool, prefill: int) -> float | None:
    conversations, shared = pool.conversations, pool.shared_prefix_names
    cached = sum(c.shared_prefix_tokens for c in conversations if c.shared_prefix_name in shared)
    first = sum(c.turns[0].input_tokens for c in conversations)
    return _share(first - cached, prefill - cached)


def _recorded(conversations: Sequence[Conversation]) -> dict[str, float | None] | None:
    """Span and mean rate of recorded arrivals; None where one of them is unknown."""
    times = [c.arrival_s for c in conversations if c.parent is None]
    known = sorted(at for at in times if at is not None)
    if not known or len(known) < len(times):
        return None
    span_s = known[-1] - known[0]
    return {"span_s": span_s, "rate_per_s": _share(len(known) - 1, span_s)}


def _caps(pool: Pool) -> dict[str, Any]:
    """What the caps cost."""
    workload = pool.workload
    return {
        "scale": workload.scale,
        "cut_by_max_turns": workload.cut_by_max_turns,
        "cut_by_context": workload.cut_by_context,
        "dropped_by_context": workload.dropped_by_context,
        "turns_cut": workload.turns_cut,
        "gaps_shortened": workload.gaps_shortened,
        "turns_after_reset_cut": pool.resets_cut,
        "answers_returned": pool.answers_returned,
        "sub_agents_left_out": pool.orphans,
    }
