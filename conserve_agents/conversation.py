"""Conversations: which one a model call belongs to, and the tag that says so.

    with conversation() as talk:            # or: async with conversation() as talk:
        client.chat.completions.create(…)   # tagged: conversation, turn, first-turn length

A conversation is *current* in the context (thread or task) that entered it and in every task
started there. Plain threads do not inherit it, other processes cannot: see ``propagation``.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self

from conserve_agents.context import current_conversation, set_current
from conserve_agents.counting import TokenCounter
from conserve_agents.errors import ConversationStateError
from conserve_agents.gateway import Gateway, end_quietly
from conserve_agents.handover import decode
from conserve_agents.tags import Tags, new_uuid, tags_of
from conserve_agents.turns import Prompt

#: Children a conversation remembers in order to end them with itself; the oldest is forgotten
#: first, and ends at the gateway by being idle.
MAX_CHILDREN: Final = 1024


class Conversation(Tags):
    """One conversation. Safe to share between threads and tasks; pickled, it is handed over.

    Args:
        id: names it, at the gateway too; an illegal one (too long, not visible ASCII) is replaced
            by its hash. None: a new one is made.
        parent_id: the conversation that started this one.
        counter: counts the first turn; None: the client's counter, else bytes / 4.
        gateway: where to end it; None: where its first call went.
        end_on_exit: whether leaving the ``with`` block ends it. Pass False for a conversation
            that goes on later, under the same id.
        turns: how many it has had elsewhere; None: none if the id is a new one, else what the
            history of the first call shows. Pass 0 for a new conversation with an id of your own
            whose first prompt holds examples of answers.
        new_id: makes ids for conversations and turns.

    Attributes:
        opened_in: the context it was entered in, while it is; tells integrations where in a
            graph that was.

    Raises:
        ArgumentError: ``turns`` is negative or not a number.
        ConversationIdError: an id is empty or not a string.
        GatewayUrlError: ``gateway`` is not an http or https URL.
    """

    def __init__(
        self,
        id: str | None = None,
        *,
        parent_id: str | None = None,
        counter: TokenCounter | None = None,
        gateway: Gateway | str | None = None,
        end_on_exit: bool = True,
        turns: int | None = None,
        new_id: Callable[[], str] = new_uuid,
    ) -> None:
        super().__init__(id, parent_id=parent_id, counter=counter, turns=turns, new_id=new_id)
        self.opened_in: contextvars.Context | None = None
        self._gateway = Gateway(gateway) if isinstance(gateway, str) else gateway
        self._end_on_exit: Final = end_on_exit
        self._entered_in: int | None = None  # the process that did
        self._outer: Conversation | None = None
        self._children: OrderedDict[str, Conversation] = OrderedDict()

    def __reduce__(self) -> tuple[Callable[[str], Conversation], tuple[str]]:
        return resume, (self.handover(),)

    def __repr__(self) -> str:
        state = "ended" if self._ended else f"{self.turns} turns"
        return f"<Conversation {self.id!r}, {state}>"

    @property
    def ended(self) -> bool:
        """Whether :meth:`end` was called; calls made in it from then on are not tagged."""
        return self._ended

    def use_gateway(self, make: Callable[[], Gateway]) -> None:
        """Say where this conversation's calls go, unless that is known already."""
        if self._gateway is None:
            self._gateway = make()

    def fork(self, id: str | None = None) -> Conversation:
        """A new conversation that goes on from this one's history; enter it like any other.

        Its first turn is the whole prompt it begins with, of which engines share what they can.
        It names this one as its parent, and is ended with it at the latest.
        """
        return self.child(self._new_id() if id is None else id, turns=0)

    def child(
        self, id: str, *, parent_id: str | None = None, turns: int | None = None
    ) -> Conversation:
        """The sub-conversation of this id, made on first use; it is ended together with this one.

        Args:
            parent_id: who started it, when that was another child; None: this conversation.
            turns: see :class:`Conversation`.
        """
        with self._lock:
            found = self._children.get(id)
            if found is None:
                found = Conversation(
                    id,
                    parent_id=parent_id or self.id,
                    counter=self.counter,
                    gateway=self._gateway,
                    turns=turns,
                    new_id=self._new_id,
                )
                found._ended = self._ended
                self._children[id] = found
                if len(self._children) > MAX_CHILDREN:
                    self._children.popitem(last=False)
            return found

    def end(self) -> bool:
        """End it and its children at the gateway, so that their KV is freed.

        Idempotent; never raises; waits for the gateway, for as long as its timeout.

        Returns:
            Whether there was something to end and the gateway confirmed. A failure is logged; the
            gateway then ends the conversation by itself once it has been idle for long enough.
        """
        return end_all([self]) > 0

    def _close(self) -> list[tuple[Gateway, str]]:
        """Tag nothing from now on; what is to be ended, and where, children first."""
        with self._lock:
            first_time, self._ended = not self._ended, True
            children = list(self._children.values())
        if not first_time:
            return []
        open_ones = [one for child in children for one in child._close()]
        if self.turns and self._gateway is not None:
            open_ones.append((self._gateway, self.id))
        return open_ones

    async def aend(self) -> bool:
        """:meth:`end` without blocking the event loop."""
        return await asyncio.to_thread(self.end)

    @contextlib.contextmanager
    def activate(self) -> Iterator[Self]:
        """Make it current for a while, in any thread or task, without ending it afterwards."""
        outer = set_current(self)
        try:
            yield self
        finally:
            set_current(outer)

    def __enter__(self) -> Self:
        with self._lock:
            if self._entered_in is not None or self._ended:
                raise ConversationStateError(
                    f"conversation {self.id!r} was already entered or ended: make another, "
                    "or use activate() to go on in it"
                )
            self._entered_in = os.getpid()
        self.opened_in = contextvars.copy_context()
        self._outer = set_current(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._leave():
            self.end()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._leave():
            await self.aend()

    def _leave(self) -> bool:
        """Whether it is to be ended: not by a forked copy of the process that entered it."""
        set_current(self._outer)
        self._outer = self.opened_in = None
        return self._end_on_exit and self._entered_in == os.getpid()


def conversation(
    id: str | None = None,
    *,
    parent: Conversation | str | None = None,
    counter: TokenCounter | None = None,
    gateway: Gateway | str | None = None,
    end_on_exit: bool = True,
    turns: int | None = None,
) -> Conversation:
    """A conversation to enter, with ``with`` or ``async with``.

    Args:
        parent: the conversation that starts this one; None: the current one, if there is one.
        id, counter, gateway, end_on_exit, turns: see :class:`Conversation`, which also says what
            is raised.
    """
    starter = parent if parent is not None else current_conversation()
    parent_id = starter.id if isinstance(starter, Conversation) else starter
    return Conversation(
        id,
        parent_id=parent_id,
        counter=counter,
        gateway=gateway,
        end_on_exit=end_on_exit,
        turns=turns,
    )


def resume(
    token: str,
    *,
    counter: TokenCounter | None = None,
    gateway: Gateway | str | None = None,
    end_on_exit: bool = False,
) -> Conversation:
    """The conversation that another process handed over with :meth:`Conversation.handover`.

    It goes on where it was: same id, next turn index, same first-turn length, same decoder. Who
    began it usually ends it, so leaving it here does not, unless ``end_on_exit``.

    Raises:
        HandoverError: ``token`` is not one.
        GatewayUrlError: ``gateway`` is not an http or https URL.
    """
    given = decode(token)
    made = Conversation(
        given.id,
        parent_id=given.parent_id,
        counter=counter,
        gateway=gateway,
        end_on_exit=end_on_exit,
        turns=given.turns,
    )
    made.take_over(given)
    return made


def end_all(conversations: Iterable[Conversation]) -> int:
    """:meth:`Conversation.end` for several; returns how many of them, and of their children, the
    gateway confirmed."""
    return end_quietly(one for conversation in conversations for one in conversation._close())


def headers_for(
    messages: Prompt | None = None, tools: Sequence[Any] | None = None, *, final: bool = False
) -> dict[str, str]:
    """:meth:`Conversation.headers_for` of the current conversation; empty outside of any.

    For HTTP clients without an integration: merge the result into the request's headers, and give
    the response's headers to :meth:`Conversation.observe`.
    """
    current = current_conversation()
    return {} if current is None else current.headers_for(messages, tools, final=final)


def conversation_of(turn_id: str) -> Conversation | None:
    """The conversation that a turn was tagged in, while it waits for an answer and is held."""
    found = tags_of(turn_id)
    return found if isinstance(found, Conversation) else None
