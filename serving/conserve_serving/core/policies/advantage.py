"""Dedicate the prefill tier or let it host, by what has been observed.

Two fluid estimates from observed speeds, lengths and arrivals:

- **What the cluster carries** either way, in conversations per second: each engine's seconds for
  one conversation's first prompt, its appends, and its share of decode steps at the batch its KV
  allows. Everyone hosts: every engine serves whole conversations. Dedicated: the prefill tier
  computes first prompts and hands them over; the decode tier has the rest, and the first prompts
  that the prefill tier cannot take (the turn-1 valve).
- **How long a conversation takes** either way at the rate at which they arrive now: its first turn,
  and all that follows. Prefill takes a share ``p`` of an engine's time and everything there is
  slowed by ``1 / (1 - p)``. A decode step is ``a + b * kv``, and by Little's law the batch is the
  arrivals times how long an answer takes: with ``o`` output tokens a conversation and ``c`` tokens
  of context, decode takes ``o * a / (1 - p - arrivals * o * b * c)`` seconds. First prompts queue
  for their kind (M/D/1), and what counts is the wait that one in twenty exceeds, about three times
  the mean.

Both parts are measured by what they take alone on the cluster's best engine, as service levels
are, and the worse of the two counts: what is good for the tail at the cost of first turns, or the
other way round, is not good. Where neither mode carries the load, the one that carries more
decides; and where KV is short, its memory is needed to host.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from math import inf
from typing import NamedTuple

from conserve_serving.core.types import Tier
from conserve_serving.core.views import EngineView, LoadView

#: Dedicating must be better by so much before it is done: conversations cannot be sent away.
_MARGIN = 1.05
#: A link that would be busier than this is no base for a dedicated tier.
_LINK_SHARE = 0.8
#: Share of the decode tier's KV above which the prefill tier is asked to hold conversations, and
#: above which it goes on doing so.
_FULL = {False: 0.8, True: 0.7}
#: Prompt tokens computed in one step, about: engines' usual chunks are 2,048 to 8,192.
_CHUNK_TOKENS = 4096.0
#: The 95th percentile of a queue's waits over their mean: 3.0 where they are exponential.
_TAIL = 3.0
#: Decode batches beyond this are not counted on.
_MAX_BATCH = 64.0
#: Engines seen decoding by which those not seen are judged: bounds the cost on a large cluster.
_PEERS = 16
#: Free links and conversations without later turns are no division by zero.
_TINY = 1e-9


class Seconds(NamedTuple):
    """One engine's time for one conversation: its first prompt, its appends, its answers at the
    batch that the KV allows. Prefill beside decodes, their slow-down in it."""

    first_s: float
    append_s: float
    decode_s: float

    @property
    def tail_s(self) -> float:
        """All but the first prompt."""
        return self.append_s + self.decode_s

    @property
    def whole_s(self) -> float:
        """All of it."""
        return self.first_s + self.append_s + self.decode_s


def step_s(engine: EngineView, kv_tokens: float, peers: Sequence[EngineView]) -> float:
    """A decode step; of an engine that has not decoded yet, as it was believed to be, corrected by
    what its peers' steps turned out to take compared with what was believed of them."""
    believed_s = engine.decode_step_s(kv_tokens)
    if engine.decode_bias(kv_tokens) is not None:
        return believed_s
    known = [bias for peer in peers if (bias := peer.decode_bias(kv_tokens)) is not None]
    return believed_s * (sum(known) / len(known) if known else 1.0)


def seen_decoding(engines: Sequence[EngineView]) -> list[EngineView]:
    """The first of them that have shown what a decode step takes."""
    return list(islice((e for e in engines if e.decode_bias(0.0) is not None), _PEERS))


def seconds_for(engine: EngineView, load: LoadView, peers: Sequence[EngineView]) -> Seconds:
    """What a conversation of the usual shape takes of an engine's time."""
    turns = max(load.tail_turns, _TINY)
    batch = _batch(engine, load)
    full_step_s = step_s(engine, batch * max(load.context_tokens, 1.0), peers)
    slowdown = engine.mixed_slowdown
    first_s = slowdown * engine.prefill_s(load.first_prompt_tokens)
    append_s = slowdown * turns * engine.prefill_s(load.tail_new_tokens / turns)
    # The decodes that share those steps are slowed down as well.
    shared_s = (slowdown - 1.0) * full_step_s
    return Seconds(
        first_s=first_s + shared_s * load.first_prompt_tokens / _CHUNK_TOKENS,
        append_s=append_s + shared_s * turns,
        decode_s=max(load.output_tokens, 1.0) * full_step_s / batch,
    )


def _batch(engine: EngineView, load: LoadView) -> float:
    """Conversations that decode together when the KV is full."""
    return min(max(engine.capacity_tokens / max(load.context_tokens, 1.0), 1.0), _MAX_BATCH)


# --- what the cluster carries ---------------------------------------------------------------------
def hosting_per_s(engines: Sequence[EngineView], load: LoadView) -> float:
    """Conversations per second when every engine hosts."""
    peers = seen_decoding(engines)
    return sum(1.0 / seconds_for(engine, load, peers).whole_s for engine in engines)


def dedicated_per_s(engines: Sequence[EngineView], load: LoadView) -> float:
    """Conversations per second when the prefill tier only prefills first prompts.

    The decode tier computes the first prompts that the prefill tier cannot: where the prefill tier
    or its link is at its limit with ``x`` conversations a second, the time that their tails leave
    on the decode tier carries whole conversations more.
    """
    peers = seen_decoding(engines)
    decode = [seconds_for(e, load, peers) for e in engines if e.tier is Tier.DECODE]
    handed_per_s = sum(_handed_per_s(e, load) for e in engines if e.tier is Tier.PREFILL)
    tails_per_s = sum(1.0 / times.tail_s for times in decode)
    if handed_per_s >= tails_per_s:
        return tails_per_s
    left = 1.0 - handed_per_s / tails_per_s
    return handed_per_s + left * sum(1.0 / times.whole_s for times in decode)


def _handed_per_s(engine: EngineView, load: LoadView) -> float:
    """First prompts per second that a prefiller computes, nothing beside them, and hands over."""
    alone_s = engine.prefill_s(load.first_prompt_tokens)
    handoff_s = max(engine.handoff_s(load.first_prompt_tokens), _TINY)
    return min(1.0 / alone_s, _LINK_SHARE / handoff_s)


# --- how long a conversation takes ----------------------------------------------------------------
class Pace(NamedTuple):
    """How long a conversation takes, gaps apart: until its first token, and all that follows."""

    first_s: float
    tail_s: float

    def slowdown(self, alone: Pace) -> float:
        """The worse of both, over what they take alone."""
        return max(self.first_s / alone.first_s, self.tail_s / alone.tail_s)


def alone(engines: Sequence[EngineView], load: LoadView) -> Pace:
    """The best of the cluster's engines with nothing else to do."""
    peers = seen_decoding(engines)
    turns = max(load.tail_turns, _TINY)
    return Pace(
        first_s=max(min(e.prefill_s(load.first_prompt_tokens) for e in engines), _TINY),
        tail_s=min(
            turns * e.prefill_s(load.tail_new_tokens / turns)
            + max(load.output_tokens, 1.0) * step_s(e, load.context_tokens, peers)
            for e in engines
        ),
    )


def hosting(engines: Sequence[EngineView], load: LoadView) -> Pace:
    """When every engine hosts, each as many conversations as its speed allows."""
    peers = seen_decoding(engines)
    carried = hosting_per_s(engines, load)
    first_s = tail_s = 0.0
    for engine in engines:
        times = seconds_for(engine, load, peers)
        share = 1.0 / times.whole_s / carried
        arrivals = share * load.conversations_per_s
        left = 1.0 - arrivals * (times.first_s + times.append_s)
        if left <= 0.0:
            return Pace(inf, inf)
        waits_s = _waits_s(times.first_s, arrivals * times.first_s)
        first_s += share * (waits_s + times.first_s / left)
        tail_s += share * (times.append_s / left + _decode_s(engine, load, peers, arrivals, left))
    return Pace(first_s, tail_s)


def dedicated(engines: Sequence[EngineView], load: LoadView) -> Pace:
    """When the prefill tier only prefills; infinite when it cannot keep up."""
    prefill = [e for e in engines if e.tier is Tier.PREFILL]
    decode = [e for e in engines if e.tier is Tier.DECODE]
    peers = seen_decoding(engines)
    handed_per_s = sum(_handed_per_s(engine, load) for engine in prefill)
    tails_per_s = sum(1.0 / seconds_for(engine, load, peers).tail_s for engine in decode)
    busy = load.conversations_per_s / handed_per_s if handed_per_s else inf
    if busy >= 1.0 or not tails_per_s:
        return Pace(inf, inf)
    first_s = tail_s = 0.0
    for engine in prefill:
        prompt_s = engine.prefill_s(load.first_prompt_tokens)
        handoff_s = engine.handoff_s(load.first_prompt_tokens)
        share = _handed_per_s(engine, load) / handed_per_s
        first_s += share * (prompt_s + _waits_s(prompt_s, busy) + handoff_s)
    for engine in decode:
        times = seconds_for(engine, load, peers)
        share = 1.0 / times.tail_s / tails_per_s
        arrivals = share * load.conversations_per_s
        left = 1.0 - arrivals * times.append_s
        if left <= 0.0:
            return Pace(inf, inf)
        tail_s += share * (times.append_s / left + _decode_s(engine, load, peers, arrivals, left))
    return Pace(first_s, tail_s)


def _waits_s(prompt_s: float, busy: float) -> float:
    """A long wait for others' prompts of that length, on an engine so busy with them."""
    return _TAIL * prompt_s * busy / (2.0 * (1.0 - busy)) if busy < 1.0 else inf


def _decode_s(
    engine: EngineView,
    load: LoadView,
    peers: Sequence[EngineView],
    arrivals_per_s: float,
    left: float,
) -> float:
    """All answers of a conversation on an engine that has ``left`` of its time for decode."""
    context_tokens = max(load.context_tokens, 1.0)
    full = _batch(engine, load) * context_tokens
    base_s = step_s(engine, 0.0, peers)
    per_token_s = (step_s(engine, full, peers) - base_s) / full
    for_weights = left - arrivals_per_s * load.output_tokens * per_token_s * context_tokens
    if for_weights <= 0.0:
        return inf
    decode_s = load.output_tokens * base_s / for_weights
    return decode_s if arrivals_per_s * decode_s <= _batch(engine, load) else inf


def is_short_of_room(engines: Sequence[EngineView], *, hosting_now: bool) -> bool:
    """Whether the KV that is kept would leave the decode tier alone with little room.

    Conversations over their tool gaps are in it, and those parked for want of room: where KV is
    what limits, memory that only passes prompts on is wasted.
    """
    kept_tokens = sum(engine.held_tokens + engine.parked_tokens for engine in engines)
    room_tokens = sum(e.capacity_tokens for e in engines if e.tier is Tier.DECODE)
    return kept_tokens > _FULL[hosting_now] * room_tokens


def should_host(engines: Sequence[EngineView], load: LoadView, *, hosting_now: bool) -> bool:
    """Whether the prefill tier should host.

    A tier that hosts goes on unless dedicating it is better by a margin: what is even is better
    hosted, where no KV has to move.
    """
    if not engines:
        return hosting_now
    if is_short_of_room(engines, hosting_now=hosting_now):
        return True
    margin = _MARGIN if hosting_now else 1.0
    best = alone(engines, load)
    apart = dedicated(engines, load).slowdown(best)
    together = hosting(engines, load).slowdown(best)
    if min(apart, together) < inf:
        return together < apart * margin
    return hosting_per_s(engines, load) * margin > dedicated_per_s(engines, load)
