"""What policies have in common: defaults, and estimates from what can be observed now.

Estimates are seconds from now until a prompt is computed where it will be decoded; there the last
token of a prompt that was computed elsewhere is computed once more, which takes a step. Later turns
go before first turns on every engine, so that a later turn waits for those appended before it and
for what is left of the prompt that has begun: half a first prompt, where any waits.
"""

from __future__ import annotations

from collections.abc import Sequence

from conserve_serving.core.types import Reason, Tier
from conserve_serving.core.views import (
    EngineView,
    LoadView,
    PrefillPlace,
    Tail,
    TailAction,
    TurnView,
)


class Defaults:
    """Every engine hosts, turns are prefilled where they run, conversations stay."""

    tail = Tail.PINNED
    hands_over = False

    def hosts(self, engine: EngineView) -> bool:
        return True

    def rank(self, engine: EngineView, load: LoadView) -> float:
        """Least KV first."""
        return float(engine.held_tokens)

    def prefill_place(
        self,
        turn: TurnView,
        decoder: EngineView,
        prefiller: EngineView | None,
        load: LoadView,
    ) -> PrefillPlace:
        return PrefillPlace(remote=False, reason=Reason.FIRST_TURN_COLLOCATED)

    def tail_place(
        self,
        turn: TurnView,
        home: EngineView,
        prefiller: EngineView | None,
        other: EngineView | None,
        load: LoadView,
    ) -> TailAction:
        return TailAction.STAY

    def prefill_tier_hosts(
        self, engines: Sequence[EngineView], load: LoadView, *, hosting: bool
    ) -> bool:
        return hosting


class Tiered(Defaults):
    """Only the decode tier hosts."""

    hands_over = True

    def hosts(self, engine: EngineView) -> bool:
        return engine.tier is Tier.DECODE


def prefilled_s(engine: EngineView, tokens: float, ahead_tokens: float) -> float:
    """Until ``tokens`` are computed after ``ahead_tokens``, the engine's decodes beside them."""
    seconds = engine.prefill_s(ahead_tokens) + engine.prefill_s(tokens)
    return seconds * engine.mixed_slowdown if engine.active_turns else seconds


def stall_s(engine: EngineView, tokens: float) -> float:
    """Delay that computing ``tokens`` puts on the turns running there, all of them together."""
    return engine.active_turns * engine.prefill_s(tokens) * engine.mixed_slowdown


def remote_stall_s(prefiller: EngineView, decoder: EngineView, tokens: float) -> float:
    """The same for ``tokens`` computed on the prefiller and handed over."""
    return stall_s(prefiller, tokens) + stall_s(decoder, 1)


def first_local_s(engine: EngineView, tokens: float) -> float:
    """Until a first prompt is computed where it will be decoded."""
    return prefilled_s(engine, tokens, engine.prefill_backlog_tokens)


def first_remote_s(prefiller: EngineView, decoder: EngineView, tokens: float) -> float:
    """Until a first prompt has been computed on the prefiller and handed over."""
    computed_s = prefilled_s(prefiller, tokens, prefiller.prefill_backlog_tokens)
    handed_s = prefiller.handoff_s(prefiller.egress_tokens + tokens)
    return computed_s + handed_s + prefilled_s(decoder, 1, 0)


def remote_gains_s(
    decoder: EngineView,
    prefiller: EngineView,
    tokens: float,
    *,
    local_s: float,
    remote_s: float,
    stall_weight: float = 1.0,
) -> float:
    """What is gained by computing ``tokens`` on the prefiller: the turn's own time, by these two
    estimates, and the delay to those that run on either engine."""
    local_s += stall_weight * stall_s(decoder, tokens)
    remote_s += stall_weight * remote_stall_s(prefiller, decoder, tokens)
    return local_s - remote_s


def tail_ahead_tokens(engine: EngineView, load: LoadView) -> float:
    """What a later turn's new tokens wait for on an engine."""
    first = engine.prefill_backlog_tokens - engine.tail_backlog_tokens
    return engine.tail_backlog_tokens + min(first, load.first_prompt_tokens) / 2


def tail_local_s(engine: EngineView, tokens: float, load: LoadView) -> float:
    """Until a later turn's new tokens are computed on an engine that has the context."""
    return prefilled_s(engine, tokens, tail_ahead_tokens(engine, load))


def copy_s(turn: TurnView, home: EngineView) -> float:
    """To copy a conversation's KV from its home."""
    return home.handoff_s(home.egress_tokens + turn.context_tokens)


def tail_remote_s(turn: TurnView, home: EngineView, prefiller: EngineView, load: LoadView) -> float:
    """Until a later turn's new tokens have been computed on the prefiller and are at home."""
    computed_s = prefilled_s(prefiller, turn.new_tokens, tail_ahead_tokens(prefiller, load))
    back_s = prefiller.handoff_s(prefiller.egress_tokens + turn.new_tokens)
    return copy_s(turn, home) + computed_s + back_s + prefilled_s(home, 1, 0)


def moved_s(turn: TurnView, home: EngineView, other: EngineView, load: LoadView) -> float:
    """Until a later turn's new tokens are computed on another engine, the KV copied there first."""
    return copy_s(turn, home) + tail_local_s(other, turn.new_tokens, load)


def answer_s(turn: TurnView, engine: EngineView, load: LoadView, *, joining: bool) -> float:
    """To decode an answer of the usual length at an engine's present batch."""
    read_tokens = engine.active_tokens + (turn.prompt_tokens if joining else 0)
    return load.turn_output_tokens * engine.decode_step_s(read_tokens)


def conversation_s(engine: EngineView, load: LoadView) -> float:
    """Until a conversation of the usual shape would have ended on an engine, at the KV it holds."""
    first_s = first_local_s(engine, load.first_prompt_tokens)
    tail_s = engine.prefill_s(load.tail_new_tokens) * engine.mixed_slowdown
    read_tokens = engine.held_tokens + load.first_prompt_tokens
    return first_s + tail_s + load.output_tokens * engine.decode_step_s(read_tokens)
