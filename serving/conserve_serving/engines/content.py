"""What a prompt contains, for the prefix tree: real tokens, or runs of named streams.

The tree needs only to know where two prompts begin to differ. ``TokenPrompt`` knows it from the
chained page keys of real token ids (the emulated engine); ``StreamPrompt`` from runs such as
"tokens 0–8,191 of stream 17" (the simulator), so that a prompt of 100,000 tokens is a few tuples.
Prompts are immutable and may be shared.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

from conserve_serving.engines.pages import namespace_seed, page_keys, token_array

Run = tuple[Hashable, int, int]
"""``(stream, offset, length)``: ``length`` tokens of ``stream`` from ``offset`` on."""


class Prompt(Protocol):
    """Content that can be compared page by page. Offsets are multiples of ``page_tokens``."""

    @property
    def tokens(self) -> int:
        """Length in tokens, the incomplete last page included."""

    @property
    def page_tokens(self) -> int:
        """Page size the content is cut by."""

    def key_at(self, start_tokens: int) -> Hashable:
        """Identity of the full page at ``start_tokens``: equal keys, equal page."""

    def common_tokens(self, start_tokens: int, other: Prompt) -> int:
        """How many tokens of ``self`` from ``start_tokens`` on equal those of ``other`` from 0 on.

        Both must agree on everything before; whole pages only.
        """

    def cut(self, start_tokens: int, end_tokens: int) -> Prompt:
        """The part from ``start_tokens`` up to ``end_tokens``."""


class TokenPrompt:
    """A prompt of real token ids, kept as its page keys and the ids of the incomplete last page."""

    __slots__ = ("_keys", "_seed", "_tail", "page_tokens", "tokens")

    def __init__(
        self, keys: list[bytes], tail: Sequence[int], page_tokens: int, seed: bytes = b""
    ) -> None:
        """Use :meth:`of`; ``seed`` stands for the key before the first page."""
        self._keys = keys
        self._tail = tail
        self._seed = seed
        self.page_tokens = page_tokens
        self.tokens = len(keys) * page_tokens + len(tail)

    @classmethod
    def of(
        cls,
        token_ids: Sequence[int],
        page_tokens: int,
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
    ) -> TokenPrompt:
        """The prompt made of these token ids.

        Args and errors: as for :func:`conserve_serving.engines.pages.page_keys`.
        """
        seed = namespace_seed(extra_key, cache_salt)
        return cls([], [], page_tokens, seed).extended(token_ids)

    def extended(self, token_ids: Sequence[int]) -> TokenPrompt:
        """This prompt followed by ``token_ids``; costs only the new pages."""
        ids = token_array(token_ids)
        if len(self._tail):
            ids = token_array(self._tail) + ids
        keys = page_keys(ids, self.page_tokens, prior=self._keys[-1] if self._keys else self._seed)
        tail = ids[len(keys) * self.page_tokens :]
        return TokenPrompt(self._keys + keys, tail, self.page_tokens, self._seed)

    @property
    def last_key(self) -> str | None:
        """Hex key of the last full page; None below one page."""
        return self._keys[-1].hex() if self._keys else None

    def key_at(self, start_tokens: int) -> Hashable:
        """See :class:`Prompt`."""
        return self._keys[start_tokens // self.page_tokens]

    def common_tokens(self, start_tokens: int, other: Prompt) -> int:
        """See :class:`Prompt`. Keys are chained, so the last equal key decides: O(log pages)."""
        if not isinstance(other, TokenPrompt):
            return 0
        mine, theirs, at = self._keys, other._keys, start_tokens // self.page_tokens
        low, high = 0, min(len(mine) - at, len(theirs))
        if high > 0 and mine[at + high - 1] == theirs[high - 1]:
            return high * self.page_tokens
        while low < high:  # invariant: `low` pages agree, page `high` does not
            middle = (low + high) // 2
            if mine[at + middle] == theirs[middle]:
                low = middle + 1
            else:
                high = middle
        return low * self.page_tokens

    def cut(self, start_tokens: int, end_tokens: int) -> TokenPrompt:
        """See :class:`Prompt`; whole pages only."""
        page = self.page_tokens
        first, last = start_tokens // page, end_tokens // page
        seed = self._keys[first - 1] if first else self._seed
        return TokenPrompt(self._keys[first:last], [], page, seed)


class StreamPrompt:
    """A prompt described by runs of named streams; adjacent runs of one stream are merged."""

    __slots__ = ("_runs", "_starts", "page_tokens", "tokens")

    def __init__(self, runs: Iterable[Run], page_tokens: int) -> None:
        """Args: runs in order, lengths ≥ 0; page size in tokens."""
        merged: list[Run] = []
        starts: list[int] = []
        at = 0
        for stream, offset, length in runs:
            if length <= 0:
                continue
            if merged:
                last_stream, last_offset, last_length = merged[-1]
                if last_stream == stream and last_offset + last_length == offset:
                    merged[-1] = (stream, last_offset, last_length + length)
                    at += length
                    continue
            merged.append((stream, offset, length))
            starts.append(at)
            at += length
        self._runs = merged
        self._starts = starts
        self.page_tokens = page_tokens
        self.tokens = at

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs, in their shortest form."""
        return tuple(self._runs)

    def _pieces(self, start_tokens: int, end_tokens: int) -> list[Run]:
        pieces: list[Run] = []
        index = bisect_right(self._starts, start_tokens) - 1
        at = start_tokens
        while at < end_tokens:
            stream, offset, length = self._runs[index]
            skipped = at - self._starts[index]
            taken = min(length - skipped, end_tokens - at)
            pieces.append((stream, offset + skipped, taken))
            at += taken
            index += 1
        return pieces

    def key_at(self, start_tokens: int) -> Hashable:
        """See :class:`Prompt`: where the page begins if one run holds it, else its pieces."""
        index = bisect_right(self._starts, start_tokens) - 1
        stream, offset, length = self._runs[index]
        skipped = start_tokens - self._starts[index]
        if length - skipped >= self.page_tokens:
            return (stream, offset + skipped)
        return tuple(self._pieces(start_tokens, start_tokens + self.page_tokens))

    def common_tokens(self, start_tokens: int, other: Prompt) -> int:
        """See :class:`Prompt`; costs the number of runs."""
        if not isinstance(other, StreamPrompt):
            return 0
        total = min(self.tokens - start_tokens, other.tokens)
        if total <= 0:
            return 0
        if len(self._runs) == len(other._runs) == 1:  # the usual case: one conversation's stream
            (stream, offset, _), (their_stream, their_offset, _) = self._runs[0], other._runs[0]
            if stream != their_stream or offset + start_tokens != their_offset:
                return 0
            return total - total % self.page_tokens
        at = 0
        mine = bisect_right(self._starts, start_tokens) - 1
        theirs = 0
        while at < total:
            stream, offset, length = self._runs[mine]
            skipped = start_tokens + at - self._starts[mine]
            their_stream, their_offset, their_length = other._runs[theirs]
            their_skipped = at - other._starts[theirs]
            if stream != their_stream or offset + skipped != their_offset + their_skipped:
                break
            left, their_left = length - skipped, their_length - their_skipped
            at += min(left, their_left)
            mine += left <= their_left
            theirs += their_left <= left
        at = min(at, total)
        return at - at % self.page_tokens

    def cut(self, start_tokens: int, end_tokens: int) -> StreamPrompt:
        """See :class:`Prompt`."""
        end = min(end_tokens, self.tokens)
        return StreamPrompt(self._pieces(start_tokens, end), self.page_tokens)
