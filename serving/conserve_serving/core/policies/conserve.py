"""The ConServe policy: turn 1 where compute is plentiful, one hand-off, then one decoder.

- **Decoder**: most free KV per second a decode step takes there now. Free KV is the paper's
  signal; dividing by the engine's own step time, at the context it is reading, weighs active work
  and unlike GPUs in the same number. Ties go by engine id.
- **Prefiller**: the one that would be done first with what is already waiting on it and then this
  prompt, by its own measured speed.
- **Short first turns** stay on their decoder: while prefilling would occupy it for less time than
  a hand-off takes, both as measured and interference with its running turns included, there is
  nothing to gain.
"""

from __future__ import annotations

from conserve_serving.core.policies.common import Defaults
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.types import Reason, Tier, TierMode
from conserve_serving.core.views import EngineView, LoadView, PrefillPlace, TurnView


class ConServe(Defaults):
    """See the module's text; configured by ``tier_mode`` and ``handoff_min_tokens``."""

    name = "conserve"
    hands_over = True

    def __init__(self, settings: SchedulerSettings) -> None:
        self._prefill_tier_hosts = settings.tier_mode is TierMode.HOSTING
        self._min_tokens = settings.handoff_min_tokens
        self._floor_tokens = settings.handoff_floor_tokens

    def hosts(self, engine: EngineView) -> bool:
        return self._prefill_tier_hosts or engine.tier is Tier.DECODE

    def rank(self, engine: EngineView, load: LoadView) -> float:
        return -engine.free_tokens / engine.decode_step_s(engine.active_tokens)

    def prefill_place(
        self,
        turn: TurnView,
        decoder: EngineView,
        prefiller: EngineView | None,
        load: LoadView,
    ) -> PrefillPlace:
        if decoder.tier is Tier.PREFILL:
            return PrefillPlace(remote=False, reason=Reason.FIRST_TURN_COLLOCATED)
        if prefiller is None:
            return PrefillPlace(remote=False, reason=Reason.FIRST_TURN_NO_PREFILLER)
        tokens = turn.prompt_tokens
        if self._min_tokens is None:
            local_s = decoder.prefill_s(tokens)
            if decoder.active_turns:  # its neighbours' steps would slow down, as measured
                local_s *= decoder.mixed_slowdown
            worth = tokens >= self._floor_tokens and local_s >= prefiller.handoff_s(tokens)
        else:
            worth = tokens >= self._min_tokens
        if not worth:
            return PrefillPlace(remote=False, reason=Reason.FIRST_TURN_SHORT)
        return PrefillPlace(remote=True, reason=Reason.FIRST_TURN_HANDOFF)
