"""Acknowledgements of hand-offs: a prefiller's store says that a prompt's pages can be read.

An acknowledgement may come before the prefill call has returned, after the wait for it has ended,
more than once, or never. Each prefill is acknowledged anew, also where its pages were stored
already: what was stored earlier may have been removed since. Tensor-parallel ranks store their
parts of the pages side by side, and each says so for itself.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from conserve_serving.core.types import ConversationId

#: Prompts remembered whose acknowledgement nobody waits for any more.
_MOST_GIVEN_UP: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledgement:
    """``tokens`` of the prompt named by ``key`` can be read by decoders.

    Attributes:
        duration_s: how long storing took, in the engine's own seconds; None: it does not say.
        error: why the store kept less than the prompt (``store_full``, ``partial_pages``), None
            when it kept all.
        rank, ranks: which of the engine's ranks says this, and how many there are.
    """

    engine: str
    key: str
    tokens: int
    duration_s: float | None = None
    error: str | None = None
    rank: int = 0
    ranks: int = 1


class _Awaited:
    """One prompt: who waits, and which ranks have spoken."""

    def __init__(self) -> None:
        self.future: asyncio.Future[Acknowledgement] = asyncio.get_running_loop().create_future()
        self.users = 0
        self.spoken: dict[int, Acknowledgement] = {}

    def take(self, ack: Acknowledgement) -> None:
        self.spoken[ack.rank] = ack
        if self.future.done() or (ack.error is None and len(self.spoken) < ack.ranks):
            return
        said = self.spoken.values()
        durations = [one.duration_s for one in said if one.duration_s is not None]
        self.future.set_result(
            replace(
                ack,
                tokens=min(one.tokens for one in said),
                duration_s=max(durations, default=None),
            )
        )


class Handoffs:
    """Brings acknowledgements to the turns that wait for them.

    Args:
        on_late: told whose prompt an acknowledgement was for that came when its turn waited no
            longer: pages that are kept for that conversation all the same.
    """

    def __init__(self, on_late: Callable[[ConversationId], None] = lambda _: None) -> None:
        self._waiting: dict[str, _Awaited] = {}
        self._given_up: OrderedDict[str, ConversationId] = OrderedDict()
        self._on_late = on_late
        self.unexpected = 0

    def expect(self, key: str) -> asyncio.Future[Acknowledgement]:
        """A future for the acknowledgement of ``key``; each call needs one `release`.

        Call before the prefill is started: the acknowledgement may overtake its reply.
        """
        awaited = self._waiting.get(key)
        if awaited is None:
            awaited = self._waiting[key] = _Awaited()
        awaited.users += 1
        return awaited.future

    def release(self, key: str, conversation: ConversationId) -> None:
        """The turn, of ``conversation``, no longer waits."""
        awaited = self._waiting[key]
        if not awaited.future.done():
            self._given_up[key] = conversation
            if len(self._given_up) > _MOST_GIVEN_UP:
                self._given_up.popitem(last=False)
        awaited.users -= 1
        if not awaited.users:
            del self._waiting[key]

    def acknowledge(self, ack: Acknowledgement) -> bool:
        """Take an acknowledgement in; returns whether a turn was waiting for it."""
        awaited = self._waiting.get(ack.key)
        if awaited is None:
            self.unexpected += 1
            if ack.key in self._given_up:  # and stays there: other ranks may follow
                self._on_late(self._given_up[ack.key])
            return False
        awaited.take(ack)
        return True

    @property
    def waiting(self) -> int:
        """Prompts waited for."""
        return len(self._waiting)
