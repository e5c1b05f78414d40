"""The KV cache of one engine: a paged pool, a prefix tree over it, and the host tier behind it.

Counting. A device token is exactly one of

* *used*: in a tree node that a request has locked, or in pages a request holds privately (KV it
  has not given to the tree yet);
* *evictable*: in a tree node nobody has locked: an idle conversation's KV;
* *available*: free.

The three sum to the capacity, as in SGLang's metrics. Whole pages are counted.

Tiers. Every node's KV is mirrored in host memory while it is on the device (write-through), so
evicting it to the host is instant and only bringing it back takes time. ``host_capacity_tokens``
is what the host holds *beside* that mirror; SGLang's ``--hicache-ratio r`` gives ``(r − 1)`` times
the device's capacity. On every path the device part comes first, the host part follows, and a
node dropped from the host takes everything below with it.

Order of eviction (as SGLang's session radix cache, ``unified_cache/components/full.py``): leaves
no open session refers to, then those referred to by fewer sessions, each least recently used
first. Session KV is therefore evicted last but not pinned: when everything belongs to open
sessions, the longest idle one is parked, and nothing deadlocks. A large leaf gives up its tail
first, no more than about half of it beyond what is needed.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from conserve_serving.engines.content import Prompt, StreamPrompt
from conserve_serving.engines.errors import InvariantError
from conserve_serving.engines.kv_nodes import EvictionOrder, Node, Sessions

#: A leaf is not cut into pieces smaller than this (about SGLang's prefill chunks).
_EVICT_GRANULE_TOKENS: Final = 2048


class Match(NamedTuple):
    """The longest cached prefix of a prompt.

    ``node`` is its deepest node; ``device_tokens`` are on the device and ``host_tokens`` follow
    on the host; ``ready_s`` is when the last transfer under way on that path is over.
    """

    node: Node
    device_tokens: int
    host_tokens: int
    ready_s: float


class KvPool:
    """Device pages, prefix tree and host tier. Not thread-safe; no clock: time is an argument."""

    def __init__(
        self,
        *,
        capacity_tokens: int,
        host_capacity_tokens: int,
        page_tokens: int,
        session_protection: bool = True,
    ) -> None:
        """Args: capacities in tokens (rounded down to whole pages), page size in tokens."""
        self.page_tokens = page_tokens
        self.capacity_tokens = capacity_tokens - capacity_tokens % page_tokens
        self.host_capacity_tokens = host_capacity_tokens - host_capacity_tokens % page_tokens
        self.private_tokens = 0
        self.locked_tokens = 0
        self.evictable_tokens = 0
        self.host_used_tokens = 0
        self.parked_tokens_total = 0
        self.restored_tokens_total = 0
        self.evicted_tokens_total = 0  # left the device for want of room
        self.dropped_tokens_total = 0  # left both tiers, for whatever reason ...
        self.freed_tokens_total = 0  # ... and of them those that nobody wanted any more
        self._root = Node(StreamPrompt((), page_tokens), 0, None)
        self.sessions = Sessions(self._root, self._offer)
        self._clock = 0
        self._nodes = 0
        self._device_order = EvictionOrder(on_device=True, protect_sessions=session_protection)
        self._host_order = EvictionOrder(on_device=False, protect_sessions=session_protection)

    # --- counts ------------------------------------------------------------------------------
    @property
    def used_tokens(self) -> int:
        """Device tokens held by requests."""
        return self.private_tokens + self.locked_tokens

    @property
    def available_tokens(self) -> int:
        """Free device tokens."""
        return (
            self.capacity_tokens - self.private_tokens - self.locked_tokens - self.evictable_tokens
        )

    @property
    def room_tokens(self) -> int:
        """What could be allocated at most: free and evictable."""
        return self.capacity_tokens - self.private_tokens - self.locked_tokens

    @property
    def root(self) -> Node:
        """The node of the empty prefix."""
        return self._root

    # --- prefix tree -------------------------------------------------------------------------
    def match(self, prompt: Prompt, limit_tokens: int) -> Match:
        """The longest cached prefix of ``prompt`` in its first ``limit_tokens`` (a page multiple).

        A node that matches in part is split, so that the result ends at a node's end; pieces that
        nothing tells apart any more are joined, so that paths stay short.
        """
        node, at, device, ready_s = self._root, 0, 0, 0.0
        while at < limit_tokens:
            child = node.children.get(prompt.key_at(at))
            if child is None:
                break
            common = min(prompt.common_tokens(at, child.content), limit_tokens - at)
            whole = common >= child.tokens
            if not whole:
                child = self._split(child, common)
            elif self._are_one(node, child):
                start = at - node.tokens
                self._join(node, child, prompt.cut(start, at + child.tokens))
                at = start
            node = child
            at += node.tokens
            if node.on_device:
                device = at
                ready_s = max(ready_s, node.ready_s)
            if not whole:
                break
        return Match(node, device, at - device, ready_s)

    def cached_tokens(self, prompt: Prompt) -> int:
        """Leading tokens of ``prompt`` that are cached, in either tier. Changes nothing."""
        node, at = self._root, 0
        limit = prompt.tokens - prompt.tokens % self.page_tokens
        while at < limit:
            child = node.children.get(prompt.key_at(at))
            if child is None:
                break
            common = min(prompt.common_tokens(at, child.content), limit - at)
            at += common
            if common < child.tokens:
                break
            node = child
        return at

    def lock(self, node: Node) -> None:
        """Keep the path to ``node`` from being evicted or dropped until :meth:`unlock`."""
        self._clock += 1
        walk = node
        while walk is not self._root:
            if walk.locks == 0 and walk.on_device:
                self.evictable_tokens -= walk.tokens
                self.locked_tokens += walk.tokens
            walk.locks += 1
            walk.last_used = self._clock
            walk = walk.parent

    def unlock(self, node: Node) -> None:
        """Undo one :meth:`lock` of the same node."""
        self._clock += 1
        walk = node
        while walk is not self._root:
            walk.locks -= 1
            walk.last_used = self._clock
            if walk.locks == 0:
                if walk.on_device:
                    self.locked_tokens -= walk.tokens
                    self.evictable_tokens += walk.tokens
                self._offer(walk)
            walk = walk.parent

    def insert(
        self, node: Node, start_tokens: int, prompt: Prompt, end_tokens: int, session: str | None
    ) -> Node:
        """Give privately held KV of ``prompt`` from ``start_tokens`` to ``end_tokens`` to the tree.

        Args:
            node: deepest node of the caller's locked path, which ends at ``start_tokens``.
            start_tokens, end_tokens: page multiples; the caller holds the pages between them
                privately, and no longer does afterwards. Pages the tree had already are freed.
            session: the caller's session, for whom an idle leaf may simply grow.

        Returns:
            The deepest node of the path to ``end_tokens``, locked in the place of ``node``.
        """
        self.private_tokens -= end_tokens - start_tokens
        self._clock += 1
        at = start_tokens
        while at < end_tokens:
            child = node.children.get(prompt.key_at(at))
            if child is None:
                break
            common = min(prompt.common_tokens(at, child.content), end_tokens - at)
            if common < child.tokens:
                child = self._split(child, common)
            if not child.on_device:
                self._to_device(child)  # computed again: the private pages become the node's
            if child.locks == 0:
                self.evictable_tokens -= child.tokens
                self.locked_tokens += child.tokens
            child.locks += 1
            child.last_used = self._clock
            node = child
            at += child.tokens
        if at == end_tokens:
            return node
        added = end_tokens - at
        self.locked_tokens += added
        if self._may_grow(node, session):
            node.content = prompt.cut(at - node.tokens, end_tokens)
            node.tokens += added
            return node
        leaf = Node(prompt.cut(at, end_tokens), added, node)
        leaf.locks = 1
        leaf.last_used = self._clock
        node.children[prompt.key_at(at)] = leaf
        node.device_children += 1
        self._nodes += 1
        return leaf

    def _may_grow(self, node: Node, session: str | None) -> bool:
        """Whether a new tail may extend ``node`` itself: only its one user's leaf may."""
        if node is self._root or node.children or node.locks != 1:
            return False
        if not node.session_refs:
            return True
        return node.session_refs == 1 and node.sessions is not None and session in node.sessions

    def _split(self, node: Node, at_tokens: int) -> Node:
        """Cut ``node`` at ``at_tokens``; the upper part is a new node, the lower stays ``node``."""
        upper = Node(node.content.cut(0, at_tokens), at_tokens, node.parent)
        upper.on_device = node.on_device
        upper.locks = node.locks
        upper.session_refs = node.session_refs
        upper.last_used = node.last_used
        upper.ready_s = node.ready_s
        upper.device_children = int(node.on_device)
        node.parent.children[node.content.key_at(0)] = upper
        node.content = node.content.cut(at_tokens, node.tokens)
        node.tokens -= at_tokens
        node.parent = upper
        upper.children[node.content.key_at(0)] = node
        self._nodes += 1
        return upper

    def _are_one(self, upper: Node, lower: Node) -> bool:
        """Whether no branch, tier, lock or session's mark tells two neighbours apart.

        With one child and equal locks, nobody holds ``upper`` itself as a handle.
        """
        return (
            len(upper.children) == 1
            and upper.on_device is lower.on_device
            and upper.locks == lower.locks
            and not upper.sessions
            and upper is not self._root
        )

    def _join(self, upper: Node, lower: Node, content: Prompt) -> None:
        """Make ``lower`` the whole of both; ``upper`` leaves the tree."""
        lower.content = content
        lower.tokens += upper.tokens
        lower.parent = upper.parent
        lower.parent.children[content.key_at(0)] = lower
        lower.ready_s = max(lower.ready_s, upper.ready_s)
        lower.last_used = upper.last_used  # never the older of the two
        upper.tokens = 0
        self._nodes -= 1
        self._offer(lower)

    # --- device pages ------------------------------------------------------------------------
    def allocate(self, tokens: int) -> None:
        """Take ``tokens`` (page multiple) as private, evicting idle KV where needed.

        The caller has checked ``tokens <= room_tokens``.
        """
        if tokens > self.available_tokens:
            self._make_room(tokens)
        self.private_tokens += tokens

    def release(self, tokens: int) -> None:
        """Give private pages back."""
        self.private_tokens -= tokens

    def restore(self, node: Node, *, ready_s: float) -> int:
        """Bring the host part of the locked path to ``node`` back to the device.

        The caller has locked the path and checked the room; the KV may be read from ``ready_s``.

        Returns:
            Tokens brought back.
        """
        path = []
        walk = node
        while not walk.on_device:
            path.append(walk)
            walk = walk.parent
        tokens = sum(part.tokens for part in path)
        # It stops counting in the host tier first, so that what it displaces may take its place.
        for part in reversed(path):
            self._to_device(part)
            self.evictable_tokens -= part.tokens  # it is locked, so it counts as used
            self.locked_tokens += part.tokens
            part.ready_s = ready_s
        self._make_room(0)
        self.restored_tokens_total += tokens
        return tokens

    def _to_device(self, node: Node) -> None:
        """Count a host node as an unlocked device node."""
        node.on_device = True
        node.parent.device_children += 1
        self.host_used_tokens -= node.tokens
        self.evictable_tokens += node.tokens

    def _make_room(self, tokens: int) -> None:
        short = tokens - self.available_tokens
        while short > 0:
            short -= self._evict_one(short)

    def _evict_one(self, wanted_tokens: int) -> int:
        """Move one idle leaf, or the tail of one, off the device; returns the tokens freed."""
        node = self._device_order.pop()
        if node is None:  # the caller promised room; idle KV is always reachable from its leaves
            raise InvariantError("allocation beyond room_tokens")
        taken = max(wanted_tokens, node.tokens // 2, _EVICT_GRANULE_TOKENS)
        taken += -taken % self.page_tokens
        if taken < node.tokens:
            self._split(node, node.tokens - taken)
        parent = node.parent
        freed = node.tokens
        kept = self._make_host_room(freed)  # before the node itself can be taken for a candidate
        self.evictable_tokens -= freed
        self.evicted_tokens_total += freed
        node.on_device = False
        parent.device_children -= 1
        if kept:
            self.host_used_tokens += freed
            self.parked_tokens_total += freed
            self._offer(node)
        else:
            self._drop_below(node)
            self._unlink(node)
        self._offer(parent)
        return freed

    # --- host tier ---------------------------------------------------------------------------
    def _make_host_room(self, tokens: int) -> bool:
        if tokens > self.host_capacity_tokens:
            return False
        while self.host_used_tokens + tokens > self.host_capacity_tokens:
            node = self._host_order.pop()
            if node is None:
                return False
            parent = node.parent
            self.host_used_tokens -= node.tokens
            self._unlink(node)
            if not parent.on_device:
                self._offer(parent)
        return True

    def _drop_below(self, node: Node) -> None:
        """Drop everything below a node that is about to be dropped (all of it on the host)."""
        stack = list(node.children.values())
        while stack:
            child = stack.pop()
            if child.children:
                stack.append(child)
                stack.extend(child.children.values())
                continue
            self.host_used_tokens -= child.tokens
            self._unlink(child)

    def _unlink(self, node: Node) -> None:
        """Take a childless node out of the tree; sessions fall back to its parent."""
        self.sessions.dropped(node)
        del node.parent.children[node.content.key_at(0)]
        self.dropped_tokens_total += node.tokens
        self._nodes -= 1
        node.tokens = 0

    def drop(self, node: Node) -> bool:
        """Let a path's KV leave both tiers, from ``node`` up to where something else needs it.

        Returns:
            False when a request is using it: ask again when that has ended.
        """
        while node is not self._root:
            if not node.tokens:  # dropped meanwhile; what was above it may still be there
                node = node.parent
                continue
            if node.children or node.session_refs:
                return True
            if node.locks:
                return False
            parent = node.parent
            if node.on_device:
                self.evictable_tokens -= node.tokens
                parent.device_children -= 1
            else:
                self.host_used_tokens -= node.tokens
            self.freed_tokens_total += node.tokens
            self._unlink(node)
            self._offer(parent)
            node = parent
        return True

    def _offer(self, node: Node) -> None:
        """Enter the node in its tier's order of eviction, if it is a leaf there."""
        if node.is_leaf():
            order = self._device_order if node.on_device else self._host_order
            order.offer(node, self._nodes)
