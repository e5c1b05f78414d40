"""KV that closed sessions have left in an engine, until it is told to let it go."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from conserve_serving.engines.kv import KvPool
from conserve_serving.engines.kv_nodes import Node

#: Closed sessions whose KV is still known as theirs (as our SGLang plug-in remembers them).
_MOST_CLOSED: Final = 8192


class ClosedSessions:
    """The deepest nodes of what they left: idle KV like any other, but known as theirs."""

    __slots__ = ("_leaves", "_leaving", "_pool")

    def __init__(self, pool: KvPool) -> None:
        """Args: where the KV is."""
        self._pool = pool
        self._leaves: OrderedDict[str, dict[Node, None]] = OrderedDict()
        self._leaving: list[Node] = []  # what is to leave and still in use

    def remember(self, session_id: str, leaves: dict[Node, None]) -> None:
        """A session that has left KV behind was closed; the longest closed is forgotten for it."""
        self._leaves[session_id] = leaves
        self._leaves.move_to_end(session_id)
        if len(self._leaves) > _MOST_CLOSED:
            self._leaves.popitem(last=False)

    def free(self, session_id: str) -> None:
        """Let a session's KV leave device and host, as soon as nobody uses it."""
        self._leaving += self._leaves.pop(session_id, ())
        self.let_leave()

    def let_leave(self) -> None:
        """Drop what is to leave and no longer in use: a request may have ended."""
        if self._leaving:
            self._leaving = [node for node in self._leaving if not self._pool.drop(node)]
