"""How conversations have been observed to grow, by age. Never a guess about one conversation.

Ages are turn indices in powers of two: conversations at turn 5 and at turn 7 are of an age,
those at turn 2 and at turn 40 are not.
"""

from __future__ import annotations

from typing import Final

AGES: Final = 12
_WINDOW: Final = 64


def age_of(turn_index: int) -> int:
    """Age class of a conversation that has ``turn_index`` turns behind it (0 for none)."""
    return min(turn_index.bit_length(), AGES - 1)


class GrowthModel:
    """Mean output and mean context growth per turn for each age, over a sliding window."""

    __slots__ = ("_growth", "_output", "_seen_growth", "_seen_output")

    def __init__(self, output_tokens: int) -> None:
        self._output = [float(output_tokens)] * AGES
        self._growth = [0.0] * AGES
        self._seen_output = [0] * AGES
        self._seen_growth = [0] * AGES

    def observe_output(self, turn_index: int, output_tokens: int) -> None:
        _average(self._output, self._seen_output, age_of(turn_index), output_tokens)

    def observe_growth(self, turn_index: int, tokens: int) -> None:
        """A tail turn made its conversation's context ``tokens`` longer."""
        _average(self._growth, self._seen_growth, age_of(turn_index), max(0, tokens))

    def output_tokens(self, turn_index: int) -> float:
        """Mean output observed for turns of this index; the configured reserve before any."""
        return self._output[age_of(turn_index)]

    def headroom_tokens(self, conversations_by_age: list[int]) -> float:
        """Growth to expect of a set of conversations over one more turn each."""
        return sum(n * g for n, g in zip(conversations_by_age, self._growth, strict=True) if n)


def _average(means: list[float], seen: list[int], age: int, value: float) -> None:
    seen[age] = min(seen[age] + 1, _WINDOW)
    means[age] += (value - means[age]) / seen[age]
