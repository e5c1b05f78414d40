"""What conversations have been observed to need: running means, never a guess about one of them."""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

from conserve_serving.core.growth import AGES, age_of

# Turns of an age whose mean is kept, about, and conversations whose lengths are; older ones fade.
_WINDOW: Final = 256
_KEEP: Final = 1.0 - 1.0 / _WINDOW
# What is believed before anything was seen counts as so many turns.
_PRIOR: Final = 2.0
_PRIOR_FIRST_PROMPT_TOKENS: Final = 8192.0
# Share of the conversations that have another turn after their first, before any was seen.
_PRIOR_SHARE: Final = 0.5
# Of the conversations that come to an age, at most so many are believed to come to the next before
# any was seen to: they go on for about as many turns again as they have had.
_PRIOR_PASS: Final = 0.25
# Some conversation ends at last.
_MOST: Final = 1.0 - 1e-6
# No age is looked at that fewer conversations come to.
_FEW: Final = 1e-4
# Gaps between arrivals that their rate is taken from.
_GAPS: Final = 128
# Arrivals at one instant are no division by zero.
_INSTANT_S: Final = 1e-6


class _Means(NamedTuple):
    """Means over the turns of an age."""

    new_tokens: float
    output_tokens: float
    read_tokens: float  # context read, summed over the output tokens


class _Usual(NamedTuple):
    """A conversation of the usual shape; what `LoadView` says of it."""

    tail_turns: float
    tail_new_tokens: float
    output_tokens: float
    context_tokens: float


class ObservedLoad:
    """What turns of each age needed, and how many conversations come to that age. Read by policies
    as a ``LoadView``.

    A conversation is the sum over the ages it can be expected to reach: for every number of turns
    behind them, the share of conversations that had another (Kaplan and Meier's estimate, by age).
    So the first minutes count for what they are: conversations that will be long have only not
    ended yet, and what those that ended first needed says little about them. Those in a long gap
    between two turns are taken to have ended until they go on.
    """

    __slots__ = (
        "_arrivals_s",
        "_first",
        "_next",
        "_reached",
        "_seen",
        "_turns",
        "_usual",
    )

    def __init__(self, output_tokens: int) -> None:
        """Args: output of a turn before any has been seen."""
        self._arrivals_s: deque[float] = deque(maxlen=_GAPS + 1)
        self._first = _PRIOR_FIRST_PROMPT_TOKENS
        prior = _Means(0.0, output_tokens, output_tokens * _PRIOR_FIRST_PROMPT_TOKENS)
        self._turns = [prior] * AGES
        self._seen = [0.0] * AGES
        self._reached = [0.0] * AGES  # conversations that had so many turns behind them
        self._next = [0.0] * AGES  # those of them that had another
        self._usual: _Usual | None = None

    def arrived(self, now_s: float) -> None:
        """A conversation began."""
        self._arrivals_s.append(now_s)

    def went_on(self, turns: int) -> None:
        """A conversation with ``turns`` turns behind it has another; to be told once of each."""
        self._next[age_of(turns)] += 1.0
        self._usual = None

    def observe(self, *, turns: int, prompt_tokens: int, new_tokens: int, output: int) -> None:
        """A turn with ``turns`` before it finished.

        Args:
            turns: turns that its conversation had behind it.
            prompt_tokens: its prompt.
            new_tokens: what of that was not in the conversation's KV.
            output: what it put out.
        """
        age = age_of(turns)
        seen = self._seen[age] = min(self._seen[age] + 1.0, _WINDOW)
        new, out, read = self._turns[age]
        weight = 1.0 / (seen + _PRIOR) if age < 2 else 1.0 / seen
        self._turns[age] = _Means(
            new + (new_tokens - new) * weight,
            out + (output - out) * weight,
            read + (output * (prompt_tokens + output / 2) - read) * weight,
        )
        if not turns:
            self._first += (prompt_tokens - self._first) * weight
            self._reached = [count * _KEEP for count in self._reached]
            self._next = [count * _KEEP for count in self._next]
        self._reached[age_of(turns + 1)] += 1.0
        self._usual = None

    def _conversation(self) -> _Usual:
        """The sum over ages, until the next turn arrives or finishes."""
        if self._usual is not None:
            return self._usual
        turns = self._turns[0]
        tails = new = 0.0
        output, read = turns.output_tokens, turns.read_tokens
        reach, share = 1.0, _PRIOR_SHARE
        for age in range(1, AGES):
            if reach < _FEW:
                break
            # Ages that few have reached are believed to go on as those before them did, and not on
            # and on.
            turns_of_age = 1 << (age - 1)
            if age > 1:
                share = min(share, _PRIOR_PASS ** (1.0 / turns_of_age))
            known = self._next[age] + _PRIOR * share
            share = min(known / (self._reached[age] + _PRIOR), _MOST)
            if self._seen[age] or age == 1:
                turns = self._turns[age]
            gone_on = share**turns_of_age
            expected = reach * share * (1.0 - gone_on) / (1.0 - share)
            tails += expected
            new += expected * turns.new_tokens
            output += expected * turns.output_tokens
            read += expected * turns.read_tokens
            reach *= gone_on
        self._usual = _Usual(tails, new, output, read / output if output else 0.0)
        return self._usual

    @property
    def conversations_per_s(self) -> float:
        """How often conversations begin; 0 before two have."""
        gaps = len(self._arrivals_s) - 1
        if gaps < 1:
            return 0.0
        return gaps / max(self._arrivals_s[-1] - self._arrivals_s[0], _INSTANT_S)

    @property
    def first_prompt_tokens(self) -> float:
        """Mean first prompt."""
        return self._first

    @property
    def tail_turns(self) -> float:
        """Later turns of a conversation."""
        return self._conversation().tail_turns

    @property
    def tail_new_tokens(self) -> float:
        """Uncached tokens of a conversation's later turns, together."""
        return self._conversation().tail_new_tokens

    @property
    def output_tokens(self) -> float:
        """Output of a conversation's turns, together."""
        return self._conversation().output_tokens

    @property
    def turn_output_tokens(self) -> float:
        """Output of one turn."""
        usual = self._conversation()
        return usual.output_tokens / (1.0 + usual.tail_turns)

    @property
    def context_tokens(self) -> float:
        """Context that an output token reads, mean over output tokens."""
        return self._conversation().context_tokens
