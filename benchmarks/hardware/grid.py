"""Which steps are measured, in which order, and what is made of the repeats. No torch."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Final

#: How attention of a mixed step is computed: prompt and decode in one call, as SGLang does, or one
#: call for each. What a kernel loses in the first, a better one may not: the two are a band.
CALLS: Final = ("one_call", "two_calls")
_RESAMPLES: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cell:
    """A mixed step and its two parts.

    Attributes:
        chunk_tokens: prompt tokens computed.
        batch: requests that decode one token.
        ctx_tokens: KV tokens that each of them reads, the new one included.
        prefix_tokens: cached tokens before the chunk.
    """

    chunk_tokens: int
    batch: int
    ctx_tokens: int
    prefix_tokens: int = 0

    @property
    def kv_tokens(self) -> int:
        """Tokens that the step has in the pool."""
        return self.chunk_tokens + self.prefix_tokens + self.batch * self.ctx_tokens

    def as_dict(self) -> dict[str, int]:
        """For the result file."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The grid, each axis rising."""

    chunk_tokens: tuple[int, ...]
    batch: tuple[int, ...]
    ctx_tokens: tuple[int, ...]
    prefix_tokens: tuple[int, ...]


def ordered(axes: Axes, *, seed: int) -> list[tuple[int, Cell]]:
    """All cells with their level: the ends and middles of all axes first, then what is between.

    So whatever is measured when the time is up spans the grid. Within a level the order is drawn,
    so that a drift of the machine is noise and not a slope.
    """
    levels = [_levels(axis) for axis in (axes.chunk_tokens, axes.batch, axes.ctx_tokens)]
    levels.append({value: min(rank, 1) for rank, value in enumerate(axes.prefix_tokens)})
    dice = random.Random(seed)  # noqa: S311 - an order, not a secret
    cells = []
    for chunk, batch, ctx, prefix in product(
        axes.chunk_tokens, axes.batch, axes.ctx_tokens, axes.prefix_tokens
    ):
        cell = Cell(chunk_tokens=chunk, batch=batch, ctx_tokens=ctx, prefix_tokens=prefix)
        level = sum(
            of[value] for of, value in zip(levels, (chunk, batch, ctx, prefix), strict=True)
        )
        cells.append((level, dice.random(), cell))
    return [(level, cell) for level, _, cell in sorted(cells)]


def middle(axis: tuple[int, ...]) -> int:
    """The value in the middle, the lower of two."""
    return axis[(len(axis) - 1) // 2]


def _levels(axis: Sequence[int]) -> dict[int, int]:
    """0 for the ends and the middle, then one more with each halving of what is between."""
    level = {axis[0]: 0, axis[-1]: 0}

    def halve(low: int, high: int, depth: int) -> None:
        if high - low < 2:
            return
        middle = (low + high) // 2
        level[axis[middle]] = depth
        halve(low, middle, depth + 1)
        halve(middle, high, depth + 1)

    halve(0, len(axis) - 1, 0)
    return level


def take_turns(
    parts: Mapping[str, Callable[[int], tuple[float, float]]],
    *,
    rounds: int,
    warmup: int,
    least_ms: float,
    dice: random.Random,
) -> dict[str, dict[str, Any]]:
    """Time the steps in turn, in an order drawn for each round.

    One after the other and not each by itself: what the machine does slowly (clocks, temperature)
    then meets all of them alike.

    Args:
        parts: ``run(n)`` runs the step ``n`` times and gives milliseconds in all: of the device,
            and of the host until everything was launched.
        rounds: samples of each.
        warmup: runs before the first.
        least_ms: a sample is so many runs that it takes about as long.

    Returns:
        For each: ``ms`` of one run in each round, the median ``host_ms``, ``runs`` in a sample.
    """
    runs: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in parts}
    host: dict[str, list[float]] = {name: [] for name in parts}
    for name, run in parts.items():
        run(warmup)
        once_ms = max(run(1)[0], 1e-3)
        runs[name] = max(1, min(200, round(least_ms / once_ms)))
    for _ in range(rounds):
        for name in dice.sample(sorted(parts), len(parts)):
            device_ms, host_ms = parts[name](runs[name])
            samples[name].append(device_ms / runs[name])
            host[name].append(host_ms / runs[name])
    return {
        name: {
            "ms": samples[name],
            "host_ms": statistics.median(host[name]),
            "runs": runs[name],
        }
        for name in parts
    }


def slowdown(
    prefill: Sequence[float], decode: Sequence[float], mixed: Sequence[float]
) -> dict[str, float]:
    """Mixed step over the sum of its parts: median over the rounds, with its interval.

    Args:
        prefill, decode, mixed: times of one step, a value for each round; rounds are paired.

    Returns:
        ``median``; ``low`` and ``high``, the 95 % interval of that median by the bootstrap over
        rounds; ``p10`` and ``p90`` of the rounds.
    """
    ratios = [m / (p + d) for p, d, m in zip(prefill, decode, mixed, strict=True)]
    dice = random.Random(0)  # noqa: S311 - the same interval each time
    medians = sorted(
        statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES)
    )
    ordered_ratios = sorted(ratios)
    return {
        "median": statistics.median(ratios),
        "low": medians[round(0.025 * (_RESAMPLES - 1))],
        "high": medians[round(0.975 * (_RESAMPLES - 1))],
        "p10": ordered_ratios[round(0.1 * (len(ratios) - 1))],
        "p90": ordered_ratios[round(0.9 * (len(ratios) - 1))],
    }
