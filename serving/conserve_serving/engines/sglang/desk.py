"""Does the store's slow work away from SGLang's threads: claims, acknowledgements, collecting.

SGLang's scheduler thread says which prompts are done and which conversations are over, its backup
thread which pages are written; both only leave a note here and go on.
Loaded inside SGLang: standard library only.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from conserve_serving.engines.sglang.expectations import PARTIAL_PAGES, Expectations, Verdict

_log = logging.getLogger(__name__)


class Shelf(Protocol):
    """What the desk needs of a transport."""

    def has(self, key: str) -> bool:
        """Whether a page is stored."""

    def claim(self, conversation: str, keys: Sequence[str]) -> list[str]:
        """Keep pages for a conversation; returns the keys that are not there."""

    def release(self, conversation: str) -> int:
        """Forget a conversation; returns pages removed."""

    def collect(self) -> object:
        """Remove what is too old, and what there is no room for."""


class Desk:
    """One thread that owns the expectations.

    Args:
        shelf: where pages are.
        tell: sends a message to the gateway; None: this engine only reads.
        engine: this engine's id at the gateway.
        page_tokens: tokens of a page.
        rank, ranks: which part of every page is stored here.
        expect_timeout_s: longest wait for the rest of a prompt's pages.
        collect_interval_s: pause between two rounds of collecting; None: somebody else does it.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        shelf: Shelf,
        *,
        tell: Callable[[dict[str, object]], None] | None,
        engine: str,
        page_tokens: int,
        rank: int,
        ranks: int,
        expect_timeout_s: float,
        collect_interval_s: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._shelf = shelf
        self._tell = tell
        self._engine = engine
        self._page_tokens = page_tokens
        self._rank, self._ranks = rank, ranks
        self._collect_interval_s = collect_interval_s
        self._clock = clock
        self._expected = Expectations(shelf.has, timeout_s=expect_timeout_s)
        self._expire_every_s = expect_timeout_s / 4
        self._notes: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._next_collect_s = clock() + (collect_interval_s or 0.0)
        self._next_expire_s = clock() + self._expire_every_s
        self._thread = threading.Thread(target=self._run, name="conserve-store", daemon=True)
        self._thread.start()

    # --- notes, from any thread ----------------------------------------------------------------
    def expect(self, conversation: str, keys: Sequence[str]) -> None:
        """A prompt's prefill has ended: acknowledge it when its pages are there."""
        since_s = self._clock()

        def note() -> None:
            self._conclude(
                self._expected.expect(conversation, keys, since_s=since_s, now_s=self._clock())
            )

        self._notes.put(note)

    def written(self, keys: Sequence[str]) -> None:
        """Pages have been stored."""
        self._notes.put(lambda: self._conclude(self._expected.written(keys, now_s=self._clock())))

    def failed(self, keys: Sequence[str], error: str) -> None:
        """Pages could not be stored."""
        self._notes.put(
            lambda: self._conclude(self._expected.failed(keys, error, now_s=self._clock()))
        )

    def release(self, conversation: str) -> None:
        """A conversation is over."""

        def note() -> None:
            self._shelf.release(conversation)

        self._notes.put(note)

    def flush(self, *, timeout_s: float = 10.0) -> bool:
        """Wait until every note so far has been dealt with; False when that takes too long."""
        done = threading.Event()
        self._notes.put(done.set)
        return done.wait(timeout_s)

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Deal with the notes that are there, then end."""
        self._notes.put(None)
        self._thread.join(timeout_s)

    # --- the thread ----------------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            try:
                note = self._notes.get(timeout=self._patience_s())
            except queue.Empty:
                note = self._nothing
            if note is None:
                return
            try:
                note()
                self._tick()
            except OSError as error:  # the shared file system's trouble: prompts are prefilled anew
                _log.error("hand-off store: %s", error)
            except Exception:  # noqa: BLE001 - a back end's: without this thread nothing is handed over
                _log.exception("hand-off store: a note failed")

    def _nothing(self) -> None:
        pass

    def _patience_s(self) -> float:
        due_s = self._next_expire_s
        if self._collect_interval_s is not None:
            due_s = min(due_s, self._next_collect_s)
        return max(0.01, due_s - self._clock())

    def _tick(self) -> None:
        now_s = self._clock()
        if now_s >= self._next_expire_s:
            self._next_expire_s = now_s + self._expire_every_s
            self._conclude(self._expected.expire(now_s=now_s))
        if self._collect_interval_s is not None and now_s >= self._next_collect_s:
            self._next_collect_s = now_s + self._collect_interval_s
            self._shelf.collect()

    def _conclude(self, verdicts: list[Verdict]) -> None:
        for verdict in verdicts:
            stored, error = verdict.stored, verdict.error
            if error is None:
                missing = self._shelf.claim(verdict.conversation, verdict.keys)
                if missing:  # removed since it was found there
                    stored, error = verdict.keys.index(missing[0]), PARTIAL_PAGES
            if self._tell is None:
                continue
            message: dict[str, object] = {
                "engine": self._engine,
                "key": verdict.keys[-1],
                "tokens": stored * self._page_tokens,
                "duration_s": round(verdict.duration_s, 6),
            }
            if self._ranks > 1:
                message |= {"rank": self._rank, "ranks": self._ranks}
            if error is not None:
                message["error"] = error
            self._tell(message)
