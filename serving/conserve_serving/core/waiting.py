"""Turns that wait: in which order they are tried, and until when each of them may wait."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from itertools import islice
from math import inf
from typing import Final

from conserve_serving.core.state import EngineState, Phase, TurnState
from conserve_serving.core.types import TurnId

# Turns tried when room appears on one engine: so many of the oldest, and as many of the smallest.
# Bounds the cost of one event; what is left over is tried in the next one.
_TRY: Final = 8
# Tail turns looked at to find those.
_LOOK: Final = 64
# Turns tried or refused because of the time, in one event.
_DUE: Final = 64


class WaitingRoom:
    """Waiting turns: tail turns and new conversations apart, each in order of arrival."""

    __slots__ = ("_deadlines", "_new", "_rechecks", "_serial", "_sizes", "_tail")

    def __init__(self) -> None:
        self._tail: OrderedDict[TurnId, TurnState] = OrderedDict()
        self._new: OrderedDict[TurnId, TurnState] = OrderedDict()
        self._sizes: list[tuple[int, int, TurnState]] = []  # of new conversations
        self._deadlines: list[tuple[float, int, TurnState]] = []
        self._rechecks: list[tuple[float, int, TurnState]] = []
        self._serial = 0  # breaks ties in the heaps

    def __len__(self) -> int:
        return len(self._tail) + len(self._new)

    def __contains__(self, turn: TurnId) -> bool:
        return turn in self._tail or turn in self._new

    @property
    def new_turns(self) -> int:
        """First turns that wait."""
        return len(self._new)

    def add(self, turn: TurnState, engine: EngineState | None) -> None:
        """The turn waits for room: on that engine before all, or anywhere."""
        if turn.conversation.turns:
            self._tail[turn.id] = turn
        else:
            self._new[turn.id] = turn
            if len(self._sizes) > 2 * len(self._new) + _LOOK:  # most of them wait no more
                self._sizes = [entry for entry in self._sizes if self._is_new(entry[2])]
                heapq.heapify(self._sizes)
            heapq.heappush(self._sizes, (turn.prompt_tokens, self._next(), turn))
        turn.conversation.waits(turn)
        self.settle(turn, engine)

    def settle(self, turn: TurnState, engine: EngineState | None) -> None:
        """The waiting turn waits for room on that engine now."""
        if turn.waits_at is engine:
            return
        if turn.waits_at is not None:
            turn.waits_at.waiting.pop(turn.id, None)
        turn.waits_at = engine
        if engine is not None:
            engine.waiting[turn.id] = turn

    def remove(self, turn: TurnState) -> None:
        """The turn waits no more."""
        self._tail.pop(turn.id, None)
        self._new.pop(turn.id, None)
        self.settle(turn, None)
        behind = turn.conversation.behind
        if behind is not None:
            behind.pop(turn.id, None)

    def candidates(self, engine: EngineState, room_tokens: float, now_s: float) -> list[TurnState]:
        """Turns worth a try now that the engine has room: its own first, tails before new ones.

        Args:
            engine: where room appeared.
            room_tokens: the most that a new conversation could get.
            now_s: tail turns that still wait for room at another home are left alone.
        """
        own = list(islice(engine.waiting.values(), _LOOK))
        movable = [
            turn
            for turn in islice(self._tail.values(), _LOOK)
            if turn.waits_at is None
            or turn.waits_at is not turn.conversation.home
            or turn.patient_until_s is None
            or turn.patient_until_s <= now_s
        ]
        found: dict[TurnState, None] = {}
        for turns in (own, movable):
            found.update(dict.fromkeys(turns[:_TRY]))
            if len(turns) > _TRY:
                found.update(dict.fromkeys(heapq.nsmallest(_TRY, turns, key=_growth_tokens)))
        if self._smallest_tokens() <= room_tokens:
            for turn in (*islice(self._new.values(), _TRY), *self._smallest()):
                if turn.prompt_tokens <= room_tokens:
                    found[turn] = None
        return list(found)

    def _smallest_tokens(self) -> float:
        """Prompt of the smallest new turn; infinite when none waits."""
        while self._sizes:
            tokens, _, turn = self._sizes[0]
            if self._is_new(turn):
                return tokens
            heapq.heappop(self._sizes)
        return inf

    def _smallest(self) -> list[TurnState]:
        """The smallest new turns: where they do not fit, no other does."""
        kept: list[tuple[int, int, TurnState]] = []
        while self._sizes and len(kept) < _TRY:
            entry = heapq.heappop(self._sizes)
            if self._is_new(entry[2]) and all(turn is not entry[2] for _, _, turn in kept):
                kept.append(entry)
        for entry in kept:
            heapq.heappush(self._sizes, entry)
        return [turn for _, _, turn in kept]

    def _is_new(self, turn: TurnState) -> bool:
        return turn.id in self._new

    def until(self, turn: TurnState, limit_s: float) -> float:
        """The time at which this turn is refused: ``limit_s``, or earlier if it waited before."""
        if turn.until_s is None:
            turn.until_s = limit_s
            heapq.heappush(self._deadlines, (limit_s, self._next(), turn))
        return turn.until_s

    def recheck(self, turn: TurnState, at_s: float) -> None:
        """Try the turn again at that time, if it waits until then."""
        heapq.heappush(self._rechecks, (at_s, self._next(), turn))

    def next_alarm_s(self) -> float | None:
        """When the next waiting turn is to be tried again, or refused."""
        deadline_s = self._next_deadline_s()
        if not self._rechecks:
            return deadline_s
        recheck_s = self._rechecks[0][0]
        return recheck_s if deadline_s is None else min(deadline_s, recheck_s)

    def _next_deadline_s(self) -> float | None:
        while self._deadlines:
            until_s, _, turn = self._deadlines[0]
            # Placed in time, and waiting again perhaps: then it has a new deadline.
            if turn.phase is Phase.WAITING and turn.until_s == until_s:
                return until_s
            heapq.heappop(self._deadlines)
        return None

    def overdue(self, now_s: float) -> list[TurnState]:
        """Turns whose deadline has come: so many in one event."""
        due: list[TurnState] = []
        while len(due) < _DUE and (due_s := self._next_deadline_s()) is not None:
            if due_s > now_s:
                break
            turn = heapq.heappop(self._deadlines)[2]
            turn.until_s = None
            due.append(turn)
        return due

    def due_rechecks(self, now_s: float) -> list[TurnState]:
        """Waiting turns that asked to be tried again by now: so many in one event."""
        due: list[TurnState] = []
        while self._rechecks and self._rechecks[0][0] <= now_s and len(due) < _DUE:
            turn = heapq.heappop(self._rechecks)[2]
            if turn.id in self:
                due.append(turn)
        return due

    def _next(self) -> int:
        self._serial += 1
        return self._serial


def _growth_tokens(turn: TurnState) -> int:
    return turn.prompt_tokens - turn.conversation.resident


class Pace:
    """How often turns end, as observed: what a refused client is told to wait."""

    __slots__ = ("_interval_s", "_last_s")

    def __init__(self) -> None:
        self._interval_s = 1.0
        self._last_s: float | None = None

    def finished(self, now_s: float) -> None:
        """A turn ended."""
        if self._last_s is not None:
            self._interval_s += 0.1 * (now_s - self._last_s - self._interval_s)
        self._last_s = now_s

    def time_for_s(self, turns: int) -> float:
        """Time in which that many turns end; between a second and a minute."""
        return min(60.0, max(1.0, turns * self._interval_s))
