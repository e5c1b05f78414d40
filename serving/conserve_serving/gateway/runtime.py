"""Hosts the scheduler: facts in with the time, decisions out to those who carry them out.

The scheduler's clock counts the engines' own seconds: wall seconds times the cluster's speed (1
for real engines), so that every duration it compares has one unit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol, TextIO

import msgspec

from conserve_serving.core.decisions import (
    CloseTurn,
    Decision,
    Hold,
    Park,
    Place,
    Reject,
    Release,
    WakeAt,
)
from conserve_serving.core.events import Event, TimerFired
from conserve_serving.core.journal import to_record
from conserve_serving.core.scheduler import Scheduler
from conserve_serving.core.types import TurnId


class Inbox(Protocol):
    """A turn that waits for decisions."""

    def deliver(self, decision: Place | Hold | Reject | CloseTurn) -> None:
        """Take a decision in. Must return at once and must not call the scheduler."""


class Timer(Protocol):
    """A call that was asked for later."""

    def cancel(self) -> None: ...


class ModelClock:
    """The engines' seconds: runs ``speed`` times as fast as the wall clock, and never back.

    Args:
        wall: wall seconds, monotonic.
    """

    def __init__(self, wall: Callable[[], float]) -> None:
        self.wall = wall
        self.speed = 1.0
        self._since_wall_s = wall()
        self._base_s = 0.0

    def now_s(self) -> float:
        """The engines' seconds since the gateway started."""
        return self._base_s + (self.wall() - self._since_wall_s) * self.speed

    def set_speed(self, speed: float) -> None:
        """Go on from now at ``speed``."""
        self._base_s, self._since_wall_s = self.now_s(), self.wall()
        self.speed = speed


class Journal:
    """Appends every event and its decisions to a file, one JSON object a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._encode = msgspec.json.Encoder().encode

    def write(self, now_s: float, event: Event, decisions: list[Decision]) -> None:
        """Note one call of the scheduler."""
        self._file.write(self._encode(to_record(now_s, event, decisions)).decode() + "\n")

    def flush(self) -> None:
        """Write out what is buffered."""
        self._file.flush()

    def close(self) -> None:
        """Write out what is buffered, and close the file."""
        self._file.close()


class Runtime:
    """The scheduler and its surroundings: clock, timer, inboxes, journal.

    Args:
        scheduler: the only one who decides.
        clock: its time.
        call_later: ``(delay_wall_s, callback) -> Timer``.
        on_residency: carries out `Park` and `Release`.
        journal: where decisions are noted, if anywhere.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        clock: ModelClock,
        *,
        call_later: Callable[[float, Callable[[], None]], Timer],
        on_residency: Callable[[Park | Release], None],
        journal: Journal | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.clock = clock
        self._call_later = call_later
        self._on_residency = on_residency
        self._journal = journal
        self._inboxes: dict[TurnId, Inbox] = {}
        self._pending: deque[Event] = deque()
        self._busy = False
        self._timer: Timer | None = None

    @property
    def live_turns(self) -> int:
        """Turns that have arrived and have not been closed."""
        return len(self._inboxes)

    def register(self, turn: TurnId, inbox: Inbox) -> None:
        """Decisions about ``turn`` go to ``inbox`` until it is closed. Call before it arrives."""
        self._inboxes[turn] = inbox

    def is_live(self, turn: TurnId) -> bool:
        """Whether the turn has been registered and not been closed."""
        return turn in self._inboxes

    def handle(self, event: Event) -> None:
        """Tell the scheduler a fact and deliver what it decides.

        May be called while decisions are being delivered; the event then waits its turn.
        """
        self._pending.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._pending:
                self._handle(self._pending.popleft())
        finally:
            self._busy = False

    def _handle(self, event: Event) -> None:
        now_s = self.clock.now_s()
        decisions = self.scheduler.handle(event, now_s=now_s)
        if self._journal is not None:
            self._journal.write(now_s, event, decisions)
        for decision in decisions:
            match decision:
                case Place() | Hold() | Reject():
                    inbox = self._inboxes.get(decision.turn)
                    if inbox is not None:
                        inbox.deliver(decision)
                case CloseTurn():
                    inbox = self._inboxes.pop(decision.turn, None)
                    if inbox is not None:
                        inbox.deliver(decision)
                case WakeAt():
                    self._set_timer(decision.at_s, now_s)
                case Park() | Release():
                    self._on_residency(decision)

    def _set_timer(self, at_s: float, now_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # A moment later rather than earlier: firing early would only ask again.
        delay_s = max(0.0, at_s - now_s) / self.clock.speed + 0.001
        self._timer = self._call_later(delay_s, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self.handle(TimerFired())

    def flush(self) -> None:
        """Write out what the journal has buffered."""
        if self._journal is not None:
            self._journal.flush()

    def close(self) -> None:
        """Stop the timer and close the journal."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._journal is not None:
            self._journal.close()
