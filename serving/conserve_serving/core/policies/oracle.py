"""What nobody can have: a policy that knows each conversation's whole future.

It reserves all the KV that a conversation will ever hold (as the ConServe paper's own runs do),
places it where the least is foreseen, prefills wherever that ends first, and moves conversations
when that gains time. It shows what knowledge would be worth. It is not a proof: a lower bound of
latency is the conversation alone on an idle cluster, one of capacity is the fluid one in the
laboratory.
"""

from __future__ import annotations

from conserve_serving.core.policies.collocated import Collocated
from conserve_serving.core.policies.common import first_local_s, first_remote_s
from conserve_serving.core.types import Reason
from conserve_serving.core.views import EngineView, LoadView, PrefillPlace, TurnView


class Oracle(Collocated):
    """See the module's text."""

    hands_over = True

    def __init__(self) -> None:
        super().__init__(by_speed=True, override=True)
        self.name = "oracle"

    def rank(self, engine: EngineView, load: LoadView) -> float:
        foreseen = max(engine.foreseen_tokens, engine.held_tokens)
        first_s = first_local_s(engine, load.first_prompt_tokens)
        return first_s + load.output_tokens * engine.decode_step_s(float(foreseen))

    def prefill_place(
        self,
        turn: TurnView,
        decoder: EngineView,
        prefiller: EngineView | None,
        load: LoadView,
    ) -> PrefillPlace:
        if prefiller is not None and prefiller is not decoder:
            remote_s = first_remote_s(prefiller, decoder, turn.prompt_tokens)
            if remote_s < first_local_s(decoder, turn.prompt_tokens):
                return PrefillPlace(remote=True, reason=Reason.FIRST_TURN_HANDOFF)
        return PrefillPlace(remote=False, reason=Reason.FIRST_TURN_COLLOCATED)
