"""Responses and conversations that a later request may name instead of repeating them.

Bounded by time, number and bytes; what was used longest ago goes first. Histories are chains that
share their beginnings, so a conversation of n turns costs its own length, not n times it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec import Raw

Kind = Literal["response", "conversation"]
_Key = tuple[Kind, str, str]


class History:
    """The chat messages of one response, and the history they follow.

    Attributes:
        users: entries and later histories that hold on to it.
    """

    __slots__ = ("messages", "previous", "size", "users")

    def __init__(self, messages: Sequence[Raw], previous: History | None) -> None:
        self.messages = tuple(messages)
        self.previous = previous
        self.size = sum(len(message) for message in messages) + 64 * len(messages) + 128
        self.users = 0

    def whole(self) -> list[Raw]:
        """All messages, the first one first."""
        chain: list[History] = []
        history: History | None = self
        while history is not None:
            chain.append(history)
            history = history.previous
        return [message for history in reversed(chain) for message in history.messages]


@dataclass(slots=True, kw_only=True)
class Entry:
    """One response or conversation.

    Attributes:
        body: its JSON, as it is shown.
        conversation: the gateway's id of the conversation it belongs to.
        continued: a later response follows it already.
    """

    body: bytes
    history: History | None
    conversation: str
    continued: bool = False
    expires_s: float = 0.0


class ResponseStore:
    """Remembers entries by kind, tenant and id.

    Args:
        clock: wall seconds, monotonic.
        ttl_s: an entry is forgotten this long after it was last used.
        max_entries: kept at most.
        max_bytes: of bodies and histories together, at most.
    """

    def __init__(
        self, *, clock: Callable[[], float], ttl_s: float, max_entries: int, max_bytes: int
    ) -> None:
        self._clock = clock
        self._ttl_s = ttl_s
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[_Key, Entry] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, kind: Kind, tenant: str, id: str) -> Entry | None:
        """An entry, which counts as used now; None when it is unknown or forgotten."""
        self._shrink()
        entry = self._entries.get((kind, tenant, id))
        if entry is not None:
            self._touch((kind, tenant, id), entry)
        return entry

    def put(self, kind: Kind, tenant: str, id: str, entry: Entry) -> None:
        """Remember an entry, in place of one with the same name."""
        key = (kind, tenant, id)
        if entry.history is not None:  # before the old one lets go of what both share
            self._hold(entry.history)
        self._remove(key)
        self.bytes += len(entry.body)
        self._entries[key] = entry
        self._touch(key, entry)
        self._shrink()

    def delete(self, kind: Kind, tenant: str, id: str) -> bool:
        """Forget an entry; returns whether it was there."""
        self._shrink()
        return self._remove((kind, tenant, id))

    def _touch(self, key: _Key, entry: Entry) -> None:
        entry.expires_s = self._clock() + self._ttl_s
        self._entries.move_to_end(key)

    def _remove(self, key: _Key) -> bool:
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self.bytes -= len(entry.body)
        if entry.history is not None:
            self._release(entry.history)
        return True

    def _hold(self, history: History) -> None:
        """Count a history, and those before it that nobody held yet."""
        link: History | None = history
        while link is not None:
            link.users += 1
            if link.users > 1:
                return
            self.bytes += link.size
            link = link.previous

    def _release(self, history: History) -> None:
        link: History | None = history
        while link is not None:
            link.users -= 1
            if link.users:
                return
            self.bytes -= link.size
            link = link.previous

    def _shrink(self) -> None:
        now_s = self._clock()
        while self._entries:
            key, oldest = next(iter(self._entries.items()))
            full = len(self._entries) > self._max_entries or self.bytes > self._max_bytes
            if not full and oldest.expires_s > now_s:
                return
            self._remove(key)
