"""Which prompts are complete in the store, and who is to be told.

A prompt is *expected* when its prefill has ended; it is complete when every one of its pages has
been written. Pure: time is an argument. Loaded inside SGLang: standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

#: Why a prompt did not become complete, as the gateway counts it.
STORE_FULL: Final = "store_full"
PARTIAL_PAGES: Final = "partial_pages"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of an expected prompt.

    Attributes:
        conversation: whose it is.
        keys: of its full pages, in order.
        stored: how many of them, from the first on, are stored.
        duration_s: since the end of its prefill.
        error: why it is not complete; None when it is.
    """

    conversation: str
    keys: tuple[str, ...]
    stored: int
    duration_s: float
    error: str | None = None


@dataclass(slots=True)
class _Expected:
    conversation: str
    keys: tuple[str, ...]
    since_s: float
    missing: set[str] = field(default_factory=set)


class Expectations:
    """Prompts that are not complete yet.

    Args:
        has: whether a page is stored.
        timeout_s: after this long a prompt is given up.
    """

    def __init__(self, has: Callable[[str], bool], *, timeout_s: float) -> None:
        self._has = has
        self._timeout_s = timeout_s
        self._open: list[_Expected] = []

    def __len__(self) -> int:
        return len(self._open)

    def expect(
        self, conversation: str, keys: Sequence[str], *, since_s: float, now_s: float
    ) -> list[Verdict]:
        """A prefill has ended. Returns its verdict if all of its pages are there already."""
        one = _Expected(conversation, tuple(keys), since_s)
        one.missing = {key for key in keys if not self._has(key)}
        if one.missing:
            self._open.append(one)
            return []
        return [self._verdict(one, now_s)]

    def written(self, keys: Iterable[str], *, now_s: float) -> list[Verdict]:
        """Pages have been stored. Returns the verdicts on prompts that this completes."""
        done = set(keys)
        verdicts = []
        for one in self._open:
            one.missing -= done
        for one in [one for one in self._open if not one.missing]:
            self._open.remove(one)
            verdicts.append(self._verdict(one, now_s))
        return verdicts

    def failed(self, keys: Iterable[str], error: str, *, now_s: float) -> list[Verdict]:
        """Pages could not be stored. Returns the verdicts on the prompts that needed them."""
        lost = set(keys)
        verdicts = []
        for one in [one for one in self._open if one.missing & lost]:
            self._open.remove(one)
            verdicts.append(self._verdict(one, now_s, error))
        return verdicts

    def expire(self, *, now_s: float) -> list[Verdict]:
        """Verdicts on prompts that have waited too long; what was stored meanwhile counts."""
        verdicts = []
        for one in [one for one in self._open if now_s - one.since_s >= self._timeout_s]:
            self._open.remove(one)
            one.missing = {key for key in one.missing if not self._has(key)}
            verdicts.append(self._verdict(one, now_s, PARTIAL_PAGES if one.missing else None))
        return verdicts

    def _verdict(self, one: _Expected, now_s: float, error: str | None = None) -> Verdict:
        stored = len(one.keys)
        if error is not None:
            stored = next(
                (index for index, key in enumerate(one.keys) if key in one.missing), stored
            )
        return Verdict(
            conversation=one.conversation,
            keys=one.keys,
            stored=stored,
            duration_s=max(0.0, now_s - one.since_s),
            error=error,
        )
