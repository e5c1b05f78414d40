"""Open sessions, as SGLang's radix cache keeps them: by id, with a timeout of their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

#: Sessions are looked through at most this often: there may be very many.
_LOOK_EVERY_S: Final = 1.0


class SessionBook:
    """Which sessions are open, and which have been idle for too long.

    A request that names a session nobody opened opens it (SGLang: only the top-level
    ``session_id`` counts, and a generation is made for it); such a session has no timeout, and
    ``/open_session`` may still be called for it.

    Args:
        opened, closed: told of each session that begins and ends.
        clock: wall-clock seconds: the timeout comes from a client.
    """

    def __init__(
        self,
        *,
        opened: Callable[[str], object],
        closed: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._opened = opened
        self._closed = closed
        self._clock = clock
        self._timeout_s: dict[str, float | None] = {}  # None: no timeout
        self._explicit: set[str] = set()
        self._last_used_s: dict[str, float] = {}
        self._next_look_s = clock()

    def open(self, session_id: str, timeout_s: float | None) -> bool:
        """Open a session; False when it is open already."""
        self.reap()
        if session_id in self._explicit:
            return False
        if session_id not in self._timeout_s:
            self._opened(session_id)
        self._explicit.add(session_id)
        self._timeout_s[session_id] = timeout_s
        self._last_used_s[session_id] = self._clock()
        return True

    def use(self, session_id: str) -> None:
        """A request belongs to this session; opens it if need be."""
        self.reap()
        if session_id not in self._timeout_s:
            self._opened(session_id)
            self._timeout_s[session_id] = None
        self._last_used_s[session_id] = self._clock()

    def is_open(self, session_id: str) -> bool:
        """Whether ``/open_session`` was called for it and it has not ended."""
        self.reap()
        return session_id in self._explicit

    def close(self, session_id: str) -> bool:
        """End a session; False when there is none (which SGLang answers with 200 all the same)."""
        if session_id not in self._timeout_s:
            return False
        del self._timeout_s[session_id], self._last_used_s[session_id]
        self._explicit.discard(session_id)
        self._closed(session_id)
        return True

    def reap(self) -> None:
        """End the sessions that have been idle for longer than their timeout."""
        now = self._clock()
        if now < self._next_look_s:
            return
        self._next_look_s = now + _LOOK_EVERY_S
        late = [
            session_id
            for session_id, timeout_s in self._timeout_s.items()
            if timeout_s is not None and now - self._last_used_s[session_id] > timeout_s
        ]
        for session_id in late:
            self.close(session_id)
