"""What is to come, in order of time: the simulator's clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Agenda:
    """Actions at virtual times; equal times in the order in which they were entered.

    Attributes:
        now_s: time of the newest action taken, and never less than before.
        heap: what is to come. For looking whether it is empty.
    """

    __slots__ = ("_serial", "heap", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self.heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._serial = 0

    def at(self, at_s: float, action: Callable[[Any], None], argument: Any) -> None:
        """Call ``action(argument)`` at that time, at once if it has passed."""
        self._serial += 1
        heapq.heappush(self.heap, (at_s, self._serial, action, argument))

    def forget(self, action: Callable[[Any], None], but: Any) -> None:
        """Take out what is to come of an action, except with the argument ``but``."""
        self.heap = [one for one in self.heap if one[2] != action or one[3] == but]
        heapq.heapify(self.heap)

    def next(self) -> None:
        """Let time pass until the next action, and take it; the agenda is not empty."""
        at_s, _, action, argument = heapq.heappop(self.heap)
        self.now_s = max(self.now_s, at_s)
        action(argument)
