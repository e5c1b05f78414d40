"""The tags of one conversation's calls: who it is, how many turns it has had, where it lives.

Calls are numbered by :class:`~conserve_agents.turns.TurnNumbers`, whose rules are its docstring.
The first turn's length is counted once, when the first turn is tagged, and frozen; if that turn
fails before anything was answered, the next one is the first.
"""

from __future__ import annotations

import os
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from conserve_agents import telemetry, wire
from conserve_agents.counting import FirstTurn, TokenCounter
from conserve_agents.errors import ArgumentError, ConversationIdError
from conserve_agents.handover import Handover
from conserve_agents.logs import warn_once
from conserve_agents.turns import (
    Prompt,
    TurnNumbers,
    TurnReport,
    fingerprint,
    opening,
    read_report,
)

#: By the ids of their turns: how an answer finds the conversation of its request.
#: Not by their own ids: two of one process may share one (two gateways, two keys).
_by_turn: Final[weakref.WeakValueDictionary[str, Tags]] = weakref.WeakValueDictionary()
#: Every one there is, to give a forked process locks of its own.
_all: Final[weakref.WeakSet[Tags]] = weakref.WeakSet()


def new_uuid() -> str:
    """An id that nobody else makes."""
    return uuid.uuid4().hex


class Tags:
    """What a :class:`~conserve_agents.Conversation` says on the wire; it adds a life to it."""

    def __init__(
        self,
        id: str | None,
        *,
        parent_id: str | None,
        counter: TokenCounter | None,
        turns: int | None,
        new_id: Callable[[], str],
    ) -> None:
        if turns is not None and (not isinstance(turns, int) or turns < 0):
            raise ArgumentError(
                f"conversation turns {turns!r}: pass how many it has had, 0 or more"
            )
        self.id: Final = _checked(new_id() if id is None else id, "id")
        parent = None if parent_id is None else _checked(parent_id, "parent")
        self.parent_id: Final = None if parent == self.id else parent
        self.counter: Final = counter
        self._new_id: Final = new_id
        # A given id may name a conversation that began elsewhere; a new one cannot.
        self._is_new: Final = turns == 0 or (turns is None and id is None)
        self._numbers = TurnNumbers(0 if self._is_new else turns)
        self._first_turn = FirstTurn()
        self._report: TurnReport | None = None
        self._placement: str | None = None
        self._final_next = False
        self._final_turn: str | None = None
        self._ended = False
        self._lock = threading.Lock()
        _all.add(self)

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
        with self._lock:
            may_repeat = self._numbers.may_repeat(messages)
        key = fingerprint(messages) if may_repeat else None
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
            if not self._numbers.fail(turn_id, messages, key):
                return
            if not self._numbers.answered and self._numbers.turns == 1:
                self._first_turn.thaw()
            if turn_id == self._final_turn:
                self._final_next = True
        _by_turn.pop(turn_id, None)

    def handover(self) -> str:
        """A token to go on in another process with: ``resume`` makes this conversation there.

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

    def take_over(self, given: Handover) -> None:
        """Go on from where another process was; before the first call here."""
        self._numbers = TurnNumbers(given.turns, given.examples)
        self._numbers.shared = True
        self._placement = given.placement
        if given.first_turn_tokens is not None and given.counter is not None:
            self._first_turn = FirstTurn((given.first_turn_tokens, given.counter))

    def _count_first_turn(
        self, prompt: Prompt | None, tools: Sequence[Any] | None, counter: TokenCounter | None
    ) -> tuple[int, str] | None:
        if not self._first_turn.frozen and prompt is not None and not self._is_new:
            prompt = opening(prompt)[1]
        return self._first_turn.freeze(prompt, tools, self.counter or counter)


def tags_of(turn_id: str) -> Tags | None:
    """What a turn was tagged by, while it waits for an answer and the conversation is held."""
    return _by_turn.get(turn_id)


def _after_fork() -> None:
    """In a forked process: a lock that another thread held would never be free again."""
    for one in list(_all):
        one._lock = threading.Lock()
        one._first_turn.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _checked(value: str, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConversationIdError(
            f"conversation {what} {value!r}: pass a non-empty string, or leave it out"
        )
    return wire.safe_id(value)
