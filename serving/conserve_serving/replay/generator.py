"""Sample workloads: conversations drawn from quantiles of real traces (``quantiles.json``).

Every quantity (turns, first input, appended input, output, gap) is drawn on its own from its
marginal distribution, by linear interpolation between the stored quantiles. Correlations within a
conversation are therefore not reproduced; for those, replay a real trace.
"""

from __future__ import annotations

import importlib.resources
import json
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.replay.errors import TraceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """One marginal distribution: ``values[i]`` is the quantile at probability ``grid[i]``."""

    grid: tuple[float, ...]
    values: tuple[float, ...]

    def draw(self, rng: random.Random) -> float:
        """One value, by inverse transform."""
        u = rng.random()
        high = min(bisect_right(self.grid, u), len(self.grid) - 1)
        low = high - 1
        share = (u - self.grid[low]) / (self.grid[high] - self.grid[low])
        return self.values[low] + share * (self.values[high] - self.values[low])


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a named workload is sampled from.

    Attributes:
        name, about, source: for people; ``source`` names the trace and its licence.
        turns, first_input, appended, output: counts.
        output_by_turn: outputs of the first turns, where they differ from the rest.
        gap_s: delays before tail turns; None: no delay.
        max_gap_s: longer delays are shortened to this; None: no limit.
    """

    name: str
    about: str
    source: str
    turns: Quantiles
    first_input: Quantiles
    appended: Quantiles
    output: Quantiles
    output_by_turn: tuple[Quantiles, ...] = ()
    gap_s: Quantiles | None = None
    max_gap_s: float | None = None


@cache
def recipes() -> dict[str, Recipe]:
    """The workloads there are, by name."""
    text = importlib.resources.files(__package__).joinpath("quantiles.json").read_text("utf-8")
    data = json.loads(text)
    grid = tuple(data["quantiles"])

    def quantiles(values: Sequence[float]) -> Quantiles:
        return Quantiles(grid=grid, values=tuple(values))

    return {
        name: Recipe(
            name=name,
            about=entry["about"],
            source=entry["source"],
            turns=quantiles(entry["turns"]),
            first_input=quantiles(entry["first_input"]),
            appended=quantiles(entry["appended"]),
            output=quantiles(entry["output"]),
            output_by_turn=tuple(quantiles(v) for v in entry.get("output_by_turn", ())),
            gap_s=quantiles(entry["gap_s"]) if "gap_s" in entry else None,
            max_gap_s=entry.get("max_gap_s"),
        )
        for name, entry in data["workloads"].items()
    }


def generate(workload: str, *, conversations: int, seed: int) -> tuple[Conversation, ...]:
    """Sample conversations of a named workload.

    Args:
        workload: a name of :func:`recipes`.
        conversations: how many.
        seed: equal seeds give equal conversations; the first n of a larger sample are the sample
            of n.

    Raises:
        TraceError: there is no such workload.
    """
    recipe = recipes().get(workload)
    if recipe is None:
        raise TraceError(
            f"no workload {workload!r} to generate. There are: {', '.join(sorted(recipes()))}."
        )
    return tuple(_conversation(recipe, index, seed) for index in range(conversations))


def _conversation(recipe: Recipe, index: int, seed: int) -> Conversation:
    rng = random.Random(f"{seed}/{recipe.name}/{index}")  # noqa: S311 - a workload, not a secret
    turns: list[Turn] = []
    for number in range(max(1, round(recipe.turns.draw(rng)))):
        new = round((recipe.appended if turns else recipe.first_input).draw(rng))
        per_turn = recipe.output_by_turn
        output = round((per_turn[number] if number < len(per_turn) else recipe.output).draw(rng))
        gap_s = recipe.gap_s.draw(rng) if turns and recipe.gap_s is not None else 0.0
        if recipe.max_gap_s is not None:
            gap_s = min(gap_s, recipe.max_gap_s)
        kept = turns[-1].context_tokens if turns else 0
        turns.append(
            Turn(
                input_tokens=kept + max(1, new),
                new_input_tokens=max(1, new),
                output_tokens=max(1, output),
                gap_s=gap_s,
            )
        )
    return Conversation(id=f"{recipe.name}-{index}", turns=tuple(turns))
