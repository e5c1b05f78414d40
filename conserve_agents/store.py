"""Conversations by an application's own keys, in bounded memory: for servers with many users."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from conserve_agents import wire
from conserve_agents.conversation import Conversation, end_all
from conserve_agents.errors import ArgumentError


class ConversationStore:
    """The conversations of many users, bounded in number and in time. Thread-safe.

        store = ConversationStore()
        with store.get(chat_id).activate():     # the same conversation whenever this chat calls
            client.chat.completions.create(…)

    A conversation that is forgotten is not lost: its id follows from its key, so that the next
    ``get`` resumes it, its turn index from its history.

    Args:
        max_conversations: remembered at most; the one used least recently is forgotten.
        max_idle_s: one that has not been asked for in this many seconds is forgotten.
        make: makes the conversation of a key; None: ``Conversation(key)``.
        on_forget: told of those that were forgotten, never of those that were ended; runs in the
            thread that asked, so it should not do I/O there. None: they end at the gateway by
            being idle.
        clock: monotonic seconds.

    Raises:
        ArgumentError: a bound is not positive.
    """

    def __init__(
        self,
        *,
        max_conversations: int = 10_000,
        max_idle_s: float = 3600.0,
        make: Callable[[str], Conversation] | None = None,
        on_forget: Callable[[list[Conversation]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, bound in (("max_conversations", max_conversations), ("max_idle_s", max_idle_s)):
            if not bound > 0:
                raise ArgumentError(f"{name} is {bound!r}: pass a positive number")
        self._max: Final = max_conversations
        self._max_idle_s: Final = max_idle_s
        self._make: Final = make or _named
        self._on_forget: Final = on_forget
        self._clock: Final = clock
        self._lock: Final = threading.Lock()
        # The least recently used first, each with the time of its last use.
        self._known: OrderedDict[str, tuple[Conversation, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> Conversation:
        """The conversation of ``key``, made where it is not known or has been ended.

        Raises:
            ConversationIdError: ``key`` is empty.
        """
        now_s = self._clock()
        with self._lock:
            gone = self._expired(now_s)
            found = self._known.pop(key, None)
            talk = found[0] if found is not None and not found[0].ended else self._make(key)
            self._known[key] = talk, now_s
            while len(self._known) > self._max:
                gone.append(self._known.popitem(last=False)[1][0])
        self._tell(gone)
        return talk

    def forget_idle(self) -> int:
        """Forget those idle for too long now, not when the next is asked for; how many."""
        with self._lock:
            gone = self._expired(self._clock())
        self._tell(gone)
        return len(gone)

    def end(self, *keys: str) -> int:
        """End these conversations at the gateway (all of them, without arguments).

        Never raises; waits for the gateway.

        Returns:
            How many the gateway confirmed, their children included.
        """
        with self._lock:
            chosen = [key for key in (keys or list(self._known)) if key in self._known]
            ending = [self._known.pop(key)[0] for key in chosen]
        return end_all(ending)

    def _expired(self, now_s: float) -> list[Conversation]:
        gone: list[Conversation] = []
        while self._known:
            key, (talk, used_s) = next(iter(self._known.items()))
            if now_s - used_s <= self._max_idle_s:
                break
            del self._known[key]
            gone.append(talk)
        return gone

    def _tell(self, gone: list[Conversation]) -> None:
        if gone and self._on_forget is not None:
            self._on_forget(gone)


def _named(key: str) -> Conversation:
    return Conversation(wire.safe_id(key) if key else key, end_on_exit=False)
