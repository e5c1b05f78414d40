"""Baselines without affinity: every turn is placed anew, wherever the conversation's KV is."""

from __future__ import annotations

from conserve_serving.core.policies.common import Defaults
from conserve_serving.core.types import Reason
from conserve_serving.core.views import EngineView, LoadView, PrefillPlace, Tail, TurnView


class RoundRobin(Defaults):
    """The engine that was given the fewest turns so far, ties by id: a cycle without a counter."""

    name = "round_robin"
    tail = Tail.ANYWHERE

    def rank(self, engine: EngineView, load: LoadView) -> float:
        return float(engine.placed_turns)

    def prefill_place(
        self,
        turn: TurnView,
        decoder: EngineView,
        prefiller: EngineView | None,
        load: LoadView,
    ) -> PrefillPlace:
        return PrefillPlace(remote=False, reason=Reason.ROUND_ROBIN)


class LeastLoaded(RoundRobin):
    """The engine with the least work now: prompts waiting, then what its decode step reads."""

    name = "least_loaded"

    def rank(self, engine: EngineView, load: LoadView) -> float:
        answers_s = load.turn_output_tokens * engine.decode_step_s(engine.active_tokens)
        return engine.prefill_backlog_s + answers_s
