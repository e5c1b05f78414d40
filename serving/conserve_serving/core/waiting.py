"""Turns that wait: in which order they are tried, and until when each of them may wait."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from itertools import islice
from typing import Final

from conserve_serving.core.state import EngineState, Phase, TurnState
from conserve_serving.core.types import TurnId

# Turns tried when room appears on one engine: bounds the cost of one event.
_TRY_TAIL: Final = 8
_TRY_NEW: Final = 16


class WaitingRoom:
    """Waiting turns: tail turns and new conversations apart, each in order of arrival."""

    __slots__ = ("_deadlines", "_new", "_rechecks", "_tail")

    def __init__(self) -> None:
        self._tail: OrderedDict[TurnId, TurnState] = OrderedDict()
        self._new: OrderedDict[TurnId, TurnState] = OrderedDict()
        self._deadlines: list[tuple[float, TurnId, TurnState]] = []
        self._rechecks: list[tuple[float, TurnId, TurnState]] = []

    def __len__(self) -> int:
        return len(self._tail) + len(self._new)

    @property
    def new_turns(self) -> int:
        """First turns that wait."""
        return len(self._new)

    def add(self, turn: TurnState, home: EngineState | None) -> None:
        """The turn waits for room: at its home, if it has one, or anywhere."""
        (self._tail if turn.conversation.turns else self._new)[turn.id] = turn
        if home is not None:
            turn.waits_at = home
            home.waiting[turn.id] = turn

    def remove(self, turn: TurnState) -> None:
        """The turn waits no more."""
        self._tail.pop(turn.id, None)
        self._new.pop(turn.id, None)
        if turn.waits_at is not None:
            turn.waits_at.waiting.pop(turn.id, None)
            turn.waits_at = None
        behind = turn.conversation.behind
        if behind is not None and turn in behind:
            behind.remove(turn)

    def candidates(self, engine: EngineState) -> list[TurnState]:
        """Turns worth a try now that the engine has room: its own first, tails before new ones."""
        turns = list(islice(engine.waiting.values(), _TRY_TAIL))
        turns += islice(self._tail.values(), _TRY_TAIL)
        turns += islice(self._new.values(), _TRY_NEW)
        return turns

    def until(self, turn: TurnState, limit_s: float) -> float:
        """The time at which this turn is refused: ``limit_s``, or earlier if it waited before."""
        if turn.until_s is None:
            turn.until_s = limit_s
            heapq.heappush(self._deadlines, (limit_s, turn.id, turn))
        return turn.until_s

    def recheck(self, turn: TurnState, at_s: float) -> None:
        """Try the turn again at that time, if it waits until then."""
        heapq.heappush(self._rechecks, (at_s, turn.id, turn))

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
            if turn.phase is Phase.WAITING:
                return until_s
            heapq.heappop(self._deadlines)
            turn.until_s = None  # placed in time: if it waits again, it has a new deadline
        return None

    def overdue(self, now_s: float) -> TurnState | None:
        """A turn whose deadline has come, one at a time."""
        due_s = self._next_deadline_s()
        if due_s is None or due_s > now_s:
            return None
        return heapq.heappop(self._deadlines)[2]

    def due_rechecks(self, now_s: float) -> list[TurnState]:
        """Waiting turns that asked to be tried again by now."""
        due: list[TurnState] = []
        while self._rechecks and self._rechecks[0][0] <= now_s:
            turn = heapq.heappop(self._rechecks)[2]
            if turn.phase is Phase.WAITING:
                due.append(turn)
        return due


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
