"""Plans: where a turn runs, booked in the ledger and said in a decision, always in that order.

`core.scheduler` says when; the policy says where. `core.dispatch` has what happens to turns for
which there is no room now.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Final

from conserve_serving.core import ledger
from conserve_serving.core.announce import Announcer
from conserve_serving.core.counters import Counters
from conserve_serving.core.growth import GrowthModel
from conserve_serving.core.load import ObservedLoad
from conserve_serving.core.placement import Placer
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.state import ConversationState, EngineState, Phase, TurnState
from conserve_serving.core.types import EngineId, Reason, TransferReason
from conserve_serving.core.views import Policy, PrefillPlace, Tail, TailAction
from conserve_serving.core.waiting import WaitingRoom

# Engines tried for one turn whose idle conversations turn out too large for the host tier.
_PARK_TRIES: Final = 4
_REPLACED: Final[Mapping[TransferReason, Reason]] = {
    TransferReason.FIRST_TURN: Reason.FIRST_TURN_HANDOFF,
    TransferReason.APPEND: Reason.APPEND_REMOTE,
    TransferReason.LOAD: Reason.MOVED_FOR_LOAD,
    TransferReason.ENGINE_LOST: Reason.REPLACED_ENGINE_LOST,
    TransferReason.ENGINE_DRAINING: Reason.REPLACED_ENGINE_DRAINING,
    TransferReason.NO_ROOM: Reason.REPLACED_NO_ROOM,
    TransferReason.KV_LOST: Reason.REPLACED_KV_LOST,
    TransferReason.RETRY: Reason.RETRIED,
}


class Planner:
    """Makes and unmakes plans. Owned by one scheduler, which sets `now_s`."""

    def __init__(self, settings: SchedulerSettings, policy: Policy, counters: Counters) -> None:
        self.now_s = 0.0
        self.growth = GrowthModel(settings.output_reserve_tokens)
        self.load = ObservedLoad(settings.output_reserve_tokens)
        self.placer = Placer(settings, policy, self.growth, self.load)
        self.waiting = WaitingRoom()
        self._settings = settings
        self._policy = policy
        self._counters = counters
        self.no_decoder = False  # the turn tried last fits nowhere
        self.say = Announcer(counters, copies=settings.copies)
        self._freed: dict[EngineId, EngineState] = {}

    def _try_place(self, turn: TurnState) -> bool:
        conversation = turn.conversation
        if self._policy.tail is Tail.ANYWHERE:
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
        elif self._place_as_asked(turn, home) or self._place_at_home(turn, home):
            return True
        else:
            can_wait = turn.prompt_tokens < home.longest_context_tokens
            if can_wait and not self._out_of_patience(turn, home):
                return False
            cause = TransferReason.NO_ROOM
        # Only a conversation at a turn boundary moves: never under a turn that is running.
        if conversation.active == 0 and self._move(turn, home, cause):
            return True
        if cause is not TransferReason.NO_ROOM:
            # Nowhere better: a draining engine, or one that failed once, is still the home.
            return self._place_at_home(turn, home)
        if conversation.active == 0 and home.active_turns == 0 and self._others_wait(turn, home):
            # Nothing runs there, so nothing will make room: of those that wait for each other,
            # the one that has waited longest gives its KV up.
            self.release(conversation, Reason.CONVERSATION_MOVED)
            conversation.moved_because = cause
        return False

    def _move(self, turn: TurnState, home: EngineState, cause: TransferReason) -> bool:
        """Let the conversation live elsewhere: with its KV, where the driver can copy it."""
        if self._settings.copies and turn.cached_tokens and cause is not TransferReason.RETRY:
            room = self.placer.find_decoder(turn, exclude=(home,), new=False)
            if room is not None and self._place_by_copy(turn, *room, cause):
                return True
        return self._place_anew(turn, home, cause)

    def _others_wait(self, turn: TurnState, home: EngineState) -> bool:
        """Whether any other conversation would gain from the room this one has."""
        own = turn.conversation
        first = islice(home.waiting.values(), _PARK_TRIES)
        return any(other.conversation is not own for other in first)

    def _out_of_patience(self, turn: TurnState, home: EngineState) -> bool:
        """Whether waiting for room at home has cost as much as the move would.

        Waiting as long as the alternative costs, and only then taking it, never costs more than
        twice what the better choice would have: without knowing when room will appear.
        """
        if turn.patient_until_s is None:
            move_s = home.handoff_s(turn.prompt_tokens)
            if not self._settings.copies:
                move_s += home.prefill_s(turn.prompt_tokens)
            turn.patient_until_s = self.now_s + move_s
            self.waiting.recheck(turn, turn.patient_until_s)
        return self.now_s >= turn.patient_until_s

    def _place_as_asked(self, turn: TurnState, home: EngineState) -> bool:
        """Do what the policy wants with a later turn, unless that is to stay."""
        conversation = turn.conversation
        if self._policy.tail is not Tail.ASKED or not conversation.context_tokens:
            return False
        prefiller = self.placer.best_prefiller(turn, home)
        room = None
        # Only a conversation at a turn boundary moves, and only with its KV; where that failed
        # its home is the safer place.
        may_move = conversation.active == 0 and turn.attempts == 0 and turn.cached_tokens > 0
        if may_move and self._settings.copies:
            room = self.placer.find_decoder(turn, exclude=(home,), new=True)
        other = room[0] if room is not None else None
        action = self._policy.tail_place(turn, home, prefiller, other, self.load)
        if action is TailAction.REMOTE and prefiller is not None:
            return self._place_remotely(turn, home, prefiller)
        if action is TailAction.MOVE and room is not None:
            return self._place_by_copy(turn, *room, TransferReason.LOAD)
        return False

    def _place_at_home(self, turn: TurnState, home: EngineState) -> bool:
        need = self.placer.need(turn, home)
        parked = ledger.find_room(home, need, keep=turn.conversation)
        if parked is None or turn.prompt_tokens >= home.longest_context_tokens:
            return False
        self._park(home, parked)
        cached = turn.cached_tokens
        ledger.start_turn(turn, home, need_tokens=need)
        self._prefill_locally(turn, home)
        reason = Reason.PINNED if turn.attempts == 0 else Reason.RETRIED
        self.say.place(turn, reason, expected_cached=cached)
        return True

    def _place_remotely(self, turn: TurnState, home: EngineState, prefiller: EngineState) -> bool:
        """Have a prefiller compute what a turn appends; what is new is handed to its home."""
        need, pages = self.placer.need(turn, home), prefiller.pages(turn.prompt_tokens)
        parked = ledger.find_room(home, need, keep=turn.conversation)
        parked_too = ledger.find_room(prefiller, pages)
        if parked is None or parked_too is None:
            return False
        if turn.prompt_tokens >= home.longest_context_tokens:
            return False
        self._park(home, parked)
        self._park(prefiller, parked_too)
        ledger.start_turn(turn, home, need_tokens=need)
        turn.transfer = TransferReason.APPEND
        self._start_prefill(turn, prefiller, turn.new_tokens)
        self.say.place(turn, Reason.APPEND_REMOTE, expected_cached=turn.prompt_tokens)
        self.placer.touch(home)
        return True

    def _place_by_copy(
        self, turn: TurnState, decoder: EngineState, need: int, cause: TransferReason
    ) -> bool:
        """Copy the conversation's KV to another engine, where it lives from this turn on."""
        conversation = turn.conversation
        parked = ledger.find_room(decoder, need, keep=conversation)
        if parked is None:
            return False
        self._park(decoder, parked)
        cached, new = turn.cached_tokens, turn.new_tokens
        ledger.lend(turn)
        ledger.start_turn(turn, decoder, need_tokens=need)
        ledger.add_backlog(decoder, turn, new)
        turn.phase = Phase.HANDOFF
        turn.transfer = cause
        conversation.opening = turn
        self._counters.moves[cause] += 1
        self.say.place(turn, _REPLACED[cause], expected_cached=cached)
        self.placer.touch(decoder)
        return True

    def _place_anew(
        self, turn: TurnState, home: EngineState | None, cause: TransferReason | None
    ) -> bool:
        """Give a conversation a decoder, and its turn a place to be prefilled."""
        conversation = turn.conversation
        no_answer = [] if home is None else [home]
        for _ in range(_PARK_TRIES):
            room = self.placer.find_decoder(turn, exclude=no_answer, new=cause is None)
            if room is None:
                self.no_decoder = not no_answer
                return False
            decoder, need = room
            parked = ledger.find_room(decoder, need, keep=conversation)
            if parked is not None:
                break
            no_answer.append(decoder)
        else:
            return False
        prefiller, place = self._prefill_place(turn, decoder)
        if prefiller is not None:
            pages = prefiller.pages(turn.prompt_tokens)
            parked_too = ledger.find_room(prefiller, pages, keep=conversation)
            if parked_too is None:
                return False  # room on both or on none
            self._park(prefiller, parked_too)
        self._park(decoder, parked)
        former = conversation.home
        if former is not None and former is not decoder and not _runs_on(turn, former):
            self.release(conversation, Reason.CONVERSATION_MOVED)
            conversation.moved_because = cause
        if cause is not None:
            self._counters.moves[cause] += 1
        ledger.start_turn(turn, decoder, need_tokens=need)
        for other in (conversation.behind or {}).values():
            if other is not turn and other.id in self.waiting:
                self.waiting.settle(other, decoder)  # its other turns wait here now, for this
                self.free(decoder)  # one or for room: they find out when they are tried
        if prefiller is not None:
            turn.transfer = cause or TransferReason.FIRST_TURN
            self._start_prefill(turn, prefiller, turn.prompt_tokens)
            conversation.opening = turn
            expected_cached = turn.prompt_tokens
        else:
            self._prefill_locally(turn, decoder)
            expected_cached = 0
        reason = place.reason if cause is None else _REPLACED[cause]
        self.say.place(turn, reason, expected_cached=expected_cached)
        self.placer.touch(decoder)
        return True

    def _prefill_place(
        self, turn: TurnState, decoder: EngineState
    ) -> tuple[EngineState | None, PrefillPlace]:
        """The prefiller the policy wants for the turn (None: the decoder itself), and why."""
        prefiller = self.placer.best_prefiller(turn, decoder)
        place = self._policy.prefill_place(turn, decoder, prefiller, self.load)
        return (prefiller if place.remote else None), place

    def _start_prefill(self, turn: TurnState, prefiller: EngineState, tokens: int) -> None:
        """Book a prompt of which ``tokens`` are to be computed on the prefiller."""
        ledger.start_prefill(turn, prefiller, need_tokens=prefiller.pages(turn.prompt_tokens))
        ledger.add_backlog(prefiller, turn, tokens)
        turn.phase = Phase.PREFILL
        self.placer.touch(prefiller)

    def _prefill_locally(self, turn: TurnState, decoder: EngineState) -> None:
        """Book what the decoder, which the turn has been booked on, computes by itself."""
        ledger.add_backlog(decoder, turn, turn.new_tokens)
        turn.phase = Phase.DECODE
        turn.transfer = None
        self.placer.touch(decoder)

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
        if turn.transfer is not TransferReason.APPEND:
            prefiller, place = self._prefill_place(turn, decoder)
            if prefiller is not None:
                parked = ledger.find_room(prefiller, prefiller.pages(turn.prompt_tokens))
                if parked is not None:
                    self._park(prefiller, parked)
                    self._start_prefill(turn, prefiller, turn.prompt_tokens)
                    reason = _REPLACED[turn.transfer] if turn.transfer else place.reason
                    self.say.place(turn, reason, expected_cached=turn.prompt_tokens)
                    return []
        self._prefill_locally(turn, decoder)
        reason = Reason.PINNED if turn.context_tokens else Reason.FIRST_TURN_NO_PREFILLER
        self.say.place(turn, reason, expected_cached=turn.cached_tokens)
        return self.opened(turn)

    def lose_source(self, turn: TurnState) -> list[TurnState]:
        """The engine a moving conversation's KV was copied from is gone: prefill all of it anew.

        Returns:
            Turns that waited for this one and may be dispatched now.
        """
        decoder = turn.decoder
        if decoder is None or ledger.end_source(turn) is None:
            return []
        ledger.end_backlog(decoder, turn)
        self._prefill_locally(turn, decoder)
        self.say.place(turn, Reason.REPLACED_ENGINE_LOST, expected_cached=0)
        return self.opened(turn)

    def copied(self, turn: TurnState) -> None:
        """The conversation's KV has arrived where it lives now: let it go where it lived.

        After a copy that failed nothing is expected to be cached, and nothing is kept of it.
        """
        ledger.keep_copied(turn)
        ended = ledger.end_source(turn)
        if ended is not None and not ended[0].lost:
            source, tokens = ended
            self.say.release(turn.conversation, source, tokens, Reason.CONVERSATION_MOVED)
            self.free(source)

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
            if context_tokens:
                self.copied(turn)  # it came to an end without word of the copy's
            parked = ledger.end_turn(turn, context_tokens=context_tokens)
            source = turn.source
            ledger.take_back(turn)
            if source is not None and not source.lost:
                self.free(source)
            if not decoder.lost:
                self.say.parks(decoder, parked)
                self.free(decoder)
                left = context_tokens or self._policy.tail is Tail.ANYWHERE  # what it had before
                if left and conversation.home is not decoder and not _runs_on(turn, decoder):
                    self.say.release(conversation, decoder, 0, Reason.CONVERSATION_MOVED)
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
        behind, conversation.behind = conversation.behind or {}, None
        followers = [other for other in behind.values() if other.id not in self.waiting]
        for other in behind.values():
            if other.id in self.waiting:
                conversation.waits(other)
        if conversation.behind and conversation.home is not None:
            self.free(conversation.home)
        return followers

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

    def release(self, conversation: ConversationState, reason: Reason) -> None:
        home = self.home(conversation)
        if home is None:
            return
        self.say.release(conversation, home, ledger.leave_home(conversation), reason)
        self.free(home)

    def free(self, engine: EngineState) -> None:
        self._freed[engine.id] = engine
        self.placer.touch(engine)

    def _park(self, engine: EngineState, conversations: list[ConversationState]) -> None:
        ledger.park(engine, conversations)
        self.say.parks(engine, conversations)


def _runs_on(turn: TurnState, engine: EngineState) -> bool:
    """Whether another turn of its conversation runs there."""
    conversation = turn.conversation
    return conversation.active > 0 and any(
        other.conversation is conversation and other.decoder is engine and other is not turn
        for other in engine.turns.values()
    )
