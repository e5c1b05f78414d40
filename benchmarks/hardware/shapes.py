"""Sizes of the models whose layers are built, from their published ``config.json``. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Qwen3 decoder, or one tensor-parallel rank of it.

    Attributes:
        name: the model, with ``/tpN`` for one of ``N`` ranks.
        layers, hidden, intermediate, vocab: sizes; the last two are this rank's.
        heads, kv_heads, head_dim: attention heads for queries and for keys, this rank's.
        rope_theta, norm_eps: constants of the position and norm layers.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6

    @property
    def weights(self) -> int:
        """Parameters of the layers, the embedding and the head."""
        width = self.head_dim
        attention = self.hidden * width * (2 * self.heads + 2 * self.kv_heads) + 2 * width
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + self.hidden + 2 * self.vocab * self.hidden

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def shard(self, tensor_parallel: int) -> Shape:
        """What one of ``tensor_parallel`` ranks computes; their communication is not included.

        Raises:
            ValueError: the heads cannot be divided so.
        """
        if tensor_parallel == 1:
            return self
        if tensor_parallel < 1 or self.kv_heads % tensor_parallel:
            raise ValueError(
                f"--tensor-parallel {tensor_parallel}: {self.name} has {self.kv_heads} KV heads, "
                "choose a divisor of that"
            )
        return replace(
            self,
            name=f"{self.name}/tp{tensor_parallel}",
            heads=self.heads // tensor_parallel,
            kv_heads=self.kv_heads // tensor_parallel,
            intermediate=self.intermediate // tensor_parallel,
            vocab=-(-self.vocab // tensor_parallel),
        )


_QWEN3: Final = {"kv_heads": 8, "head_dim": 128, "vocab": 151_936}

SHAPES: Final = {
    shape.name: shape
    for shape in (
        Shape(
            name="tiny",
            layers=2,
            hidden=64,
            heads=4,
            kv_heads=2,
            head_dim=16,
            intermediate=128,
            vocab=256,
        ),
        Shape(
            name="qwen3-0.6b",
            layers=28,
            hidden=1024,
            heads=16,
            intermediate=3072,
            **_QWEN3,
        ),
        Shape(name="qwen3-8b", layers=36, hidden=4096, heads=32, intermediate=12_288, **_QWEN3),
        Shape(name="qwen3-32b", layers=64, hidden=5120, heads=64, intermediate=25_600, **_QWEN3),
    )
}
