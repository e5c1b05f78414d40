"""Runs of an agent that were given no thread: which of them goes on in which."""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

from langchain_core.messages import BaseMessage, convert_to_messages

from langchain_conserve.lineage import Chain

#: Runs whose histories are remembered; the one that ended first is forgotten.
MAX_RUNS: Final = 4096


class Runs:
    """Threads of runs that were given none, by the histories that they ended with. Thread-safe.

    Only a history with an answer in it tells: equal questions of two users are two conversations.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: OrderedDict[bytes, str] = OrderedDict()

    def thread_of(self, messages: Sequence[Any]) -> str:
        """The thread of the run that ended with the longest beginning of ``messages``, or a new
        one."""
        for key in reversed(_histories(messages)):
            with self._lock:
                found = self._threads.get(key)
            if found is not None:
                return found
        return f"run-{uuid.uuid4().hex}"

    def remember(self, thread_id: str, messages: Sequence[Any]) -> None:
        """A run of this thread ended with these messages."""
        histories = _histories(messages)
        if not histories:
            return
        with self._lock:
            self._threads[histories[-1]] = thread_id
            self._threads.move_to_end(histories[-1])
            if len(self._threads) > MAX_RUNS:
                self._threads.popitem(last=False)


def _histories(messages: Sequence[Any]) -> list[bytes]:
    """A digest of each beginning of the messages that ends with an answer."""
    known: list[BaseMessage] = convert_to_messages(messages)
    whole, found = hashlib.blake2b(digest_size=16), []
    for message, key in zip(known, Chain(known).keys, strict=True):
        whole.update(key.to_bytes(8, "little", signed=True))
        if message.type == "ai":
            found.append(whole.digest())
    return found
