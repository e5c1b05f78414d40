"""Baselines without tiers: every engine hosts, sticky, tail turns first, open KV protected.

The strongest simple policies. Tail-first order and the protection of open conversations are the
scheduler's and thus the same for every policy.

- ``collocated``: first placement on the engine that holds the least KV.
- ``collocated_speed``: on the one where a conversation of the usual shape would end first, by each
  engine's own measured speed: for unlike GPUs.
- ``…_override``: and a conversation leaves an overloaded engine, with its KV, when that gains more
  time for its next answer than the copy costs (sticky with load override).
"""

from __future__ import annotations

from conserve_serving.core.policies.common import (
    Defaults,
    answer_s,
    conversation_s,
    copy_s,
    moved_s,
    tail_local_s,
)
from conserve_serving.core.views import EngineView, LoadView, Tail, TailAction, TurnView

#: A move must gain at least this beyond what it costs, so that noise moves nothing.
_MARGIN_S = 1.0


class Collocated(Defaults):
    """See the module's text.

    Args:
        by_speed: place by each engine's own speed rather than by KV alone.
        override: let conversations leave overloaded engines.
    """

    def __init__(self, *, by_speed: bool = False, override: bool = False) -> None:
        self._by_speed = by_speed
        self.tail = Tail.ASKED if override else Tail.PINNED
        self.name = "collocated" + "_speed" * by_speed + "_override" * override

    def rank(self, engine: EngineView, load: LoadView) -> float:
        return conversation_s(engine, load) if self._by_speed else float(engine.held_tokens)

    def tail_place(
        self,
        turn: TurnView,
        home: EngineView,
        prefiller: EngineView | None,
        other: EngineView | None,
        load: LoadView,
    ) -> TailAction:
        if other is not None and move_gains_s(turn, home, other, load) > _MARGIN_S:
            return TailAction.MOVE
        return TailAction.STAY


def move_gains_s(turn: TurnView, home: EngineView, other: EngineView, load: LoadView) -> float:
    """By how much earlier a turn would end if its conversation moved, beyond the cost of moving."""
    stays_s = tail_local_s(home, turn.new_tokens, load) + answer_s(turn, home, load, joining=True)
    moves_s = moved_s(turn, home, other, load) + answer_s(turn, other, load, joining=True)
    return stays_s - moves_s - copy_s(turn, home)
