"""Dedicate the prefill tier or let it host: what the cluster carries either way, in
conversations/s.

A fluid estimate from observed speeds and lengths: each engine's seconds for one conversation's
first prompt, its appends, and its share of decode steps at the batch its KV allows.

- Everyone hosts: every engine serves whole conversations.
- Dedicated: the prefill tier computes first prompts and hands them over; the decode tier has the
  rest, and what the prefill tier cannot take (the turn-1 valve).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from conserve_serving.core.types import Tier
from conserve_serving.core.views import EngineView, LoadView

#: A tier that hosts is dedicated when that carries so much more.
_MARGIN = 1.1
#: A link that would be busier than this is no base for a dedicated tier.
_LINK_SHARE = 0.8
#: Decode batches beyond this are not counted on.
_MAX_BATCH = 64.0


class Seconds(NamedTuple):
    """One engine's time for one conversation."""

    first_s: float
    tail_s: float
    handoff_s: float


def seconds_for(engine: EngineView, load: LoadView) -> Seconds:
    """What a conversation of the usual shape takes of an engine's time."""
    slowdown = engine.mixed_slowdown
    turns = max(load.tail_turns, 1e-9)
    appends_s = turns * engine.prefill_s(load.tail_new_tokens / turns)
    context_tokens = max(load.context_tokens, 1.0)
    batch = min(max(engine.capacity_tokens / context_tokens, 1.0), _MAX_BATCH)
    token_s = engine.decode_step_s(batch * context_tokens) / batch
    return Seconds(
        first_s=engine.prefill_s(load.first_prompt_tokens) * slowdown,
        tail_s=appends_s * slowdown + load.output_tokens * token_s,
        handoff_s=engine.handoff_s(load.first_prompt_tokens),
    )


def hosting_per_s(engines: Sequence[EngineView], load: LoadView) -> float:
    """Conversations per second when every engine hosts."""
    times = [seconds_for(engine, load) for engine in engines]
    return sum(1.0 / (t.first_s + t.tail_s) for t in times)


def dedicated_per_s(engines: Sequence[EngineView], load: LoadView) -> float:
    """Conversations per second when the prefill tier only prefills first prompts.

    The decode tier computes the first prompts that the prefill tier cannot: where the prefill tier
    or its link is at its limit with ``x`` conversations a second, the time that their tails leave
    on the decode tier carries whole conversations more.
    """
    prefill = [e for e in engines if e.tier is Tier.PREFILL]
    decode = [seconds_for(e, load) for e in engines if e.tier is Tier.DECODE]
    handed_per_s = 0.0
    for engine in prefill:
        times = seconds_for(engine, load)
        # No decode runs beside these prompts.
        alone_s = times.first_s / engine.mixed_slowdown
        handed_per_s += min(1.0 / alone_s, _LINK_SHARE / times.handoff_s)
    tails_per_s = sum(1.0 / t.tail_s for t in decode)
    if handed_per_s >= tails_per_s:
        return tails_per_s
    left = 1.0 - handed_per_s / tails_per_s
    return handed_per_s + left * sum(1.0 / (t.first_s + t.tail_s) for t in decode)


def hosting_carries_more(engines: Sequence[EngineView], load: LoadView, *, hosting: bool) -> bool:
    """Whether the prefill tier should host, with hysteresis around what it does now."""
    dedicated_rate, hosting_rate = dedicated_per_s(engines, load), hosting_per_s(engines, load)
    # Conversations cannot be sent away at once, so the other mode must be clearly better; and what
    # is even is better hosted: an engine that hosts is never idle for want of first prompts.
    return dedicated_rate <= hosting_rate * (_MARGIN if hosting else 1.0)
