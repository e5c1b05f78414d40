"""Open conversations in the order of their last activity; open turns, and those lately closed."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final

from conserve_serving.core.state import ConversationState, TurnState
from conserve_serving.core.types import ConversationId, TurnId

# Closed turns remembered, so that a late or duplicated event cannot bring one back to life.
_REMEMBER_CLOSED: Final = 65_536


class Conversations:
    """Open conversations; the one to expire next is the first.

    Args:
        idle_timeout_s: a conversation expires when nothing has happened to it for this long.
    """

    __slots__ = ("_idle_timeout_s", "open")

    def __init__(self, idle_timeout_s: float) -> None:
        self._idle_timeout_s = idle_timeout_s
        self.open: OrderedDict[ConversationId, ConversationState] = OrderedDict()

    def touch(self, conversation: ConversationState, now_s: float) -> None:
        """Something happened to it."""
        conversation.last_active_s = now_s
        if conversation.id in self.open:
            self.open.move_to_end(conversation.id)

    def expires_s(self) -> float | None:
        """When the next one expires."""
        if not self.open:
            return None
        return next(iter(self.open.values())).last_active_s + self._idle_timeout_s

    def expired(self, now_s: float) -> ConversationState | None:
        """The one that expires next, if that is by now."""
        # The very sum the alarm was set by: a difference may be rounded to the other side.
        due_s = self.expires_s()
        if due_s is None or due_s > now_s:
            return None
        return next(iter(self.open.values()))


class Turns:
    """Open turns by id. An id is spent for good, as far as it is remembered."""

    __slots__ = ("_closed", "_order", "open")

    def __init__(self) -> None:
        self.open: dict[TurnId, TurnState] = {}
        self._closed: set[TurnId] = set()
        self._order: deque[TurnId] = deque()

    def is_spent(self, turn: TurnId) -> bool:
        """Whether a turn of this id is open, or was."""
        return turn in self.open or turn in self._closed

    def close(self, turn: TurnId) -> None:
        """The turn is over; its id is remembered."""
        del self.open[turn]
        if len(self._order) >= _REMEMBER_CLOSED:
            self._closed.discard(self._order.popleft())
        self._closed.add(turn)
        self._order.append(turn)
