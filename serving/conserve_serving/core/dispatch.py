"""Turns for which there may be no room: placing them, holding them, waking them when room appears.

How a turn is placed is `core.plans`' business.
"""

from __future__ import annotations

from itertools import islice
from math import inf
from typing import Final

from conserve_serving.core.plans import Planner
from conserve_serving.core.state import ConversationState, EngineState, TurnState
from conserve_serving.core.types import EngineId, Reason, Tier, TransferReason

# Rounds of waking in one event: a turn that moves frees room where it was.
_WAKE_ROUNDS: Final = 4
# Idle conversations looked at, and at most released, to make room for one turn.
_DISPLACE: Final = 64


class Dispatcher(Planner):
    """Places turns or lets them wait. Owned by one scheduler, which sets `now_s`."""

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
                room_tokens = self.placer.offered_tokens(engine)
                candidates = self.waiting.candidates(engine, room_tokens, self.now_s)
                for turn in candidates:
                    if turn.waits_at is engine:  # whose home this was may have none any more
                        self.waiting.settle(turn, self._waiting_place(turn))
                # While a later turn waits here no new conversation gets in: that is settled first.
                candidates.sort(key=lambda turn: not turn.conversation.turns)
                placed = self._retry_all(candidates)
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

    def _retry_all(self, candidates: list[TurnState]) -> int:
        """Try them in order; where a new conversation found no decoder, no larger one does.

        Returns:
            How many were placed.
        """
        placed, too_large_tokens = 0, inf
        for turn in candidates:
            conversation = turn.conversation
            is_new = not conversation.turns and conversation.home is None and turn.avoid is None
            tokens = self.placer.target_tokens(turn) if is_new else 0.0
            if tokens >= too_large_tokens:
                continue
            self.no_decoder = False
            if self._retry(turn):
                placed += 1
            elif is_new and self.no_decoder:  # it is not for a prefiller that it goes on waiting
                too_large_tokens = tokens
        return placed

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
        if at is not None and at.hosts:
            return at
        return self.placer.waiting_place(turn)

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

    def _hold(self, turn: TurnState, reason: Reason, waits_for: str) -> None:
        settings = self._settings
        limit_s = settings.max_hold_s
        if reason is Reason.HELD_NO_ENGINE:
            limit_s = min(limit_s, settings.no_engine_hold_s)
        until_s = self.waiting.until(turn, self.now_s + limit_s)
        self.say.hold(turn, reason, waits_for, until_s)
