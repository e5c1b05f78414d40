"""How conversations have been observed to grow, by age. Never a guess about one conversation.

Ages are turn indices in powers of two: conversations at turn 5 and at turn 7 are of an age,
those at turn 2 and at turn 40 are not.
"""

from __future__ import annotations

from typing import Final

AGES: Final = 12
_WINDOW: Final = 64


def age_of(turns: int) -> int:
    """Age class of a conversation that has ``turns`` turns behind it."""
    return min(turns.bit_length(), AGES - 1)


class GrowthModel:
    """For each age, over a sliding window: mean output, mean growth of context in a turn, and the
    share of conversations that had another turn rather than end."""

    __slots__ = (
        "_ahead",
        "_growth",
        "_output",
        "_seen_growth",
        "_seen_next",
        "_seen_output",
        "_survival",
    )

    def __init__(self, output_tokens: int) -> None:
        self._output = [float(output_tokens)] * AGES
        self._growth = [0.0] * AGES
        self._survival = [1.0] * AGES
        self._ahead = [_turns_ahead(1.0, age) for age in range(AGES)]  # follows from _survival
        self._seen_output = [0] * AGES
        self._seen_growth = [0] * AGES
        self._seen_next = [0] * AGES

    def observe_output(self, turns: int, output_tokens: int) -> None:
        """A turn with ``turns`` before it put out so many tokens."""
        _average(self._output, self._seen_output, age_of(turns), output_tokens)

    def observe_growth(self, turns: int, tokens: int) -> None:
        """A turn with ``turns`` before it made its conversation's context ``tokens`` longer."""
        age = age_of(turns)
        _average(self._growth, self._seen_growth, age, max(0, tokens))
        self._observe_next(age, 1.0)

    def observe_end(self, turns: int) -> None:
        """A conversation ended after ``turns`` turns."""
        self._observe_next(age_of(turns), 0.0)

    def _observe_next(self, age: int, went_on: float) -> None:
        _average(self._survival, self._seen_next, age, went_on)
        self._ahead[age] = _turns_ahead(self._survival[age], age)

    def output_tokens(self, turns: int) -> float:
        """Mean output observed for turns of this age; the configured reserve before any."""
        return self._output[age_of(turns)]

    def headroom_tokens(self, conversations_by_age: list[int]) -> float:
        """Growth observed of conversations of these ages over as many turns again as they have.

        With growth ``g`` a turn and a share ``s`` that goes on after each, a conversation in an
        age class of ``n`` turns grows by ``g * (s + s² + … + sⁿ)`` before it leaves the class.
        """
        tokens = 0.0
        for age, conversations in enumerate(conversations_by_age):
            growth = self._growth[age]
            if conversations and growth:
                tokens += conversations * growth * self._ahead[age]
        return tokens


def _turns_ahead(survival: float, age: int) -> float:
    """Mean number of further turns within an age class, when each is followed with that share."""
    turns = 1 << max(0, age - 1)
    if survival >= 1.0:
        return float(turns)
    return survival * (1.0 - survival**turns) / (1.0 - survival)


def _average(means: list[float], seen: list[int], age: int, value: float) -> None:
    seen[age] = min(seen[age] + 1, _WINDOW)
    means[age] += (value - means[age]) / seen[age]
