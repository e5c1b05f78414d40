"""The decoder stack: a mixed forward is its parts, wherever the KV lies, and it is the model."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is in .venv-sglang: make test-hardware")

from attention import Attention, Reference, Sdpa  # noqa: E402 - needs torch
from kv import Group, KvPool, Sequence, lay_out  # noqa: E402
from model import DecoderStack  # noqa: E402
from shapes import SHAPES, Shape  # noqa: E402

TINY = SHAPES["tiny"]
ALIKE = [Sequence(13, 24), *[Sequence(1, 40)] * 3]
UNLIKE = [Sequence(9, 0), Sequence(1, 40), Sequence(1, 7), Sequence(5, 11), Sequence(1, 0)]
PAGES = [None, 1, 8]
KERNELS = [Reference(), Sdpa()]


class World:
    """A model and a pool with random KV, in float64 or float32."""

    def __init__(self, page_tokens: int | None, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(3)
        self.model = DecoderStack(TINY, dtype=dtype, generator=generator)
        self.pool = KvPool(TINY, 400, page_tokens=page_tokens, dtype=dtype, generator=generator)

    def forward(
        self, group: Group, kernels: Attention, ids: torch.Tensor, split: int | None = None
    ) -> torch.Tensor:
        return self.model.forward(self.model.batch(group, kernels, ids, split=split), self.pool)


def ids_for(sequences: list[Sequence]) -> torch.Tensor:
    count = sum(sequence.new_tokens for sequence in sequences)
    return torch.randint(TINY.vocab, (count,), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("page_tokens", PAGES)
@pytest.mark.parametrize("sequences", [ALIKE, UNLIKE], ids=["alike", "unlike"])
@pytest.mark.parametrize("split", [None, 1])
def test_a_mixed_forward_is_its_parts(
    kernels: Attention, page_tokens: int | None, sequences: list[Sequence], split: int | None
) -> None:
    world = World(page_tokens, torch.float32)
    whole = lay_out(world.pool, sequences, seed=1)
    ids = ids_for(sequences)
    mixed = world.forward(whole, kernels, ids, split)
    row = 0
    for index, sequence in enumerate(sequences):
        rows = slice(row, row + sequence.new_tokens)
        alone = world.forward(whole.of(slice(index, index + 1)), kernels, ids[rows])
        torch.testing.assert_close(mixed[rows], alone, rtol=1e-5, atol=2e-5)
        row = rows.stop


@pytest.mark.parametrize("page_tokens", [1, 8])
def test_pages_change_nothing(page_tokens: int) -> None:
    """The same tokens computed from nothing, in pages and in a row, by both kernels."""
    ids = ids_for(UNLIKE)
    seen = []
    for page in (None, page_tokens):
        for kernels in KERNELS:
            world = World(page)
            world.pool = KvPool(  # with its own random KV at the same *tokens*
                TINY, 400, page_tokens=page, dtype=torch.float64, generator=torch.Generator()
            )
            group = lay_out(world.pool, UNLIKE, seed=9)
            for index, sequence in enumerate(UNLIKE):
                places = torch.tensor(group.places(index))
                source = torch.Generator().manual_seed(100 + index)
                size = (sequence.kv_tokens, TINY.kv_heads, TINY.head_dim)
                for pool in (*world.pool.k, *world.pool.v):
                    pool[places] = torch.randn(size, dtype=pool.dtype, generator=source)
            seen.append(world.forward(group, kernels, ids))
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=1e-9, atol=1e-9)


def naive_qwen3(model: DecoderStack, ids: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Qwen3 as its paper and published code have it: no cache, no packing, loops over heads."""
    x = model.embedding[ids]
    length, width = len(ids), shape.head_dim

    def norm(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return values / (values.pow(2).mean(-1, keepdim=True) + shape.norm_eps).sqrt() * weight

    def rotate(head: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(head)
        for position in range(length):
            for i in range(width // 2):
                angle = position * shape.rope_theta ** (-2 * i / width)
                a, b = head[position, i], head[position, i + width // 2]
                out[position, i] = a * math.cos(angle) - b * math.sin(angle)
                out[position, i + width // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    seen = torch.ones(length, length).tril().bool()
    for layer in model.layers:
        h = norm(x, layer.input_norm) @ layer.qkv.T
        heads = h.split(width, -1)
        queries = heads[: shape.heads]
        keys = heads[shape.heads : shape.heads + shape.kv_heads]
        values = heads[shape.heads + shape.kv_heads :]
        keys = [rotate(norm(key, layer.k_norm)) for key in keys]
        outs = []
        for number, query in enumerate(queries):
            of = number * shape.kv_heads // shape.heads
            scores = rotate(norm(query, layer.q_norm)) @ keys[of].T / math.sqrt(width)
            outs.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ values[of])
        x = x + torch.cat(outs, -1) @ layer.out.T
        h = norm(x, layer.mlp_norm)
        gate, up = (h @ layer.gate_up.T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ layer.down.T
    return norm(x, model.norm)


@pytest.mark.parametrize("page_tokens", PAGES)
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.name)
def test_it_is_qwen3_also_in_chunks_and_token_by_token(
    kernels: Attention, page_tokens: int | None
) -> None:
    world = World(page_tokens)
    tokens = 27
    ids = ids_for([Sequence(tokens, 0)])
    right = naive_qwen3(world.model, ids, TINY)
    out, at = [], 0
    for new in (11, 7, 1, 1, 7):  # each chunk finds the KV of those before it
        group = lay_out(world.pool, [Sequence(new, at)], seed=2)
        if page_tokens is not None:  # the same pages, of a sequence that has grown
            whole = lay_out(world.pool, [Sequence(tokens, 0)], seed=2)
            assert whole.pages is not None and group.pages is not None
            assert whole.pages[0][: len(group.pages[0])] == group.pages[0]
        out.append(world.forward(group, kernels, ids[at : at + new]))
        at += new
    assert at == tokens
    torch.testing.assert_close(torch.cat(out), right, rtol=1e-9, atol=1e-9)


def test_a_step_chooses_a_token_for_each_sequence() -> None:
    world = World(None)
    group = lay_out(world.pool, ALIKE, seed=1)
    batch = world.model.batch(group, Reference(), ids_for(ALIKE))
    hidden = world.model.forward(batch, world.pool)
    chosen = world.model.step(batch, world.pool)
    right = [int((hidden[row] @ world.model.head.T).argmax()) for row in (12, 13, 14, 15)]
    assert chosen.tolist() == right


def test_a_step_run_again_gives_the_same() -> None:
    """Steps are timed by running them again and again on the same KV."""
    world = World(8)
    group = lay_out(world.pool, ALIKE, seed=1)
    batch = world.model.batch(group, Sdpa(), ids_for(ALIKE))
    first = world.model.forward(batch, world.pool)
    assert torch.equal(world.model.forward(batch, world.pool), first)


@pytest.mark.parametrize("page_tokens", PAGES)
def test_no_two_tokens_share_a_place(page_tokens: int | None) -> None:
    world = World(page_tokens)
    group = lay_out(world.pool, UNLIKE, seed=5)
    places = [place for i in range(len(UNLIKE)) for place in group.places(i)]
    assert len(set(places)) == len(places) == sum(s.kv_tokens for s in UNLIKE)
    assert max(places) < world.pool.tokens


def test_what_does_not_fit_is_refused() -> None:
    world = World(8)
    with pytest.raises(ValueError, match="408 KV tokens do not fit into a pool of 400"):
        lay_out(world.pool, [Sequence(1, 400)], seed=1)
    with pytest.raises(ValueError, match="are no whole pages of 7"):
        World(7)
    with pytest.raises(ValueError, match="ids: 3 for 1 new tokens"):
        group = lay_out(world.pool, [Sequence(1, 4)], seed=1)
        world.model.batch(group, Reference(), torch.zeros(3, dtype=torch.long))
