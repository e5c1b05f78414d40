"""Baseline: every turn goes to the next engine, wherever the conversation's KV is."""

from __future__ import annotations

from conserve_serving.core.types import Reason
from conserve_serving.core.views import EngineView, PrefillPlace, TurnView


class RoundRobin:
    """The engine that was given the fewest turns so far, ties by id: a cycle without a counter."""

    name = "round_robin"
    sticky = False

    def hosts(self, engine: EngineView) -> bool:
        return True

    def rank(self, engine: EngineView) -> float:
        return float(engine.placed_turns)

    def prefill_place(
        self, turn: TurnView, decoder: EngineView, prefiller: EngineView | None
    ) -> PrefillPlace:
        return PrefillPlace(remote=False, reason=Reason.ROUND_ROBIN)
