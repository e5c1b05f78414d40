"""Parts of the KV pool: the tree's nodes, the order of eviction, the sessions' references."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable

from conserve_serving.engines.content import Prompt


class Node:
    """A stretch of content below its parent's. Owned by the pool; others hold it as a handle.

    The root is its own parent; a node dropped from the tree has 0 tokens.
    """

    __slots__ = (
        "children",
        "content",
        "device_children",
        "last_used",
        "locks",
        "on_device",
        "parent",
        "ready_s",
        "session_refs",
        "sessions",
        "tokens",
    )

    def __init__(self, content: Prompt, tokens: int, parent: Node | None) -> None:
        self.content = content
        self.tokens = tokens
        self.parent = self if parent is None else parent
        self.children: dict[Hashable, Node] = {}
        self.device_children = 0
        self.on_device = True
        self.locks = 0
        self.session_refs = 0
        self.sessions: set[str] | None = None
        self.last_used = 0
        self.ready_s = 0.0

    def is_leaf(self) -> bool:
        """Whether it may leave its tier now: nothing below it there, and nobody using it."""
        if self.locks or not self.tokens:
            return False
        return not (self.device_children if self.on_device else self.children)


class EvictionOrder:
    """The leaves of one tier, in the order in which they are to leave it.

    Entries are never removed from the middle: one that no longer tells the truth is skipped, and
    whoever changes a leaf offers it again.
    """

    __slots__ = ("_heap", "_on_device", "_protect", "_pushes")

    def __init__(self, *, on_device: bool, protect_sessions: bool) -> None:
        self._heap: list[tuple[int, int, int, Node]] = []
        self._on_device = on_device
        self._protect = protect_sessions
        self._pushes = 0

    def offer(self, node: Node, tree_nodes: int) -> None:
        """Enter a leaf of this tier; ``tree_nodes`` bounds how many stale entries may wait."""
        self._pushes += 1
        refs = node.session_refs if self._protect else 0
        heapq.heappush(self._heap, (refs, node.last_used, self._pushes, node))
        if len(self._heap) > 64 + 4 * tree_nodes:
            fresh = {entry[3]: entry for entry in self._heap if self._is_current(entry)}
            self._heap = list(fresh.values())
            heapq.heapify(self._heap)

    def pop(self) -> Node | None:
        """Take the leaf that is to leave first; None when there is none."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            if self._is_current(entry):
                return entry[3]
        return None

    def _is_current(self, entry: tuple[int, int, int, Node]) -> bool:
        refs, last_used, _, node = entry
        return (
            node.on_device is self._on_device
            and last_used == node.last_used
            and refs == (node.session_refs if self._protect else 0)
            and node.is_leaf()
        )


class Sessions:
    """Which KV the open sessions refer to.

    A session marks the deepest nodes of its KV; ``Node.session_refs`` counts, for every node, the
    marks at or below it. Semantics of SGLang's ``unified_cache/session_ref_tracker.py``.
    """

    __slots__ = ("_changed", "_root", "leaves")

    def __init__(self, root: Node, changed: Callable[[Node], None]) -> None:
        """Args: the tree's root; ``changed`` is told of every node whose count has changed."""
        self.leaves: dict[str, dict[Node, None]] = {}  # in order: equal runs are equal
        self._root = root
        self._changed = changed

    def open(self, session: str) -> bool:
        """Open a session; False when it is open already."""
        if session in self.leaves:
            return False
        self.leaves[session] = {}
        return True

    def close(self, session: str) -> dict[Node, None] | None:
        """Forget a session; the deepest nodes of its KV, or None when it was not open."""
        leaves = self.leaves.pop(session, None)
        for leaf in leaves or ():
            self._unmark(session, leaf)
            self._count(leaf, -1)
        return leaves

    def reach(self, session: str, node: Node) -> None:
        """The session's KV now reaches ``node``; a mark above it moves down to it."""
        leaves = self.leaves.get(session)
        if leaves is None or node is self._root or node in leaves:
            return
        above = node.parent
        while above is not self._root and above not in leaves:
            above = above.parent
        self._count(node, 1, stop=above)
        if above in leaves:
            del leaves[above]
            self._unmark(session, above)
        self._mark(session, node)

    def dropped(self, node: Node) -> None:
        """``node`` is about to leave the tree: its marks fall back to its parent."""
        parent = node.parent
        for session in node.sessions or ():
            leaves = self.leaves[session]
            leaves.pop(node, None)
            if parent is self._root:
                continue
            if parent in leaves:  # counted for itself already: this branch's count goes
                self._count(parent, -1)
            else:
                self._mark(session, parent)
        node.sessions = None

    def _mark(self, session: str, node: Node) -> None:
        self.leaves[session][node] = None
        if node.sessions is None:
            node.sessions = set()
        node.sessions.add(session)

    @staticmethod
    def _unmark(session: str, node: Node) -> None:
        if node.sessions is not None:
            node.sessions.discard(session)

    def _count(self, node: Node, change: int, *, stop: Node | None = None) -> None:
        walk = node
        while walk is not self._root and walk is not stop:
            walk.session_refs += change
            self._changed(walk)
            walk = walk.parent
