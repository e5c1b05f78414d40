"""Where the KV of a step's sequences lies: one after the other, or in scattered pages."""

from __future__ import annotations

import random
from collections.abc import Sequence as Several
from dataclasses import dataclass
from itertools import accumulate

import torch
from shapes import Shape
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sequence:
    """One request in a step: ``new_tokens`` are computed after ``prefix_tokens`` of cached KV."""

    new_tokens: int
    prefix_tokens: int

    @property
    def kv_tokens(self) -> int:
        """Tokens that the last of the new ones attends to, itself included."""
        return self.new_tokens + self.prefix_tokens


class KvPool:
    """Keys and values of all layers, filled with random numbers as if prefixes were cached.

    Args:
        shape: the model.
        tokens: how many it holds.
        page_tokens: size of a page, a divisor of ``tokens``; None: no pages.
        generator: random numbers of the device that the pool is on.
    """

    def __init__(
        self,
        shape: Shape,
        tokens: int,
        *,
        page_tokens: int | None,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        if page_tokens is not None and tokens % page_tokens:
            raise ValueError(f"{tokens} tokens are no whole pages of {page_tokens}")
        self.tokens = tokens
        self.page_tokens = page_tokens
        size = (tokens, shape.kv_heads, shape.head_dim)
        self.k, self.v = (
            [
                torch.randn(size, dtype=dtype, device=generator.device, generator=generator)
                for _ in range(shape.layers)
            ]
            for _ in range(2)
        )

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store what a step computed."""
        self.k[layer].index_copy_(0, slots, k)
        self.v[layer].index_copy_(0, slots, v)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Sequences whose attention is one call.

    Attributes:
        sequences: in the order of their rows in the step.
        starts: of each, the pool's place of its first token; without pages the others follow.
        pages: of each, its pages; None without pages.
        page_tokens: size of a page.
    """

    sequences: tuple[Sequence, ...]
    starts: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...] | None = None
    page_tokens: int | None = None

    @property
    def new_tokens(self) -> int:
        """Rows of the step."""
        return sum(sequence.new_tokens for sequence in self.sequences)

    def of(self, members: slice) -> Group:
        """Some of them."""
        return Group(
            sequences=self.sequences[members],
            starts=self.starts[members],
            pages=None if self.pages is None else self.pages[members],
            page_tokens=self.page_tokens,
        )

    def places(self, index: int, first: int = 0) -> Several[int]:
        """The pool's places of a sequence's tokens, from its token ``first`` on."""
        upto = self.sequences[index].kv_tokens
        if self.pages is None or self.page_tokens is None:
            return range(self.starts[index] + first, self.starts[index] + upto)
        pages, page = self.pages[index], self.page_tokens
        return [pages[at // page] * page + at % page for at in range(first, upto)]


def kv_tokens_needed(sequences: Several[Sequence], page_tokens: int | None) -> int:
    """Room that these sequences take in a pool."""
    if page_tokens is None:
        return sum(sequence.kv_tokens for sequence in sequences)
    return sum(-(-sequence.kv_tokens // page_tokens) * page_tokens for sequence in sequences)


def lay_out(pool: KvPool, sequences: Several[Sequence], *, seed: int) -> Group:
    """Give sequences their places in the pool; with pages, in an order drawn by ``seed``.

    Raises:
        ValueError: they do not fit.
    """
    needed = kv_tokens_needed(sequences, pool.page_tokens)
    if needed > pool.tokens:
        raise ValueError(f"{needed} KV tokens do not fit into a pool of {pool.tokens}")
    page = pool.page_tokens
    if page is None:
        starts = accumulate((sequence.kv_tokens for sequence in sequences[:-1]), initial=0)
        return Group(sequences=tuple(sequences), starts=tuple(starts))
    free = list(range(pool.tokens // page))
    random.Random(seed).shuffle(free)  # noqa: S311 - a layout, not a secret
    pages = [
        tuple(free.pop() for _ in range(-(-sequence.kv_tokens // page))) for sequence in sequences
    ]
    return Group(
        sequences=tuple(sequences),
        starts=tuple(own[0] * page for own in pages),
        pages=tuple(pages),
        page_tokens=page,
    )
