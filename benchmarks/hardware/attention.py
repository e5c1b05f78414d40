"""Attention over packed sequences with cached KV, by whatever kernels this machine has.

Each class turns a `Group` into a call ``attend(q, k, v)``: ``q`` holds the new tokens' queries,
packed (rows, heads, head_dim); ``k`` and ``v`` are one layer of the pool (tokens, KV heads,
head_dim), in which the new tokens are already. Causal, aligned at the end: the last new token of a
sequence sees all of it. Kernels that are not everywhere, and the choice: `kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from kv import Group
from shapes import Shape
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Relative error of an attention output that is rounding, by dtype.
_TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class AttentionError(Exception):
    """A kernel is not there, or not for this layout."""


class Attention(Protocol):
    """One way to compute attention.

    Attributes:
        name: for the result file.
        packs: one call computes prefill and decode sequences together, as SGLang's mixed chunks
            do; otherwise they are separate calls of one forward pass.
    """

    name: str
    packs: bool

    def plan(self, group: Group, shape: Shape, dtype: torch.dtype, device: torch.device) -> Attend:
        """Prepare what the kernels need to know of these sequences.

        Raises:
            AttentionError: this layout is beyond them.
        """
        ...


class Reference:
    """Written out, at least in float32, one sequence at a time: what others must agree to."""

    name = "reference"
    packs = True

    def plan(self, group: Group, shape: Shape, dtype: torch.dtype, device: torch.device) -> Attend:
        places = [
            torch.tensor(group.places(index), device=device)
            for index in range(len(group.sequences))
        ]
        wide = torch.promote_types(dtype, torch.float32)
        repeat = shape.heads // shape.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, row = [], 0
            for sequence, slots in zip(group.sequences, places, strict=True):
                new = sequence.new_tokens
                mine = q[row : row + new].to(wide).transpose(0, 1)
                keys = k[slots].to(wide).repeat_interleave(repeat, 1).permute(1, 2, 0)
                values = v[slots].to(wide).repeat_interleave(repeat, 1).transpose(0, 1)
                scores = mine @ keys / math.sqrt(shape.head_dim)
                hidden = torch.ones_like(scores[0], dtype=torch.bool)
                hidden = hidden.triu(sequence.prefix_tokens + 1)
                weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
                out.append((weights @ values).transpose(0, 1).to(q.dtype))
                row += new
            return torch.cat(out)

        return attend


class Sdpa:
    """torch's ``scaled_dot_product_attention``: anywhere; a call for each prompt, one for decode.

    Decode is one call where the contexts are equal. KV in pages is gathered first, which costs
    a copy that no serving engine makes: contiguous KV is what this one is for.
    """

    name = "torch-sdpa"
    packs = False

    def plan(self, group: Group, shape: Shape, dtype: torch.dtype, device: torch.device) -> Attend:
        parts, at = [], 0
        while at < len(group.sequences):
            upto = at + 1
            if group.sequences[at].new_tokens == 1:  # as many decodes as are alike
                while upto < len(group.sequences) and group.sequences[upto] == group.sequences[at]:
                    upto += 1
            parts.append(self._part(group.of(slice(at, upto)), shape, device))
            at = upto

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, row = [], 0
            for rows, part in parts:
                out.append(part(q[row : row + rows], k, v))
                row += rows
            return out[0] if len(out) == 1 else torch.cat(out)

        return attend

    def _part(self, group: Group, shape: Shape, device: torch.device) -> tuple[int, Attend]:
        count, sequence = len(group.sequences), group.sequences[0]
        new, kv = sequence.new_tokens, sequence.kv_tokens
        size = (count, kv, shape.kv_heads, shape.head_dim)
        places = None
        if group.pages is not None:
            places = torch.tensor(
                [place for index in range(count) for place in group.places(index)], device=device
            )
        mask: Any = None
        if new > 1 and sequence.prefix_tokens:
            from torch.nn.attention.bias import causal_lower_right  # noqa: PLC0415 - CUDA's fast path

            mask = causal_lower_right(new, kv)
        first = group.starts[0]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            def mine(pool: Tensor) -> Tensor:
                flat = pool[first : first + count * kv] if places is None else pool[places]
                return flat.view(size).transpose(1, 2)

            out = F.scaled_dot_product_attention(
                q.view(count, new, shape.heads, shape.head_dim).transpose(1, 2),
                mine(k),
                mine(v),
                attn_mask=mask,
                is_causal=new > 1 and mask is None,
                enable_gqa=True,
            )
            return out.transpose(1, 2).reshape(count * new, shape.heads, shape.head_dim)

        return count * new, attend
