"""What generated workloads are drawn from: statistics of real traces (``quantiles.json``).

Every quantity has marginal distributions, by position in the conversation, as quantiles; how they
hang together is a Gaussian copula. A conversation has five standard normal factors (turns, first
prompt, appended, answer, gap) with the correlations of the trace. A turn's appended tokens, answer
and gap each mix the conversation's factor with a draw of the turn's own, in the proportion that
reproduces how alike the turns of one conversation are. ``benchmarks/workloads/make_quantiles.py``
writes the file.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """One marginal distribution: ``values[i]`` is the quantile at probability ``grid[i]``."""

    grid: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, u: float) -> float:
        """The value at a probability.

        Between two quantiles above 0 the interpolation is geometric: lengths have long tails, and
        a straight line would put too much into them.
        """
        high = min(bisect_right(self.grid, u), len(self.grid) - 1)
        low = high - 1
        share = (u - self.grid[low]) / (self.grid[high] - self.grid[low])
        below, above = self.values[low], self.values[high]
        if below > 0.0:
            return float(below * (above / below) ** share)
        return below + share * (above - below)

    def draw(self, rng: random.Random) -> float:
        """One value, by inverse transform."""
        return self.at(rng.random())


@dataclass(frozen=True, slots=True, kw_only=True)
class Alikeness:
    """How alike the turns of one conversation are, in one quantity; in normal scores.

    Attributes:
        mean: of the conversation's factor. Long conversations count for more turns, so it is not 0
            where length and quantity hang together.
        share: of the variance that is between conversations.
    """

    mean: float
    share: float

    def score(self, factor: float, own: float) -> float:
        """A turn's score from its conversation's factor and a draw of its own."""
        return self.mean + math.sqrt(self.share) * factor + math.sqrt(1.0 - self.share) * own


@dataclass(frozen=True, slots=True, kw_only=True)
class ByTurn:
    """One quantity of the turns: its distribution at each position, and how alike turns are.

    Attributes:
        starts: first turn (counted from 1) that each of ``quantiles`` holds for, ascending.
        quantiles: as many.
        alikeness: of the turns of one conversation.
    """

    starts: tuple[int, ...]
    quantiles: tuple[Quantiles, ...]
    alikeness: Alikeness

    def at(self, turn: int, score: float) -> float:
        """The value of a turn with this normal score."""
        return self.quantiles[bisect_right(self.starts, turn) - 1].at(normal_cdf(score))


@dataclass(frozen=True, slots=True, kw_only=True)
class Resets:
    """When a conversation's history is sent anew.

    Attributes:
        after_gap_s: ``(gap, probability)`` ascending: after a gap of at least that long, the
            history behind the shared prefix is rewritten in full length.
        compact_at: context at which the history is compacted.
        compacted_share: what is left of the context then.
    """

    after_gap_s: tuple[tuple[float, float], ...]
    compact_at: Quantiles
    compacted_share: Quantiles

    def rewrite_probability(self, gap_s: float) -> float:
        """Probability that the history is rewritten after a gap."""
        starts = [start for start, _ in self.after_gap_s]
        return self.after_gap_s[bisect_right(starts, gap_s) - 1][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a named workload is drawn from.

    Attributes:
        name, about, source: for people; ``source`` names the trace and its licence.
        turns, first_input: per conversation.
        appended, output, gap_s: per turn; the first turn has no appended tokens and no gap.
        max_gap_s: longer gaps are shortened to this; None: no limit.
        max_context_tokens: a conversation ends before the turn that exceeds this; None: no limit.
        factors: lower triangular matrix that gives the conversation's factors their correlations;
            rows turns, first input, appended, output, gap.
        within: the same for a turn's own draws; rows appended, output, gap.
        resets: None: the history is never sent anew.
        prefixes: length and number of conversations of each prefix of the trace; empty: not known.
    """

    name: str
    about: str
    source: str
    turns: Quantiles
    first_input: Quantiles
    appended: ByTurn
    output: ByTurn
    gap_s: ByTurn | None
    max_gap_s: float | None
    max_context_tokens: int | None
    factors: tuple[tuple[float, ...], ...]
    within: tuple[tuple[float, ...], ...]
    resets: Resets | None
    prefixes: tuple[tuple[int, int], ...]


def normal_cdf(score: float) -> float:
    """Probability of a standard normal below ``score``."""
    return 0.5 * math.erfc(-score / math.sqrt(2.0))


def correlated(rng: random.Random, lower: Sequence[Sequence[float]]) -> list[float]:
    """Standard normals with the correlations whose lower triangular factor is given."""
    plain = [rng.gauss(0.0, 1.0) for _ in lower]
    return [sum(a * z for a, z in zip(row, plain, strict=False)) for row in lower]


@cache
def recipes() -> dict[str, Recipe]:
    """The workloads there are, by name."""
    text = importlib.resources.files(__package__).joinpath("quantiles.json").read_text("utf-8")
    return parse_recipes(text)


def parse_recipes(text: str) -> dict[str, Recipe]:
    """Recipes by name from a file of the form of ``quantiles.json``."""
    data = json.loads(text)
    grid = tuple(data["quantiles"])
    return {name: _recipe(name, entry, grid) for name, entry in data["workloads"].items()}


def _recipe(name: str, entry: dict[str, Any], grid: tuple[float, ...]) -> Recipe:
    def quantiles(values: Sequence[float]) -> Quantiles:
        return Quantiles(grid=grid, values=tuple(values))

    def by_turn(quantity: dict[str, Any]) -> ByTurn:
        return ByTurn(
            starts=tuple(quantity["starts"]),
            quantiles=tuple(map(quantiles, quantity["quantiles"])),
            alikeness=Alikeness(mean=quantity["mean"], share=quantity["share"]),
        )

    resets = entry.get("resets")
    return Recipe(
        name=name,
        about=entry["about"],
        source=entry["source"],
        turns=quantiles(entry["turns"]),
        first_input=quantiles(entry["first_input"]),
        appended=by_turn(entry["appended"]),
        output=by_turn(entry["output"]),
        gap_s=by_turn(entry["gap_s"]) if "gap_s" in entry else None,
        max_gap_s=entry.get("max_gap_s"),
        max_context_tokens=entry.get("max_context_tokens"),
        factors=tuple(map(tuple, entry["factors"])),
        within=tuple(map(tuple, entry["within"])),
        resets=None
        if resets is None
        else Resets(
            after_gap_s=tuple((start, chance) for start, chance in resets["after_gap_s"]),
            compact_at=quantiles(resets["compact_at"]),
            compacted_share=quantiles(resets["compacted_share"]),
        ),
        prefixes=tuple((tokens, count) for tokens, count in entry.get("prefixes", ())),
    )
