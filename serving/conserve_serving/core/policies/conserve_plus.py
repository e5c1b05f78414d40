"""ConServe with every mechanism that observation supports, and prediction of nothing.

The rule stays: turn 1 where compute is plentiful, one hand-off, one decoder. Beyond it:

- **Turn-1 valve**: while the prefill tier's queue and the link would take longer than computing the
  prompt where the conversation will live, its running turns' slow-down included, it is computed
  there.
- **Large-append valve**: a later turn whose new tokens are many is a compute-bound phase of its
  own; it is computed on the prefill tier when that brings its first token earlier.
- **Bounded re-pin**: at a turn boundary a conversation leaves an engine, with its KV, when its next
  answer gains more than twice what the copy costs, and a second.
- **Dedicate or host** (tier mode ``auto``): the prefill tier holds conversations, too, unless they
  are slowed down less with it prefilling only, at the rate at which they arrive
  (`policies.advantage`).
"""

from __future__ import annotations

from collections.abc import Sequence

from conserve_serving.core.policies.advantage import should_host
from conserve_serving.core.policies.collocated import move_gains_s
from conserve_serving.core.policies.common import (
    conversation_s,
    first_local_s,
    first_remote_s,
    remote_gains_s,
    tail_local_s,
    tail_remote_s,
)
from conserve_serving.core.policies.conserve import ConServe
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.types import Reason, TierMode
from conserve_serving.core.views import (
    EngineView,
    LoadView,
    PrefillPlace,
    Tail,
    TailAction,
    TurnView,
)

#: Gains below this are noise.
_MARGIN_S = 1.0


class ConServePlus(ConServe):
    """See the module's text; configured as ConServe is."""

    name = "conserve_plus"
    tail = Tail.ASKED

    def __init__(self, settings: SchedulerSettings) -> None:
        super().__init__(settings)
        self._auto = settings.tier_mode is TierMode.AUTO

    def rank(self, engine: EngineView, load: LoadView) -> float:
        return conversation_s(engine, load)

    def prefill_place(
        self,
        turn: TurnView,
        decoder: EngineView,
        prefiller: EngineView | None,
        load: LoadView,
    ) -> PrefillPlace:
        if prefiller is not None and prefiller.hosts:
            return PrefillPlace(remote=False, reason=Reason.FIRST_TURN_COLLOCATED)
        place = super().prefill_place(turn, decoder, prefiller, load)
        if place.remote and prefiller is not None:
            tokens = turn.prompt_tokens
            gain_s = remote_gains_s(
                decoder,
                prefiller,
                tokens,
                local_s=first_local_s(decoder, tokens),
                remote_s=first_remote_s(prefiller, decoder, tokens),
            )
            if gain_s < 0.0:
                return PrefillPlace(remote=False, reason=Reason.FIRST_TURN_DEFLECTED)
        return place

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
        if prefiller is not None and not prefiller.hosts:
            gain_s = remote_gains_s(
                home,
                prefiller,
                turn.new_tokens,
                local_s=tail_local_s(home, turn.new_tokens, load),
                remote_s=tail_remote_s(turn, home, prefiller, load),
            )
            if gain_s > 0.0:
                return TailAction.REMOTE
        return TailAction.STAY

    def prefill_tier_hosts(
        self, engines: Sequence[EngineView], load: LoadView, *, hosting: bool
    ) -> bool:
        return self._auto and should_host(engines, load, hosting_now=hosting)
