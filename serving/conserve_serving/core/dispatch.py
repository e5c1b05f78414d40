"""Carrying a choice out: placing, holding, waking, moving.

`core.scheduler` says when; the policy says where; this module books it in the ledger and emits
the decision, always in that order, so that no decision is ever given that the books do not hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from math import inf
from typing import Final

from conserve_serving.core import ledger
from conserve_serving.core.announce import Announcer
from conserve_serving.core.counters import Counters
from conserve_serving.core.growth import GrowthModel
from conserve_serving.core.placement import Placer
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.state import ConversationState, EngineState, Phase, TurnState
from conserve_serving.core.types import EngineId, Reason, Tier, TransferReason
from conserve_serving.core.views import Policy, PrefillPlace
from conserve_serving.core.waiting import WaitingRoom

# Rounds of waking in one event: a turn that moves frees room where it was.
_WAKE_ROUNDS: Final = 4
# Engines tried for one turn whose idle conversations turn out too large for the host tier.
_PARK_TRIES: Final = 4
# Idle conversations looked at, and at most released, to make room for one turn.
_DISPLACE: Final = 64
_REPLACED: Final[Mapping[TransferReason, Reason]] = {
    TransferReason.FIRST_TURN: Reason.FIRST_TURN_HANDOFF,
    TransferReason.ENGINE_LOST: Reason.REPLACED_ENGINE_LOST,
    TransferReason.ENGINE_DRAINING: Reason.REPLACED_ENGINE_DRAINING,
    TransferReason.NO_ROOM: Reason.REPLACED_NO_ROOM,
    TransferReason.KV_LOST: Reason.REPLACED_KV_LOST,
    TransferReason.RETRY: Reason.RETRIED,
}


class Dispatcher:
    """Places turns or lets them wait. Owned by one scheduler, which sets `now_s`."""

    def __init__(self, settings: SchedulerSettings, policy: Policy, counters: Counters) -> None:
        self.now_s = 0.0
        self.growth = GrowthModel(settings.output_reserve_tokens)
        self.placer = Placer(settings, policy, self.growth)
        self.waiting = WaitingRoom()
        self._settings = settings
        self._policy = policy
        self._counters = counters
        self.say = Announcer(counters)
        self._freed: dict[EngineId, EngineState] = {}

    def dispatch(self, turn: TurnState) -> Reason | None:
        """Place the turn now or let it wait; returns why it is refused if neither can be."""
        conversation = turn.conversation
        limit = self._settings.max_waiting_turns
        if self._is_behind(turn):
            if len(conversation.behind or ()) >= limit:
                return Reason.QUEUE_FULL
            self._line_up(turn)
            return None
        if self._try_place(turn) or (self._displace(turn) and self._try_place(turn)):
            return None
        home = self.home(conversation)
        is_new = home is None and conversation.turns == 0
        if is_new and self.waiting.new_turns >= limit:
            return Reason.QUEUE_FULL
        self.waiting.add(turn, self._waiting_place(turn))
        if self.placer.has_hosts:
            self._hold(turn, Reason.HELD_NO_ROOM, "a turn or a conversation ends")
        else:
            self._hold(turn, Reason.HELD_NO_ENGINE, "an engine joins")
        return None

    def wake(self) -> None:
        """Room appeared on some engines: tail turns first, then new conversations, oldest first."""
        again: dict[EngineId, EngineState] = {}
        for _ in range(_WAKE_ROUNDS):
            freed, self._freed = self._freed, {}
            for engine in freed.values():
                waiting = len(self.waiting)
                if engine.lost or not waiting:
                    continue
                candidates = self.waiting.candidates(engine, self.placer.room_tokens(), self.now_s)
                for turn in candidates:
                    if turn.waits_at is engine:  # whose home this was may have none any more
                        self.waiting.settle(turn, self._waiting_place(turn))
                placed = [turn for turn in candidates if self._retry(turn)]
                if placed and len(candidates) < waiting:
                    again[engine.id] = engine  # there may be room for more than were tried
            if not self._freed:
                break
        self._freed.update(again)
        if not len(self.waiting):
            self._freed.clear()

    @property
    def unfinished(self) -> bool:
        """Whether room is left over that waiting turns have yet to be tried for."""
        return bool(self._freed)

    def recheck(self) -> None:
        """Try the turns again whose patience has ended by now."""
        for turn in self.waiting.due_rechecks(self.now_s):
            self._retry(turn)

    def leave(self, turn: TurnState) -> None:
        """A waiting turn waits no more, without having been placed."""
        at = turn.waits_at
        self.waiting.remove(turn)
        if at is not None and not at.lost:
            self.free(at)  # what it kept others from is theirs now

    def orphan(self, engine: EngineState) -> None:
        """The engine is gone: the turns that waited for its room are tried elsewhere, at once or,
        where they are many, in the next events."""
        for turn in list(engine.waiting.values()):
            self.waiting.settle(turn, None)
            self.waiting.recheck(turn, self.now_s)
        self.recheck()
        if engine.tier is Tier.PREFILL:  # who waited for room there may be prefilled elsewhere
            best = self.placer.best_host()
            if best is not None:
                self.free(best)

    def _retry(self, turn: TurnState) -> bool:
        """Try a turn of the waiting room again; whether it was placed."""
        if turn.id not in self.waiting:
            return False
        if self._is_behind(turn):
            self.leave(turn)
            self._line_up(turn)
            return False
        if self._try_place(turn) or (self._displace(turn) and self._try_place(turn)):
            self.waiting.remove(turn)
            return True
        self.waiting.settle(turn, self._waiting_place(turn))
        return False

    def _is_behind(self, turn: TurnState) -> bool:
        """Whether another turn is about to bring the KV that this one needs."""
        opening = turn.conversation.opening
        return opening is not None and opening is not turn

    def _line_up(self, turn: TurnState) -> None:
        conversation = turn.conversation
        opening = conversation.opening
        conversation.waits(turn)
        what = f"turn {opening.id} is prefilled" if opening is not None else ""
        self._hold(turn, Reason.HELD_BEHIND_FIRST_TURN, what)

    def _waiting_place(self, turn: TurnState) -> EngineState | None:
        """The engine whose room the turn waits for: its home; for a tail turn that has none, one
        that takes no new conversations until it has found room; for a new conversation, any."""
        home = self.home(turn.conversation)
        if home is not None or not turn.conversation.turns:
            return home
        at = turn.waits_at
        if at is not None and not at.lost and not at.draining:
            return at
        return self.placer.waiting_place(turn)

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
        if prefiller is not None:
            parked = ledger.find_room(prefiller, prefiller.pages(turn.prompt_tokens))
            if parked is not None:
                self._park(prefiller, parked)
                self._start_prefill(turn, prefiller)
                reason = _REPLACED[turn.transfer] if turn.transfer else place.reason
                self.say.place(turn, reason, expected_cached=turn.prompt_tokens)
                return []
        self._prefill_locally(turn, decoder)
        self.say.place(turn, Reason.FIRST_TURN_NO_PREFILLER, expected_cached=0)
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
                self.say.parks(decoder, parked)
                self.free(decoder)
                if conversation.home is not decoder and context_tokens:
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

    def release(self, conversation: ConversationState, reason: Reason) -> None:
        home = self.home(conversation)
        if home is None:
            return
        self.say.release(conversation, home, ledger.leave_home(conversation), reason)
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
            can_wait = turn.prompt_tokens < home.longest_context_tokens
            if can_wait and not self._out_of_patience(turn, home):
                return False
            cause = TransferReason.NO_ROOM
        # Only a conversation at a turn boundary moves: never under a turn that is running.
        if conversation.active == 0 and self._place_anew(turn, home, cause):
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
            tokens = turn.prompt_tokens
            move_s = home.prefill_s(tokens) + home.handoff_s(tokens)
            turn.patient_until_s = self.now_s + move_s
            self.waiting.recheck(turn, turn.patient_until_s)
        return self.now_s >= turn.patient_until_s

    def _displace(self, turn: TurnState) -> bool:
        """Release KV that has been idle for longer than it is protected, until the turn has room.

        For conversations that nobody ends: where parking cannot help, they must not lock new ones
        out until they expire. The turn is tried again when the next protection ends.
        """
        conversation = turn.conversation
        engine = self.home(conversation) or self.placer.longest_idle(turn)
        if engine is None:
            return False
        missing = self.placer.wanted_tokens(turn, engine) - engine.reachable_tokens(conversation)
        host_free = engine.host_capacity_tokens - engine.parked_tokens
        if missing > engine.idle_tokens - host_free:
            return False  # what is idle and cannot be parked is not enough: the rest is running
        victims: list[ConversationState] = []
        next_s = inf
        for idle in islice(engine.idle.values(), _DISPLACE):
            if missing <= 0:
                break
            if idle is conversation or idle.live:
                continue
            safe_until_s = idle.last_active_s + self._settings.protect_idle_s
            if safe_until_s > self.now_s:
                next_s = min(next_s, safe_until_s)
                continue
            victims.append(idle)
            missing -= idle.resident
        if missing > 0:
            if next_s < inf and (turn.recheck_s is None or turn.recheck_s <= self.now_s):
                turn.recheck_s = next_s
                self.waiting.recheck(turn, next_s)
            return False
        for victim in victims:
            self.release(victim, Reason.IDLE_DISPLACED)
            victim.moved_because = TransferReason.KV_LOST
        return bool(victims)

    def _place_at_home(self, turn: TurnState, home: EngineState) -> bool:
        conversation = turn.conversation
        need = self.placer.need(turn, home)
        parked = ledger.find_room(home, need, keep=conversation)
        if parked is None or turn.prompt_tokens >= home.longest_context_tokens:
            return False
        self._park(home, parked)
        # An engine computes one token at least, and the books count whole pages.
        cached = min(conversation.context_tokens, turn.prompt_tokens - 1)
        if turn.reusable_tokens is not None:
            cached = min(cached, turn.reusable_tokens)
        ledger.start_turn(turn, home, need_tokens=need)
        ledger.add_backlog(home, turn, turn.prompt_tokens - cached)
        turn.phase = Phase.DECODE
        turn.transfer = None
        reason = Reason.PINNED if turn.attempts == 0 else Reason.RETRIED
        self.say.place(turn, reason, expected_cached=cached)
        self.placer.touch(home)
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
        if conversation.active == 0 and conversation.home not in (None, decoder):
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
            self._start_prefill(turn, prefiller)
            turn.transfer = cause or TransferReason.FIRST_TURN
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

    def _park(self, engine: EngineState, conversations: list[ConversationState]) -> None:
        ledger.park(engine, conversations)
        self.say.parks(engine, conversations)

    def _hold(self, turn: TurnState, reason: Reason, waits_for: str) -> None:
        settings = self._settings
        limit_s = settings.max_hold_s
        if reason is Reason.HELD_NO_ENGINE:
            limit_s = min(limit_s, settings.no_engine_hold_s)
        until_s = self.waiting.until(turn, self.now_s + limit_s)
        self.say.hold(turn, reason, waits_for, until_s)
