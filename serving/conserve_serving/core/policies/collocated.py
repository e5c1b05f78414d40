"""Baseline: every engine hosts, least KV first, sticky, tail turns first, open KV protected.

The strongest simple policy on equal GPUs. Tail-first order and the protection of open
conversations are the scheduler's and thus the same for every policy.
"""

from __future__ import annotations

from conserve_serving.core.types import Reason
from conserve_serving.core.views import EngineView, PrefillPlace, TurnView


class Collocated:
    """First placement on the engine that holds the least KV; ties by engine id."""

    name = "collocated"
    sticky = True

    def hosts(self, engine: EngineView) -> bool:
        return True

    def rank(self, engine: EngineView) -> float:
        return float(engine.held_tokens)

    def prefill_place(
        self, turn: TurnView, decoder: EngineView, prefiller: EngineView | None
    ) -> PrefillPlace:
        return PrefillPlace(remote=False, reason=Reason.FIRST_TURN_COLLOCATED)
