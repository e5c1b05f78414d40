"""Boards and the engines on them: one board's joules, split over its engines. Pure.

Most groups are one engine and its boards (several with tensor parallelism). Engines that share a
board are one group and are settled together, when each of them has reported; the joules of a
shared board are split: the idle part equally, the active part by busy time. A board that others
may use as well (MIG devices that are not ours) is never attributed to turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from conserve_serving.energy.ledger import Account
from conserve_serving.energy.work import Steps

#: A reading that covers this much more time than its interval spans a time nobody watched.
_GAP_S = 2.0
#: An interval longer than this is closed as it is: an engine is silent, or the sampler stuck.
_OVERDUE_S = 10.0
#: Time over which the idle power follows what is seen, once it has been seen.
_IDLE_MEMORY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One board's meter.

    Attributes:
        joules: cumulative; never goes down.
        at_s: when it was read, on the meter's own clock; times of one meter are compared only
            with each other.
        source: where the figure comes from, in words.
        by_the_clock: see `Account.settle`.
        shared: others may use the board: its active joules cannot be attributed.
    """

    joules: float
    at_s: float
    source: str
    by_the_clock: bool = True
    shared: bool = False


class IdlePower:
    """Watts of a board with nothing running: a prior, until quiet intervals have shown them."""

    __slots__ = ("measured", "watts")

    def __init__(self, prior_w: float | None) -> None:
        self.watts = prior_w
        self.measured = False

    def learn(self, joules: float, duration_s: float) -> None:
        """A quiet interval used this much."""
        seen_w = joules / duration_s
        if self.watts is None or not self.measured:
            self.watts = seen_w
        else:
            weight = -math.expm1(-duration_s / _IDLE_MEMORY_S)
            self.watts += (seen_w - self.watts) * weight
        self.measured = True


@dataclass(slots=True)
class _Member:
    account: Account
    boards: frozenset[str]
    at_s: float
    steps: Steps = field(default_factory=Steps)
    reported: bool = False
    up: bool = True
    source: str = ""


@dataclass(slots=True)
class _Board:
    idle: IdlePower
    last: Reading | None = None
    #: Idle joules due from a time whose readings brought less: they come with a later step.
    due_j: float = 0.0


@dataclass(slots=True)
class _Used:
    idle_j: float = 0.0
    active_j: float = 0.0
    lost_j: float = 0.0
    sources: set[str] = field(default_factory=set)
    by_the_clock: bool = True


class BoardGroup:
    """Engines that share boards, directly or through each other."""

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}
        self._boards: dict[str, _Board] = {}
        self._closed_s: float | None = None
        self._quiet_before = False

    # --- who is there ------------------------------------------------------------------------
    @property
    def boards(self) -> frozenset[str]:
        """Boards of its engines."""
        return frozenset(self._boards)

    @property
    def engines(self) -> frozenset[str]:
        """Ids of its engines."""
        return frozenset(self._members)

    def source(self, engine: str) -> str | None:
        """Where an engine's latest joules came from; None before the first."""
        return self._members[engine].source or None

    def add(
        self, engine: str, account: Account, boards: Mapping[str, float | None], *, at_s: float
    ) -> None:
        """An engine runs on these boards from now on.

        Args:
            engine: its id.
            account: where its joules are booked.
            boards: idle watts believed of each until they have been seen; None: unknown.
            at_s: now.
        """
        self._members[engine] = _Member(account, frozenset(boards), at_s)
        for board, prior_w in boards.items():
            self._boards.setdefault(board, _Board(IdlePower(prior_w)))
        if self._closed_s is None:
            self._closed_s = at_s

    def remove(self, engine: str) -> None:
        """An engine is no longer on these boards."""
        member = self._members.pop(engine, None)
        if member is not None:
            for board in member.boards:
                if not self._on(board):
                    del self._boards[board]

    def absorb(self, other: BoardGroup) -> None:
        """An engine runs on boards of both groups: they are one."""
        self._members |= other._members
        self._boards |= other._boards

    def idle_w(self, engine: str) -> tuple[float | None, bool]:
        """Idle watts of an engine's boards together, and whether all were measured."""
        idles = [self._boards[board].idle for board in self._members[engine].boards]
        known = [idle.watts for idle in idles if idle.watts is not None]
        total = math.fsum(known) if len(known) == len(idles) else None
        return total, all(idle.measured for idle in idles)

    # --- what happens ------------------------------------------------------------------------
    def down(self, engine: str, at_s: float) -> None:
        """An engine is gone; its boards may draw power all the same."""
        member = self._members[engine]
        member.up = False
        member.steps, member.reported = Steps(), False
        member.account.abandon(at_s)

    def up(self, engine: str, readings: Mapping[str, Reading], at_s: float) -> None:
        """It is back: what was used meanwhile is settled without it."""
        member = self._members[engine]
        if not member.up:
            self._close(readings, at_s)
            member.up = True

    def away(self, readings: Mapping[str, Reading], at_s: float) -> None:
        """An engine is still gone: where all of them are, nobody else closes intervals."""
        if not any(member.up for member in self._members.values()):
            self._close(readings, at_s)

    def rebase(self, board: str, reading: Reading) -> None:
        """A meter begins anew: what it says now is its zero."""
        self._boards[board].last = reading

    def report(
        self, engine: str, at_s: float, steps: Steps, readings: Mapping[str, Reading]
    ) -> bool:
        """An engine's counters, as asked for at ``at_s``.

        The interval is closed once every engine of the group has reported and every board that
        answers has been read anew, or when it has become too long for that.

        Returns:
            Whether it was closed.
        """
        member = self._members[engine]
        member.steps += steps
        member.at_s = at_s
        member.reported = True
        complete = all(m.reported for m in self._members.values() if m.up)
        overdue = self._closed_s is not None and at_s - self._closed_s > _OVERDUE_S
        if overdue or (complete and self._moved(readings)):
            self._close(readings, at_s)
            return True
        return False

    def _moved(self, readings: Mapping[str, Reading]) -> bool:
        """Whether there is something new of a board, and nothing old of one that is alive."""
        fresh = [
            reading.at_s > board.last.at_s
            for name, board in self._boards.items()
            if (reading := readings.get(name)) is not None and board.last is not None
        ]
        return all(fresh) if fresh else bool(readings)

    # --- closing -----------------------------------------------------------------------------
    def _close(self, readings: Mapping[str, Reading], at_s: float) -> None:
        span_s = at_s - (self._closed_s if self._closed_s is not None else at_s)
        members = self._members
        quiet = all(m.account.quiet and not m.steps.busy_s for m in members.values())
        used = {engine: _Used() for engine in members}
        for name, board in self._boards.items():
            reading, last = readings.get(name), board.last
            if reading is None:
                continue
            board.last = reading
            if last is not None and reading.at_s > last.at_s:
                self._split(name, board, last, reading, span_s, quiet=quiet, used=used)
        for engine, member in members.items():
            share = used[engine]
            if share.sources:
                member.source = "; ".join(sorted(share.sources))
            member.account.settle(
                member.at_s if member.reported else at_s,
                idle_j=share.idle_j,
                active_j=share.active_j,
                lost_j=share.lost_j,
                steps=member.steps,
                source=member.source,
                by_the_clock=share.by_the_clock,
            )
            member.steps, member.reported = Steps(), False
        self._closed_s, self._quiet_before = at_s, quiet

    def _split(
        self,
        name: str,
        board: _Board,
        last: Reading,
        reading: Reading,
        span_s: float,
        *,
        quiet: bool,
        used: dict[str, _Used],
    ) -> None:
        joules = max(0.0, reading.joules - last.joules)
        duration_s = reading.at_s - last.at_s
        engines = self._on(name)
        all_up = all(self._members[engine].up for engine in engines)
        idle_j, active_j = self._idle_part(board, reading, joules, duration_s)
        lost_j = 0.0
        if quiet and all_up and not reading.shared:
            # Just after work a board draws more than when it is idle; a model says what it is.
            if self._quiet_before and reading.by_the_clock:
                board.idle.learn(joules, duration_s)
            idle_j, active_j = joules, 0.0
        elif quiet or reading.shared:
            lost_j, active_j = active_j, 0.0
        elif duration_s > span_s + _GAP_S:
            lost_j = active_j * (1.0 - span_s / duration_s)
            active_j -= lost_j
        weights = self._active_weights(engines)
        if not weights and active_j:
            lost_j, active_j = lost_j + active_j, 0.0
        note = f", split by busy time: {len(engines)} engines on one board"
        for engine in engines:
            share = used[engine]
            share.idle_j += idle_j / len(engines)
            share.lost_j += lost_j / len(engines)
            share.active_j += active_j * weights.get(engine, 0.0)
            share.sources.add(reading.source + (note if len(engines) > 1 else ""))
            share.by_the_clock = reading.by_the_clock

    @staticmethod
    def _idle_part(
        board: _Board, reading: Reading, joules: float, duration_s: float
    ) -> tuple[float, float]:
        if board.idle.watts is None:
            return 0.0, joules
        due_j = board.due_j + board.idle.watts * duration_s
        idle_j = min(joules, due_j)
        if not reading.by_the_clock:  # what a step under way draws comes when it has ended
            board.due_j = due_j - idle_j
        return idle_j, joules - idle_j

    def _active_weights(self, engines: list[str]) -> dict[str, float]:
        """Shares of a board's active joules: by busy time, or whoever has requests there."""
        weights = {e: self._members[e].steps.busy_s for e in engines}
        total = math.fsum(weights.values())
        if not total:
            weights = {e: float(not self._members[e].account.quiet) for e in engines}
            total = math.fsum(weights.values())
        return {e: w / total for e, w in weights.items()} if total else {}

    def _on(self, board: str) -> list[str]:
        return [engine for engine, member in self._members.items() if board in member.boards]
