"""A stack of Qwen3 decoder layers on random weights: the arithmetic of a serving step, no more.

RMSNorm, grouped-query attention with a norm for each query and key head, rotary positions, SwiGLU,
final norm, head and greedy choice of the next token. Projections are fused as serving engines fuse
them (query-key-value, gate-up); element-wise operations are torch's own, one kernel each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from attention import Attend, Attention
from kv import Group, KvPool
from shapes import Shape
from torch import Tensor


@dataclass(slots=True)
class Layer:
    """Weights of one decoder layer."""

    input_norm: Tensor
    qkv: Tensor
    q_norm: Tensor
    k_norm: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one forward pass computes.

    Attributes:
        ids: of the new tokens, packed.
        cos, sin: rotary factors of their positions.
        slots: where their KV goes.
        last_rows: of each sequence, the row whose next token is chosen.
        attend: for each group, how many rows it has and its attention.
    """

    ids: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    last_rows: Tensor
    attend: tuple[tuple[int, Attend], ...]


class DecoderStack:
    """The model.

    Args:
        shape: its sizes.
        dtype: of weights and activations.
        generator: random numbers of the device that the weights are on.
    """

    def __init__(self, shape: Shape, *, dtype: torch.dtype, generator: torch.Generator) -> None:
        self.shape, self.dtype, self.device = shape, dtype, torch.device(generator.device)

        def weight(rows: int, columns: int) -> Tensor:
            made = torch.randn(
                (rows, columns), dtype=dtype, device=generator.device, generator=generator
            )
            return made.mul_(columns**-0.5)  # keeps activations near one

        def norm(size: int) -> Tensor:
            made = torch.rand((size,), dtype=dtype, device=generator.device, generator=generator)
            return made.add_(0.5)

        width, hidden = shape.head_dim, shape.hidden
        self.embedding = weight(shape.vocab, hidden)
        self.layers = [
            Layer(
                input_norm=norm(hidden),
                qkv=weight((shape.heads + 2 * shape.kv_heads) * width, hidden),
                q_norm=norm(width),
                k_norm=norm(width),
                out=weight(hidden, shape.heads * width),
                mlp_norm=norm(hidden),
                gate_up=weight(2 * shape.intermediate, hidden),
                down=weight(hidden, shape.intermediate),
            )
            for _ in range(shape.layers)
        ]
        self.norm = norm(hidden)
        self.head = weight(shape.vocab, hidden)

    def batch(
        self,
        group: Group,
        attention: Attention,
        ids: Tensor,
        *,
        split: int | None = None,
    ) -> Batch:
        """Prepare a step.

        Args:
            group: its sequences and where their KV lies.
            attention: the kernels.
            ids: the new tokens, packed, on the model's device.
            split: attention of the first ``split`` sequences is a call of its own; None: one call
                for all.
        """
        shape = self.shape
        groups = [group]
        if split is not None and 0 < split < len(group.sequences):
            groups = [group.of(slice(0, split)), group.of(slice(split, None))]
        positions: list[int] = []
        slots: list[int] = []
        ends, rows = [], 0
        for index, sequence in enumerate(group.sequences):
            positions += range(sequence.prefix_tokens, sequence.kv_tokens)
            slots += group.places(index, sequence.prefix_tokens)
            rows += sequence.new_tokens
            ends.append(rows - 1)
        if len(ids) != rows:
            raise ValueError(f"ids: {len(ids)} for {rows} new tokens")
        half = shape.head_dim // 2
        rates = shape.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.tensor(positions, dtype=torch.float64)[:, None] * rates
        cos, sin = (
            torch.cat((part, part), -1).to(self.device, self.dtype)[:, None]
            for part in (angles.cos(), angles.sin())
        )
        return Batch(
            ids=ids,
            cos=cos,
            sin=sin,
            slots=torch.tensor(slots, device=self.device),
            last_rows=torch.tensor(ends, device=self.device),
            attend=tuple(
                (
                    part.new_tokens,
                    attention.plan(part, shape, self.dtype, self.device),
                )
                for part in groups
            ),
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, pool: KvPool) -> Tensor:
        """Hidden states of the new tokens after the final norm, packed; their KV is in the pool."""
        shape, eps = self.shape, self.shape.norm_eps
        width = shape.head_dim
        q_size, kv_size = shape.heads * width, shape.kv_heads * width
        x = F.embedding(batch.ids, self.embedding)
        for number, layer in enumerate(self.layers):
            normed = F.rms_norm(x, (shape.hidden,), layer.input_norm, eps)
            q, k, v = F.linear(normed, layer.qkv).split((q_size, kv_size, kv_size), -1)
            q = F.rms_norm(q.unflatten(-1, (shape.heads, width)), (width,), layer.q_norm, eps)
            k = F.rms_norm(k.unflatten(-1, (shape.kv_heads, width)), (width,), layer.k_norm, eps)
            q, k = _rotate(q, batch), _rotate(k, batch)
            pool.write(number, batch.slots, k, v.unflatten(-1, (shape.kv_heads, width)))
            attended = self._attend(batch, q, pool.k[number], pool.v[number])
            x = x + F.linear(attended.flatten(1), layer.out)
            normed = F.rms_norm(x, (shape.hidden,), layer.mlp_norm, eps)
            gate, up = F.linear(normed, layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return F.rms_norm(x, (shape.hidden,), self.norm, eps)

    @torch.inference_mode()
    def step(self, batch: Batch, pool: KvPool) -> Tensor:
        """A whole step: the next token of every sequence."""
        hidden = self.forward(batch, pool)
        return F.linear(hidden[batch.last_rows], self.head).argmax(-1)

    @staticmethod
    def _attend(batch: Batch, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(batch.attend) == 1:
            return batch.attend[0][1](q, k, v)
        out, row = torch.empty_like(q), 0
        for rows, attend in batch.attend:
            out[row : row + rows] = attend(q[row : row + rows], k, v)
            row += rows
        return out


def _rotate(x: Tensor, batch: Batch) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * batch.cos + torch.cat((-second, first), -1) * batch.sin
