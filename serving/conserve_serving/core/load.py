"""What conversations have been observed to need: running means, never a guess about one of them."""

from __future__ import annotations

from typing import Final

# A new conversation takes so much of the weight of those before it.
_KEEP: Final = 1.0 - 1.0 / 256
# What is believed before anything was seen counts as so many conversations.
_PRIOR: Final = 2.0
_PRIOR_FIRST_PROMPT_TOKENS: Final = 8192.0
# Weight of the newest gap between two arrivals.
_GAP_WEIGHT: Final = 1.0 / 64


class ObservedLoad:
    """Sums over turns that have finished, old ones fading. Read by policies as a ``LoadView``.

    A conversation is counted when its first turn finishes. Turns of those still open are counted as
    they finish: in a steady state the ratio of the two is what a conversation has in all.
    """

    __slots__ = (
        "_arrived_s",
        "_context",
        "_conversations",
        "_first",
        "_gap_s",
        "_new",
        "_output",
        "_tails",
    )

    def __init__(self, output_tokens: int) -> None:
        """Args: output of a turn before any has been seen."""
        self._arrived_s: float | None = None
        self._gap_s: float | None = None
        self._conversations = _PRIOR
        self._first = _PRIOR * _PRIOR_FIRST_PROMPT_TOKENS
        self._tails = _PRIOR
        self._new = 0.0
        self._output = 2 * _PRIOR * output_tokens
        self._context = self._output * _PRIOR_FIRST_PROMPT_TOKENS

    def arrived(self, now_s: float) -> None:
        """A conversation began."""
        if self._arrived_s is not None:
            gap_s = now_s - self._arrived_s
            before_s = gap_s if self._gap_s is None else self._gap_s
            self._gap_s = before_s + _GAP_WEIGHT * (gap_s - before_s)
        self._arrived_s = now_s

    def observe(self, *, first: bool, prompt_tokens: int, new_tokens: int, output: int) -> None:
        """A turn finished: its prompt, what of it was not in the conversation's KV, its output."""
        if first:
            self._conversations = self._conversations * _KEEP + 1.0
            self._first = self._first * _KEEP + prompt_tokens
            self._tails *= _KEEP
            self._new *= _KEEP
            self._output *= _KEEP
            self._context *= _KEEP
        else:
            self._tails += 1.0
            self._new += new_tokens
        self._output += output
        self._context += output * (prompt_tokens + output / 2)

    @property
    def conversations_per_s(self) -> float:
        """How often conversations begin; 0 before two have."""
        return 1.0 / self._gap_s if self._gap_s else 0.0

    @property
    def first_prompt_tokens(self) -> float:
        """Mean first prompt."""
        return self._first / self._conversations

    @property
    def tail_turns(self) -> float:
        """Later turns of a conversation."""
        return self._tails / self._conversations

    @property
    def tail_new_tokens(self) -> float:
        """Uncached tokens of a conversation's later turns, together."""
        return self._new / self._conversations

    @property
    def output_tokens(self) -> float:
        """Output of a conversation's turns, together."""
        return self._output / self._conversations

    @property
    def turn_output_tokens(self) -> float:
        """Output of one turn."""
        return self._output / (self._conversations + self._tails)

    @property
    def context_tokens(self) -> float:
        """Context that an output token reads, mean over output tokens."""
        return self._context / self._output if self._output else 0.0
