"""What will be replayed: conversations after the caps, and when each arrives."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.replay.errors import TraceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """Limits on what is replayed; None: no limit.

    Attributes:
        conversations: number of conversations, the trace's first ones.
        max_turns: turns of each conversation, its first ones.
        max_context_tokens: prompt and answer of any turn; a conversation ends before the turn
            that would exceed it.
        max_gap_s: longer gaps are shortened to this.
        scale: every token count is multiplied by this, before the other limits count.
    """

    conversations: int | None = None
    max_turns: int | None = None
    max_context_tokens: int | None = None
    max_gap_s: float | None = None
    scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Conversations to replay, and what the caps cost (nothing is cut silently).

    Attributes:
        name: of the trace or generator, for reports.
        conversations: what is left, in order.
        cut_by_max_turns, cut_by_context: conversations that lost their later turns to that cap.
        dropped_by_context: conversations whose first turn already exceeds the context.
        turns_cut: turns that are not replayed, both caps together, dropped conversations
            included.
        gaps_shortened: gaps that were shortened.
        scale: what token counts were multiplied by; None: they are the trace's own.
    """

    name: str
    conversations: tuple[Conversation, ...]
    cut_by_max_turns: int = 0
    cut_by_context: int = 0
    dropped_by_context: int = 0
    turns_cut: int = 0
    gaps_shortened: int = 0
    scale: float | None = None


def scaled(conversation: Conversation, factor: float) -> Conversation:
    """The same conversation with other token counts: new and output tokens times ``factor``.

    Every turn keeps at least one new and one output token, and as much of the context before it
    as it did, whole where it kept the whole. What it shares with others shrinks with its prompt.
    """
    turns: list[Turn] = []
    for number, turn in enumerate(conversation.turns):
        kept, fresh = 0, turn.input_tokens  # a first turn is all new, whatever it says
        if number:
            fresh = turn.new_input_tokens
            before, smaller = conversation.turns[number - 1], turns[-1].context_tokens
            whole = turn.kept_tokens >= before.context_tokens
            kept = smaller if whole else min(smaller, round(turn.kept_tokens * factor))
        new = max(1, round(fresh * factor))
        turns.append(
            replace(
                turn,
                input_tokens=kept + new,
                new_input_tokens=new,
                output_tokens=max(1, round(turn.output_tokens * factor)),
            )
        )
    shared = min(round(conversation.shared_prefix_tokens * factor), turns[0].input_tokens)
    return replace(conversation, turns=tuple(turns), shared_prefix_tokens=shared)


def select(conversations: Iterable[Conversation], caps: Caps, *, name: str) -> Workload:
    """Apply ``caps``; reads no further into the trace than it must.

    Raises:
        TraceError: no conversation is left.
    """
    kept: list[Conversation] = []
    counts = {"max_turns": 0, "context": 0, "dropped": 0, "turns": 0, "gaps": 0}
    for recorded in conversations:
        conversation = recorded if caps.scale is None else scaled(recorded, caps.scale)
        turns = conversation.turns
        if caps.max_turns is not None and len(turns) > caps.max_turns:
            turns = turns[: caps.max_turns]
            counts["max_turns"] += 1
        if caps.max_context_tokens is not None:
            fitting = next(
                (
                    i
                    for i, turn in enumerate(turns)
                    if turn.context_tokens > caps.max_context_tokens
                ),
                len(turns),
            )
            if fitting < len(turns):
                turns = turns[:fitting]
                counts["context" if turns else "dropped"] += 1
        counts["turns"] += len(conversation.turns) - len(turns)
        if not turns:
            continue
        if caps.max_gap_s is not None:
            limit = caps.max_gap_s
            counts["gaps"] += sum(turn.gap_s > limit for turn in turns)
            turns = tuple(
                replace(turn, gap_s=limit) if turn.gap_s > limit else turn for turn in turns
            )
        kept.append(replace(conversation, turns=turns))
        if caps.conversations is not None and len(kept) >= caps.conversations:
            break
    if not kept:
        raise TraceError(
            f"{name}: no conversation is left to replay ({counts['dropped']} exceed the context "
            f"of {caps.max_context_tokens} tokens with their first turn). Give a trace with "
            "conversations, or engines with a longer context."
        )
    return Workload(
        name=name,
        conversations=tuple(kept),
        cut_by_max_turns=counts["max_turns"],
        cut_by_context=counts["context"],
        dropped_by_context=counts["dropped"],
        turns_cut=counts["turns"],
        gaps_shortened=counts["gaps"],
        scale=caps.scale,
    )


class Arrivals(enum.StrEnum):
    """When conversations arrive: a Poisson process, or as the trace recorded it."""

    POISSON = "poisson"
    RECORDED = "recorded"


def poisson_arrivals(count: int, *, rate_per_s: float, seed: int) -> tuple[float, ...]:
    """Arrival times of a Poisson process, the first at 0.

    Args:
        count: number of arrivals.
        rate_per_s: mean arrivals per (model) second.
        seed: equal seeds give equal times, whatever the rate: only the scale differs.

    Raises:
        ValueError: the rate is not positive.
    """
    if not rate_per_s > 0:
        raise ValueError(f"rate is {rate_per_s}: give conversations per second above 0")
    rng = random.Random(f"{seed}/arrivals")  # noqa: S311 - a workload, not a secret
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + rng.expovariate(1.0))
    return tuple(t / rate_per_s for t in times[:count])


def recorded_arrivals(conversations: Sequence[Conversation]) -> tuple[float, ...] | None:
    """The trace's own arrival times, the first at 0; None where any of them is unknown."""
    known = [c.arrival_s for c in conversations if c.arrival_s is not None]
    if len(known) < len(conversations) or not known:
        return None
    start = min(known)
    return tuple(t - start for t in known)
