"""The decisions, written and counted. What they say is in the books already."""

from __future__ import annotations

from conserve_serving.core.counters import Counters
from conserve_serving.core.decisions import Decision, Hold, Park, Place, Release
from conserve_serving.core.state import ConversationState, EngineState, TurnState
from conserve_serving.core.types import Reason, TransferReason


class Announcer:
    """Appends to ``out``, the decisions of the event at hand."""

    def __init__(self, counters: Counters, *, copies: bool) -> None:
        self._copies = copies
        self.out: list[Decision] = []
        self._counters = counters
        self._plan = 0

    def place(self, turn: TurnState, reason: Reason, *, expected_cached: int) -> None:
        decoder, prefiller = turn.decoder, turn.prefiller
        assert decoder is not None  # noqa: S101 -- placed just above; for the type checker
        source = turn.source
        if source is None and turn.transfer is TransferReason.APPEND and self._copies:
            source = decoder
        self._plan += 1
        turn.plan = self._plan
        turn.attempts += 1
        turn.until_s = turn.patient_until_s = None  # if it waits again, it does so anew
        turn.expected_cached_tokens = expected_cached
        self._counters.placements[reason] += 1
        self.out.append(
            Place(
                turn=turn.id,
                conversation=turn.conversation.id,
                plan=turn.plan,
                decoder=decoder.id,
                prefiller=prefiller.id if prefiller is not None else None,
                reason=reason,
                transfer=turn.transfer,
                turn_index=turn.index,
                expected_cached_tokens=expected_cached,
                priority=1 if turn.conversation.turns else 0,
                source=source.id if source is not None else None,
            )
        )

    def parks(self, engine: EngineState, parked: list[ConversationState]) -> None:
        for conversation in parked:
            self._counters.parks += 1
            self._counters.parked_tokens += conversation.parked
            self.out.append(
                Park(
                    conversation=conversation.id,
                    engine=engine.id,
                    tokens=conversation.parked,
                    reason=Reason.PARKED_FOR_ROOM,
                )
            )

    def release(
        self, conversation: ConversationState, engine: EngineState, tokens: int, reason: Reason
    ) -> None:
        self._counters.releases[reason] += 1
        self.out.append(
            Release(conversation=conversation.id, engine=engine.id, tokens=tokens, reason=reason)
        )

    def hold(self, turn: TurnState, reason: Reason, waits_for: str, until_s: float) -> None:
        self._counters.holds[reason] += 1
        self.out.append(
            Hold(
                turn=turn.id,
                conversation=turn.conversation.id,
                reason=reason,
                waits_for=waits_for,
                until_s=until_s,
            )
        )
