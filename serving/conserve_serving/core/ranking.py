"""Engines in the order of a key, kept sorted as the keys change.

A sorted list with bisection: comparisons are O(log n), and moving a thousand pointers is cheaper
than any balanced tree in Python.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Generic, TypeVar

from conserve_serving.core.types import EngineId

T = TypeVar("T")


class Ranking(Generic[T]):
    """Items by ``(key, engine id)``, smallest first: a total order."""

    __slots__ = ("_entries", "_items", "_keys")

    def __init__(self) -> None:
        self._entries: list[tuple[float, EngineId]] = []
        self._keys: dict[EngineId, float] = {}
        self._items: dict[EngineId, T] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, engine: EngineId) -> bool:
        return engine in self._keys

    def __iter__(self) -> Iterator[T]:
        """Smallest first. The ranking must not change while it is walked."""
        items = self._items
        return (items[engine] for _, engine in self._entries)

    def put(self, engine: EngineId, item: T, key: float) -> None:
        """Add the item, or move it to its new place."""
        old = self._keys.get(engine)
        if old == key:
            return
        if old is not None:
            del self._entries[bisect_left(self._entries, (old, engine))]
        self._keys[engine] = key
        self._items[engine] = item
        insort(self._entries, (key, engine))

    def drop(self, engine: EngineId) -> None:
        """Remove the item if it is there."""
        key = self._keys.pop(engine, None)
        if key is not None:
            del self._entries[bisect_left(self._entries, (key, engine))]
            del self._items[engine]
