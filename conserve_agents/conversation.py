"""Conversations: which one a model call belongs to, and the tag that says so.

    with conversation() as talk:            # or: async with conversation() as talk:
        client.chat.completions.create(…)   # tagged: conversation, turn, first-turn length

A conversation is *current* in the context (thread or task) that entered it and in every task
started there. Plain threads do not inherit it, other processes cannot: see ``propagation``.

Calls are numbered by :class:`~conserve_agents.turns.TurnNumbers`, whose rules are its docstring.
The first turn's length is counted once, when the first turn is tagged, and frozen; if that turn
fails before anything was answered, the next one is the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import threading
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from conserve_agents import telemetry, wire
from conserve_agents.context import current_conversation, set_current
from conserve_agents.counting import FirstTurn, TokenCounter
from conserve_agents.errors import ArgumentError, ConversationIdError, ConversationStateError
from conserve_agents.gateway import Gateway, end_quietly
from conserve_agents.handover import Handover, decode
from conserve_agents.logs import warn_once
from conserve_agents.turns import (
    Prompt,
    TurnNumbers,
    TurnReport,
    fingerprint,
    opening,
    read_report,
)

#: Children a conversation remembers in order to end them with itself; the oldest is forgotten
#: first, and ends at the gateway by being idle.
MAX_CHILDREN: Final = 1024

#: Conversations by the ids of their turns: how an answer finds the one its request belongs to.
#: Not by their own ids: two of one process may share one (two gateways, two keys).
_by_turn: Final[weakref.WeakValueDictionary[str, Conversation]] = weakref.WeakValueDictionary()
#: Every one there is, to give a forked process locks of its own.
_all: Final[weakref.WeakSet[Conversation]] = weakref.WeakSet()


def _uuid() -> str:
    return uuid.uuid4().hex


class Conversation:
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
        new_id: Callable[[], str] = _uuid,
    ) -> None:
        self.id: Final = _checked(new_id() if id is None else id, "id")
        parent = None if parent_id is None else _checked(parent_id, "parent")
        self.parent_id: Final = None if parent == self.id else parent
        self.counter: Final = counter
        self.opened_in: contextvars.Context | None = None
        self._gateway = Gateway(gateway) if isinstance(gateway, str) else gateway
        self._end_on_exit: Final = end_on_exit
        self._new_id: Final = new_id
        if turns is not None and (not isinstance(turns, int) or turns < 0):
            raise ArgumentError(
                f"conversation turns {turns!r}: pass how many it has had, 0 or more"
            )
        # A given id may name a conversation that began elsewhere; a new one cannot.
        self._is_new: Final = turns == 0 or (turns is None and id is None)
        self._numbers = TurnNumbers(0 if self._is_new else turns)
        self._first_turn = FirstTurn()
        self._report: TurnReport | None = None
        self._placement: str | None = None
        self._final_next = False
        self._final_turn: str | None = None
        self._ended = False
        self._entered_in: int | None = None  # the process that did
        self._outer: Conversation | None = None
        self._children: OrderedDict[str, Conversation] = OrderedDict()
        self._lock = threading.Lock()
        _all.add(self)

    def __reduce__(self) -> tuple[Callable[[str], Conversation], tuple[str]]:
        return resume, (self.handover(),)

    def __repr__(self) -> str:
        state = "ended" if self._ended else f"{self.turns} turns"
        return f"<Conversation {self.id!r}, {state}>"

    @property
    def turns(self) -> int:
        """Turns so far: those tagged here, and those known to have been had elsewhere."""
        return self._numbers.turns

    @property
    def first_turn_tokens(self) -> int | None:
        """Length of the first turn's prompt in tokens, frozen when that turn was tagged."""
        return self._first_turn.value[0] if self._first_turn.value else None

    @property
    def last_report(self) -> TurnReport | None:
        """What the gateway said of the latest turn that was answered."""
        return self._report

    @property
    def ended(self) -> bool:
        """Whether :meth:`end` was called; calls made in it from then on are not tagged."""
        return self._ended

    def headers_for(
        self,
        messages: Prompt | None = None,
        tools: Sequence[Any] | None = None,
        *,
        final: bool = False,
        counter: TokenCounter | None = None,
    ) -> dict[str, str]:
        """Begin a turn: the headers that tag one model call, its retries included.

        Call it once per logical call. Never raises on account of what is tagged.

        Args:
            messages: the call's messages, or the prompt of a plain completion.
            tools: the call's tool schemas.
            final: this is the conversation's last turn: the gateway ends it afterwards.
            counter: used when the conversation has no counter of its own.
        """
        if self._ended:
            warn_once("ended", "call after its conversation %s was ended: not tagged", self.id)
            return {}
        key = fingerprint(messages) if self._numbers.remembers_failures else None
        with self._lock:
            turn_id, index = self._numbers.begin(messages, key, self._new_id)
            final, self._final_next = final or self._final_next, False
            if final:
                self._final_turn = turn_id
            placement = self._placement
            dropped = self._numbers.drop_oldest()
        _by_turn[turn_id] = self
        if dropped is not None:
            _by_turn.pop(dropped, None)
        headers = {
            wire.CONVERSATION_ID: self.id,
            wire.TURN_ID: turn_id,
            wire.TURN_INDEX: str(index),
        }
        if self.parent_id is not None:
            headers[wire.PARENT_ID] = self.parent_id
        first_turn = self._count_first_turn(messages, tools, counter)
        if first_turn is not None:
            headers[wire.FIRST_TURN_TOKENS] = str(first_turn[0])
            headers[wire.TOKEN_COUNTER] = first_turn[1]
        if placement is not None:
            headers[wire.PLACEMENT] = placement
        if final:
            headers[wire.FINAL] = "1"
        telemetry.mark_span(self.id)
        return headers

    def needs_blocking_count(self, counter: TokenCounter | None = None) -> bool:
        """Whether the next :meth:`headers_for` does I/O: then call it on a worker thread."""
        chosen = self.counter or counter
        return chosen is not None and chosen.blocking and not self._first_turn.frozen

    def mark_final(self) -> None:
        """Make the next turn the last: the gateway ends the conversation once it has finished."""
        self._final_next = True

    def observe(self, headers: Mapping[str, str], *, turn_id: str | None = None) -> TurnReport:
        """Take in an answer's headers: the placement token is echoed on the next turn.

        Args:
            headers: the response's.
            turn_id: which turn it answers: the request's ``X-ConServe-Turn-ID``.
        """
        report = read_report(headers)
        with self._lock:
            # Answers to parallel turns may arrive in any order: the latest turn's counts.
            known = self._report.turn_index if self._report else None
            if known is None or report.turn_index is None or report.turn_index >= known:
                self._report, self._placement = report, report.placement
            self._numbers.end(turn_id or "", gateway_index=report.turn_index)
        if turn_id is not None:
            _by_turn.pop(turn_id, None)
        return report

    def failed(self, turn_id: str, messages: Prompt | None = None) -> None:
        """Say that a call was not answered: made again with these messages, it is the same turn.

        Args:
            turn_id: the call's ``X-ConServe-Turn-ID``; ignored when it was answered after all.
            messages: its messages, as they were given to :meth:`headers_for`.
        """
        key = fingerprint(messages)
        with self._lock:
            if not self._numbers.fail(turn_id, key):
                return
            if not self._numbers.answered and self._numbers.turns == 1:
                self._first_turn.thaw()
            if turn_id == self._final_turn:
                self._final_next = True
        _by_turn.pop(turn_id, None)

    def handover(self) -> str:
        """A token to go on in another process with: :func:`resume` makes this conversation there.

        From then on both count with what the other's answers left in the histories they send.
        """
        with self._lock:
            self._numbers.shared = True
            tokens, counter = self._first_turn.value or (None, None)
            return Handover(
                id=self.id,
                parent_id=self.parent_id,
                turns=self._numbers.turns,
                examples=self._numbers.examples,
                first_turn_tokens=tokens,
                counter=counter,
                placement=self._placement,
            ).encode()

    def _take_over(self, given: Handover) -> None:
        self._numbers = TurnNumbers(given.turns, given.examples)
        self._numbers.shared = True
        self._placement = given.placement
        if given.first_turn_tokens is not None and given.counter is not None:
            self._first_turn = FirstTurn((given.first_turn_tokens, given.counter))

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

    def _count_first_turn(
        self, prompt: Prompt | None, tools: Sequence[Any] | None, counter: TokenCounter | None
    ) -> tuple[int, str] | None:
        if not self._first_turn.frozen and prompt is not None and not self._is_new:
            prompt = opening(prompt)[1]
        return self._first_turn.freeze(prompt, tools, self.counter or counter)


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
    made._take_over(given)
    return made


def conversation_of(turn_id: str) -> Conversation | None:
    """The conversation that a turn was tagged in, while it waits for an answer and is held."""
    return _by_turn.get(turn_id)


def _after_fork() -> None:
    """In a forked process: a lock that another thread held would never be free again."""
    for one in list(_all):
        one._lock = threading.Lock()
        one._first_turn.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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


def _checked(value: str, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConversationIdError(
            f"conversation {what} {value!r}: pass a non-empty string, or leave it out"
        )
    return wire.safe_id(value)
