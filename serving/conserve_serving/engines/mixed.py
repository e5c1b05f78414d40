"""How much longer a step takes that prefills and decodes than its parts: a measured table.

Written by ``benchmarks/hardware/make_mixed_profile.py`` from what ran on a GPU; docs/hardware.md
says what was measured and what is not in it.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

import msgspec


class MixedTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Slowdown on a grid: ``slowdown[i][j][k]`` is the time of a mixed step over its parts' sum.

    Attributes:
        chunk_tokens: prompt tokens in the step, all chunks together.
        batch: requests that decode a token.
        ctx_tokens: KV tokens that each of these reads, on average.
        slowdown: above 1 where the parts disturb each other, below 1 where they share work
            (weights are read once for both).
    """

    chunk_tokens: tuple[int, ...]
    batch: tuple[int, ...]
    ctx_tokens: tuple[int, ...]
    slowdown: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self) -> None:
        """Refuse a grid that cannot be interpolated."""
        for name in ("chunk_tokens", "batch", "ctx_tokens"):
            axis = getattr(self, name)
            if not axis or any(later <= earlier for earlier, later in pairwise(axis)):
                raise ValueError(f"mixed.{name} must rise and have at least one value")
        rows, columns = len(self.batch), len(self.ctx_tokens)
        if len(self.slowdown) != len(self.chunk_tokens) or any(
            len(plane) != rows or any(len(row) != columns for row in plane)
            for plane in self.slowdown
        ):
            raise ValueError(
                f"mixed.slowdown must have {len(self.chunk_tokens)} planes of {rows} rows of "
                f"{columns} values"
            )
        if any(not value > 0 for plane in self.slowdown for row in plane for value in row):
            raise ValueError("mixed.slowdown must be positive")

    def at(self, chunk_tokens: float, batch: float, ctx_tokens: float) -> float:
        """Linear in each of the three between cells; beyond the grid, what its edge has."""
        planes = _between(self.chunk_tokens, chunk_tokens)
        rows = _between(self.batch, batch)
        columns = _between(self.ctx_tokens, ctx_tokens)
        return sum(
            in_plane * in_row * in_column * self.slowdown[plane][row][column]
            for plane, in_plane in planes
            for row, in_row in rows
            for column, in_column in columns
        )


def _between(axis: tuple[int, ...], at: float) -> tuple[tuple[int, float], ...]:
    """The cells beside a place and their weights."""
    if at <= axis[0]:
        return ((0, 1.0),)
    if at >= axis[-1]:
        return ((len(axis) - 1, 1.0),)
    i = bisect_right(axis, at) - 1
    share = (at - axis[i]) / (axis[i + 1] - axis[i])
    return ((i, 1.0 - share), (i + 1, share))
