"""Baselines with tiers that decide turn by turn.

- ``full_disaggregation``: every turn is prefilled on the prefill tier. Decoders keep their cache,
  and prefillers theirs: only what is missing crosses a link, either way.
- ``per_turn``: local or remote for every turn, turn 1 included, by estimated finish, the delay its
  neighbours suffer, and SLO (like AMPD, arXiv 2602.14516). Its predictions come with the turn
  (`predicted_output_tokens`): room is reserved by them, and stalls are judged by them.
  ``per_turn_greedy`` looks at the turn's own finish and the SLO alone. ``wrong_share`` turns so
  many of its decisions round, as the ConServe paper models a predictor that errs.
- ``ppd``: turn 1 remote; later appends local or remote by weighing the turn's own delay against
  its neighbours' stall (like PPD, arXiv 2603.13358).
- ``deflection``: turn 1 remote unless the prefill queue is long; then the decoder takes it, while
  its running turns can bear that (like prefill deflection, arXiv 2607.02043).

They follow the idea of each system, not its code: costs are this project's own estimates.
"""

from __future__ import annotations

from zlib import crc32

from conserve_serving.core.policies.common import (
    Tiered,
    first_local_s,
    first_remote_s,
    remote_gains_s,
    stall_s,
    tail_local_s,
    tail_remote_s,
)
from conserve_serving.core.types import Reason
from conserve_serving.core.views import (
    EngineView,
    LoadView,
    PrefillPlace,
    Tail,
    TailAction,
    TurnView,
)

#: A running turn may be slowed down to this many times its unloaded pace (the paper's SLO).
_SLO_FACTOR = 5.0
#: PPD's weights of the turn's own delay and of its neighbours' stall.
_OWN_WEIGHT, _STALL_WEIGHT = 0.5, 0.5

_REMOTE = PrefillPlace(remote=True, reason=Reason.FIRST_TURN_HANDOFF)
_DEFLECTED = PrefillPlace(remote=False, reason=Reason.FIRST_TURN_DEFLECTED)
_NO_PREFILLER = PrefillPlace(remote=False, reason=Reason.FIRST_TURN_NO_PREFILLER)


def breaks_slo(turn: TurnView, engine: EngineView, load: LoadView) -> bool:
    """Whether computing a turn's prompt here slows answers of the usual length beyond the SLO."""
    if not engine.active_turns:
        return False
    predicted = turn.predicted_output_tokens
    answer_tokens = load.turn_output_tokens if predicted is None else predicted
    slack_s = (_SLO_FACTOR - 1.0) * engine.decode_step_s(0.0) * max(1.0, answer_tokens)
    return engine.prefill_s(turn.new_tokens) * engine.mixed_slowdown > slack_s


class FullDisaggregation(Tiered):
    """See the module's text."""

    name = "full_disaggregation"
    tail = Tail.ASKED

    def prefill_place(
        self,
        turn: TurnView,
        decoder: EngineView,
        prefiller: EngineView | None,
        load: LoadView,
    ) -> PrefillPlace:
        return _NO_PREFILLER if prefiller is None else _REMOTE

    def tail_place(
        self,
        turn: TurnView,
        home: EngineView,
        prefiller: EngineView | None,
        other: EngineView | None,
        load: LoadView,
    ) -> TailAction:
        return TailAction.STAY if prefiller is None else TailAction.REMOTE


class PerTurn(Tiered):
    """See the module's text.

    Args:
        wrong_share: share of decisions turned round, chosen by a hash of the turn's id.
        greedy: look at the turn's own finish alone, not at what its neighbours lose.
    """

    tail = Tail.ASKED

    def __init__(self, *, wrong_share: float = 0.0, greedy: bool = False) -> None:
        self._wrong_share = wrong_share
        self._stall_weight = 0.0 if greedy else 1.0
        wrong = f"_{wrong_share * 100:.0f}_wrong" if wrong_share else ""
        self.name = "per_turn" + "_greedy" * greedy + wrong

    def prefill_place(
        self,
        turn: TurnView,
        decoder: EngineView,
        prefiller: EngineView | None,
        load: LoadView,
    ) -> PrefillPlace:
        if prefiller is None:
            return _NO_PREFILLER
        local_s = first_local_s(decoder, turn.prompt_tokens)
        remote_s = first_remote_s(prefiller, decoder, turn.prompt_tokens)
        remote = self._is_remote(turn, decoder, prefiller, load, local_s=local_s, remote_s=remote_s)
        return _REMOTE if remote else _DEFLECTED

    def tail_place(
        self,
        turn: TurnView,
        home: EngineView,
        prefiller: EngineView | None,
        other: EngineView | None,
        load: LoadView,
    ) -> TailAction:
        if prefiller is None:
            return TailAction.STAY
        local_s = tail_local_s(home, turn.new_tokens, load)
        remote_s = tail_remote_s(turn, home, prefiller, load)
        remote = self._is_remote(turn, home, prefiller, load, local_s=local_s, remote_s=remote_s)
        return TailAction.REMOTE if remote else TailAction.STAY

    def _is_remote(
        self,
        turn: TurnView,
        decoder: EngineView,
        prefiller: EngineView,
        load: LoadView,
        *,
        local_s: float,
        remote_s: float,
    ) -> bool:
        gain_s = remote_gains_s(
            decoder,
            prefiller,
            turn.new_tokens,
            local_s=local_s,
            remote_s=remote_s,
            stall_weight=self._stall_weight,
        )
        right = gain_s > 0.0 or breaks_slo(turn, decoder, load)
        is_wrong = crc32(turn.id.encode()) < self._wrong_share * 2**32
        return right is not is_wrong


class Ppd(FullDisaggregation):
    """See the module's text."""

    name = "ppd"

    def tail_place(
        self,
        turn: TurnView,
        home: EngineView,
        prefiller: EngineView | None,
        other: EngineView | None,
        load: LoadView,
    ) -> TailAction:
        if prefiller is None:
            return TailAction.STAY
        local_s = tail_local_s(home, turn.new_tokens, load)
        delay_s = tail_remote_s(turn, home, prefiller, load) - local_s
        spared_s = stall_s(home, turn.new_tokens) - stall_s(home, 1)
        gains = _STALL_WEIGHT * spared_s > _OWN_WEIGHT * delay_s
        return TailAction.REMOTE if gains else TailAction.STAY


class Deflection(Tiered):
    """See the module's text."""

    name = "deflection"

    def prefill_place(
        self,
        turn: TurnView,
        decoder: EngineView,
        prefiller: EngineView | None,
        load: LoadView,
    ) -> PrefillPlace:
        if prefiller is None:
            return _NO_PREFILLER
        remote_s = first_remote_s(prefiller, decoder, turn.prompt_tokens)
        later = remote_s > first_local_s(decoder, turn.prompt_tokens)
        return _DEFLECTED if later and not breaks_slo(turn, decoder, load) else _REMOTE
