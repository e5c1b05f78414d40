"""Acknowledgements of hand-offs: a prefiller's store says that a prompt's pages can be read.

An acknowledgement may come before the prefill call has returned, after the wait for it has ended,
more than once, or never. Keys seen lately are remembered, so that a prompt whose pages are already
stored (the store then writes nothing, and says nothing) counts as acknowledged.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

#: How long a stored prompt is believed to stay stored. Stores keep hand-offs for longer.
REMEMBER_S: Final = 30.0
_MAX_REMEMBERED: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledgement:
    """``tokens`` of the prompt named by ``key`` can be read by decoders.

    Attributes:
        duration_s: how long storing took, in the engine's own seconds; None: it does not say.
        error: why the store kept less than the prompt (``store_full``), None when it kept all.
    """

    engine: str
    key: str
    tokens: int
    duration_s: float | None = None
    error: str | None = None


class Handoffs:
    """Brings acknowledgements to the turns that wait for them.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: dict[str, asyncio.Future[Acknowledgement]] = {}
        self._users: dict[str, int] = {}
        self._recent: OrderedDict[str, tuple[float, Acknowledgement]] = OrderedDict()
        self.unexpected = 0

    def expect(self, key: str) -> asyncio.Future[Acknowledgement]:
        """A future for the acknowledgement of ``key``; each call needs one `release`.

        Call before the prefill is started: the acknowledgement may overtake its reply.
        """
        future = self._waiting.get(key)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            self._waiting[key] = future
            known = self._recent.get(key)
            if known is not None and self._clock() - known[0] <= REMEMBER_S:
                future.set_result(known[1])
        self._users[key] = self._users.get(key, 0) + 1
        return future

    def release(self, key: str) -> None:
        """The turn no longer waits."""
        left = self._users[key] - 1
        if left:
            self._users[key] = left
        else:
            del self._users[key], self._waiting[key]

    def acknowledge(self, ack: Acknowledgement) -> bool:
        """Take an acknowledgement in; returns whether a turn was waiting for it."""
        future = self._waiting.get(ack.key)
        if ack.error is None:
            self._recent[ack.key] = (self._clock(), ack)
            self._recent.move_to_end(ack.key)
            while len(self._recent) > _MAX_REMEMBERED:
                self._recent.popitem(last=False)
        if future is None:
            self.unexpected += 1
            return False
        if not future.done():
            future.set_result(ack)
        return True

    def forget_engine(self, engine: str) -> None:
        """The prefiller is gone: what its store held is no longer believed."""
        stale = [key for key, (_, ack) in self._recent.items() if ack.engine == engine]
        for key in stale:
            del self._recent[key]

    @property
    def waiting(self) -> int:
        """Prompts waited for."""
        return len(self._waiting)
