"""Carrying a choice out: placing, holding, waking, moving. The decisions are written here.

`core.scheduler` says when; the policy says where; this module books it in the ledger and emits
the decision, always in that order, so that no decision is ever given that the books do not hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from conserve_serving.core import ledger
from conserve_serving.core.counters import Counters
from conserve_serving.core.decisions import Decision, Hold, Park, Place, Release
from conserve_serving.core.growth import GrowthModel
from conserve_serving.core.placement import Placer
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.state import ConversationState, EngineState, Phase, TurnState
from conserve_serving.core.types import EngineId, Reason, TransferReason
from conserve_serving.core.views import Policy, PrefillPlace
from conserve_serving.core.waiting import WaitingRoom

# Rounds of waking in one event: a turn that moves frees room where it was.
_WAKE_ROUNDS: Final = 4
_REPLACED: Final[Mapping[TransferReason, Reason]] = {
    TransferReason.FIRST_TURN: Reason.FIRST_TURN_HANDOFF,
    TransferReason.ENGINE_LOST: Reason.REPLACED_ENGINE_LOST,
    TransferReason.ENGINE_DRAINING: Reason.REPLACED_ENGINE_DRAINING,
    TransferReason.NO_ROOM: Reason.REPLACED_NO_ROOM,
    TransferReason.KV_LOST: Reason.REPLACED_KV_LOST,
    TransferReason.RETRY: Reason.RETRIED,
}


class Dispatcher:
    """Places turns or lets them wait. Owned by one scheduler, which sets `now_s` and `out`."""

    def __init__(self, settings: SchedulerSettings, policy: Policy, counters: Counters) -> None:
        self.now_s = 0.0
        self.out: list[Decision] = []
        self.growth = GrowthModel(settings.output_reserve_tokens)
        self.placer = Placer(settings, policy, self.growth)
        self.waiting = WaitingRoom()
        self._settings = settings
        self._policy = policy
        self._counters = counters
        self._plan = 0
        self._freed: dict[EngineId, EngineState] = {}

    def dispatch(self, turn: TurnState) -> Reason | None:
        """Place the turn now or let it wait; returns why it is refused if neither can be."""
        conversation = turn.conversation
        opening = conversation.opening
        if opening is not None and opening is not turn:
            if conversation.behind is None:
                conversation.behind = []
            conversation.behind.append(turn)
            self._hold(turn, Reason.HELD_BEHIND_FIRST_TURN, f"turn {opening.id} is prefilled")
            return None
        if self._try_place(turn):
            return None
        home = self.home(conversation)
        is_new = home is None and conversation.turns == 0
        if is_new and self.waiting.new_turns >= self._settings.max_waiting_turns:
            return Reason.QUEUE_FULL
        self.waiting.add(turn, home)
        if self.placer.has_hosts:
            self._hold(turn, Reason.HELD_NO_ROOM, "a turn or a conversation ends")
        else:
            self._hold(turn, Reason.HELD_NO_ENGINE, "an engine joins")
        return None

    def wake(self) -> None:
        """Room appeared on some engines: tail turns first, then new conversations, oldest first."""
        for _ in range(_WAKE_ROUNDS):
            freed, self._freed = self._freed, {}
            for engine in freed.values():
                if engine.lost or not len(self.waiting):
                    continue
                for turn in self.waiting.candidates(engine):
                    if turn.phase is Phase.WAITING and self._try_place(turn):
                        self.waiting.remove(turn)
            if not self._freed:
                break

    def recheck(self) -> None:
        """Try the turns again whose patience has ended by now."""
        for turn in self.waiting.due_rechecks(self.now_s):
            if self._try_place(turn):
                self.waiting.remove(turn)

    def change_prefiller(self, turn: TurnState) -> list[TurnState]:
        """The prefiller of a placed turn is gone: take another, or let the decoder prefill.

        Returns:
            Turns that waited for this one and may be dispatched now.
        """
        decoder, lost = turn.decoder, turn.prefiller
        if decoder is None or lost is None:
            return []
        ledger.end_backlog(lost if turn.phase is Phase.PREFILL else decoder, turn)
        ledger.end_prefill(turn)
        prefiller, place = self._prefill_place(turn, decoder)
        if prefiller is not None and prefiller.free_tokens >= prefiller.pages(turn.prompt_tokens):
            self._start_prefill(turn, prefiller)
            self._emit_place(turn, place.reason, expected_cached=turn.prompt_tokens)
            return []
        self._prefill_locally(turn, decoder)
        self._emit_place(turn, Reason.FIRST_TURN_NO_PREFILLER, expected_cached=0)
        return self.opened(turn)

    def unplan(self, turn: TurnState, *, context_tokens: int | None) -> list[TurnState]:
        """Take a placed turn off all books.

        Args:
            turn: a placed turn.
            context_tokens: context its conversation has on the decoder now; None: what it had.

        Returns:
            Turns that waited for this one and may be dispatched now.
        """
        conversation, decoder = turn.conversation, turn.decoder
        ledger.end_backlog(turn.prefiller if turn.phase is Phase.PREFILL else decoder, turn)
        prefiller = ledger.end_prefill(turn)
        if prefiller is not None:
            self.free(prefiller)
        if decoder is not None:
            parked = ledger.end_turn(turn, context_tokens=context_tokens)
            if not decoder.lost:
                self._emit_parks(decoder, parked)
                self.free(decoder)
        turn.phase = Phase.WAITING
        turn.prefilled = False
        cause = conversation.moved_because
        followers = self.opened(turn)
        if conversation.context_tokens == 0:
            conversation.moved_because = cause  # it left before it brought any KV about
        return followers

    def opened(self, turn: TurnState) -> list[TurnState]:
        """The conversation's KV is or will be at its home; returns the turns that waited for it."""
        conversation = turn.conversation
        if conversation.opening is not turn:
            return []
        conversation.opening = None
        conversation.moved_because = None
        behind, conversation.behind = conversation.behind, None
        return behind or []

    def release(self, conversation: ConversationState, reason: Reason) -> None:
        home = self.home(conversation)
        if home is None:
            return
        tokens = ledger.leave_home(conversation)
        self._counters.releases[reason] += 1
        self.out.append(
            Release(conversation=conversation.id, engine=home.id, tokens=tokens, reason=reason)
        )
        self.free(home)

    def home(self, conversation: ConversationState) -> EngineState | None:
        home = conversation.home
        if home is not None and home.lost:
            if conversation.context_tokens or conversation.transfers:
                conversation.moved_because = TransferReason.ENGINE_LOST
            ledger.leave_home(conversation)
            return None
        return home

    def note_kv_lost(self, conversation: ConversationState, cause: TransferReason) -> None:
        """Remember why a conversation that had KV has none: the reason of its next placement."""
        if (
            self.home(conversation) is None
            and conversation.moved_because is None
            and (conversation.turns or conversation.transfers)
        ):
            conversation.moved_because = cause

    def free(self, engine: EngineState) -> None:
        self._freed[engine.id] = engine
        self.placer.touch(engine)

    # --- placing -----------------------------------------------------------------------------
    def _try_place(self, turn: TurnState) -> bool:
        conversation = turn.conversation
        if not self._policy.sticky:
            return self._place_anew(turn, None, None)
        home = self.home(conversation)
        cause = conversation.moved_because
        if home is None:
            if cause is None and (conversation.turns or conversation.transfers):
                cause = TransferReason.KV_LOST
            return self._place_anew(turn, None, cause)
        if turn.avoid == home.id:
            cause = TransferReason.RETRY
        elif home.draining:
            cause = TransferReason.ENGINE_DRAINING
        elif self._place_at_home(turn, home):
            return True
        else:
            if not self._out_of_patience(turn, home):
                return False
            cause = TransferReason.NO_ROOM
        # Only a conversation at a turn boundary moves: never under a turn that is running.
        if conversation.active == 0 and self._place_anew(turn, home, cause):
            return True
        if cause is not TransferReason.NO_ROOM:
            # Nowhere better: a draining engine, or one that failed once, is still the home.
            return self._place_at_home(turn, home)
        if conversation.active == 0 and home.active_turns == 0:
            # Nothing runs there, so nothing will make room: of those that wait for each other,
            # the one that has waited longest gives its KV up.
            self.release(conversation, Reason.CONVERSATION_MOVED)
            conversation.moved_because = cause
        return False

    def _out_of_patience(self, turn: TurnState, home: EngineState) -> bool:
        """Whether waiting for room at home has cost as much as the move would.

        Waiting as long as the alternative costs, and only then taking it, never costs more than
        twice what the better choice would have: without knowing when room will appear.
        """
        if turn.patient_until_s is None:
            tokens = turn.prompt_tokens
            move_s = home.prefill_s(tokens) + home.handoff_s(tokens)
            turn.patient_until_s = self.now_s + move_s
            self.waiting.recheck(turn, turn.patient_until_s)
        return self.now_s >= turn.patient_until_s

    def _place_at_home(self, turn: TurnState, home: EngineState) -> bool:
        conversation = turn.conversation
        need = self.placer.need(turn, home)
        if not self._make_room(home, need, keep=conversation):
            return False
        cached = min(conversation.context_tokens, turn.prompt_tokens)
        if turn.reusable_tokens is not None:
            cached = min(cached, turn.reusable_tokens)
        ledger.start_turn(turn, home, need_tokens=need)
        ledger.add_backlog(home, turn, turn.prompt_tokens - cached)
        turn.phase = Phase.DECODE
        turn.transfer = None
        reason = Reason.PINNED if turn.attempts == 0 else Reason.RETRIED
        self._emit_place(turn, reason, expected_cached=cached)
        self.placer.touch(home)
        return True

    def _place_anew(
        self, turn: TurnState, home: EngineState | None, cause: TransferReason | None
    ) -> bool:
        """Give a conversation a decoder, and its turn a place to be prefilled."""
        conversation = turn.conversation
        room = self.placer.find_decoder(turn, exclude=home, with_headroom=cause is None)
        if room is None:
            return False
        decoder, need = room
        prefiller, place = self._prefill_place(turn, decoder)
        if prefiller is not None and prefiller.free_tokens < prefiller.pages(turn.prompt_tokens):
            return False  # room on both or on none
        if not self._make_room(decoder, need, keep=conversation):
            return False
        if home is not None:
            self.release(conversation, Reason.CONVERSATION_MOVED)
            conversation.moved_because = cause
        if cause is not None:
            self._counters.moves[cause] += 1
        ledger.start_turn(turn, decoder, need_tokens=need)
        if prefiller is not None:
            self._start_prefill(turn, prefiller)
            turn.transfer = cause or TransferReason.FIRST_TURN
            conversation.opening = turn
            expected_cached = turn.prompt_tokens
        else:
            self._prefill_locally(turn, decoder)
            expected_cached = 0
        reason = place.reason if cause is None else _REPLACED[cause]
        self._emit_place(turn, reason, expected_cached=expected_cached)
        self.placer.touch(decoder)
        return True

    def _prefill_place(
        self, turn: TurnState, decoder: EngineState
    ) -> tuple[EngineState | None, PrefillPlace]:
        """The prefiller the policy wants for the turn (None: the decoder itself), and why."""
        prefiller = self.placer.best_prefiller(turn, decoder)
        place = self._policy.prefill_place(turn, decoder, prefiller)
        return (prefiller if place.remote else None), place

    def _start_prefill(self, turn: TurnState, prefiller: EngineState) -> None:
        ledger.start_prefill(turn, prefiller, need_tokens=prefiller.pages(turn.prompt_tokens))
        ledger.add_backlog(prefiller, turn, turn.prompt_tokens)
        turn.phase = Phase.PREFILL
        self.placer.touch(prefiller)

    def _prefill_locally(self, turn: TurnState, decoder: EngineState) -> None:
        ledger.add_backlog(decoder, turn, turn.prompt_tokens)
        turn.phase = Phase.DECODE
        turn.transfer = None
        self.placer.touch(decoder)

    def _make_room(self, engine: EngineState, tokens: int, *, keep: ConversationState) -> bool:
        if engine.free_tokens < tokens and engine.reachable_tokens(keep) >= tokens:
            self._emit_parks(engine, ledger.make_room(engine, tokens, keep=keep))
        return engine.free_tokens >= tokens

    def _emit_place(self, turn: TurnState, reason: Reason, *, expected_cached: int) -> None:
        decoder, prefiller = turn.decoder, turn.prefiller
        assert decoder is not None  # noqa: S101 -- placed just above; for the type checker
        self._plan += 1
        turn.plan = self._plan
        turn.attempts += 1
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
            )
        )

    def _emit_parks(self, engine: EngineState, parked: list[ConversationState]) -> None:
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

    def _hold(self, turn: TurnState, reason: Reason, waits_for: str) -> None:
        until_s = self.waiting.until(turn, self.now_s + self._settings.max_hold_s)
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
