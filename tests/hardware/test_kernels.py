"""Kernels that this machine cannot run, told what to do as their documentation wants it.

Stand-ins compute from the arguments what the real ones are documented to compute; that the real
ones do is for `choose` to find out, on the GPU, each time.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is in .venv-sglang: make test-hardware")

from attention import Attention, AttentionError, Reference, Sdpa  # noqa: E402 - needs torch
from kernels import FlashInfer, Lengths, Varlen, choose, torch_varlen  # noqa: E402
from kv import KvPool, Sequence, lay_out  # noqa: E402
from shapes import SHAPES  # noqa: E402

TINY = SHAPES["tiny"]
CPU = torch.device("cpu")
SEQUENCES = [Sequence(9, 14), Sequence(1, 20), Sequence(1, 20), Sequence(1, 3)]


def attend_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal, aligned at the end; (tokens, heads, head_dim)."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    rows = torch.arange(len(q))[:, None] + len(k) - len(q)
    scores = scores.masked_fill(torch.arange(len(k)) > rows, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def documented_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths
) -> torch.Tensor:
    out = []
    for i in range(len(lengths.cu_q) - 1):
        rows = slice(int(lengths.cu_q[i]), int(lengths.cu_q[i + 1]))
        assert rows.stop - rows.start <= lengths.max_q
        used = int(lengths.used_k[i])
        assert used <= lengths.max_k
        if lengths.pages is None:
            own = slice(int(lengths.cu_k[i]), int(lengths.cu_k[i + 1]))
            assert own.stop - own.start == used
            out.append(attend_one(q[rows], k[own], v[own]))
        else:
            assert lengths.pages.dtype == torch.int32
            pages = lengths.pages[i].long()
            keys, values = (pool[pages].flatten(0, 1)[:used] for pool in (k, v))
            out.append(attend_one(q[rows], keys, values))
    return torch.cat(out)


class DocumentedFlashInfer:
    """The part of the module that is used; wrappers remember their plan."""

    __version__ = "0"

    class _Wrapper:
        decode = False

        def __init__(self, work: torch.Tensor, layout: str, **_: Any) -> None:
            assert layout == "NHD" and work.dtype == torch.uint8

        def run(self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            out = []
            for i, last in enumerate(self.last.tolist()):
                begin, end = self.pages[i], self.pages[i + 1]
                own = self.indices[begin:end].long()
                used = (len(own) - 1) * self.page + last
                keys, values = (pool[own].flatten(0, 1)[:used] for pool in kv)
                rows = slice(self.rows[i], self.rows[i + 1])
                out.append(attend_one(q[rows], keys, values))
            return torch.cat(out)

    class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
        def plan(self, *given: Any, **more: Any) -> None:
            indptr, indices, last, qo_heads, kv_heads, head_dim, page_size = given
            assert (qo_heads, kv_heads, head_dim) == (TINY.heads, TINY.kv_heads, TINY.head_dim)
            self.pages, self.indices, self.last, self.page = indptr, indices, last, page_size
            self.rows = list(range(len(last) + 1))

    class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
        def plan(self, *given: Any, causal: bool, **more: Any) -> None:
            rows, indptr, indices, last, qo_heads, kv_heads, head_dim, page_size = given
            assert causal
            assert (qo_heads, kv_heads, head_dim) == (TINY.heads, TINY.kv_heads, TINY.head_dim)
            self.rows, self.pages, self.indices, self.last = rows, indptr, indices, last
            self.page = page_size


def check(kernels: Attention, page_tokens: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    pool = KvPool(TINY, 160, page_tokens=page_tokens, dtype=torch.float64, generator=generator)
    whole = lay_out(pool, SEQUENCES, seed=1)
    for members in (slice(0, 1), slice(1, None), slice(None)):
        group = whole.of(members)
        q = torch.randn(
            (group.new_tokens, TINY.heads, TINY.head_dim), dtype=torch.float64, generator=generator
        )
        out, right = (
            kind.plan(group, TINY, torch.float64, CPU)(q, pool.k[0], pool.v[0])
            for kind in (kernels, Reference())
        )
        torch.testing.assert_close(out, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("page_tokens", [None, 1, 8])
def test_packed_kernels_are_told_where_everything_is(page_tokens: int | None) -> None:
    check(Varlen("stand-in", documented_varlen, pages=True), page_tokens)


@pytest.mark.parametrize("page_tokens", [1, 8])
def test_flashinfer_is_told_where_everything_is(page_tokens: int) -> None:
    check(FlashInfer(DocumentedFlashInfer), page_tokens)


def test_what_a_kernel_cannot_is_said_with_the_option() -> None:
    generator = torch.Generator().manual_seed(1)
    pool = KvPool(TINY, 160, page_tokens=8, dtype=torch.float32, generator=generator)
    group = lay_out(pool, SEQUENCES, seed=1)
    kind = Varlen("no pages", documented_varlen, pages=False)
    with pytest.raises(AttentionError, match="use --kv contiguous"):
        kind.plan(group, TINY, torch.float32, CPU)


@pytest.mark.parametrize("page_tokens", [None, 16])
def test_on_a_cpu_torchs_own_is_chosen_and_the_others_say_why_not(page_tokens: int | None) -> None:
    chosen, passed = choose("auto", TINY, page_tokens=page_tokens, dtype=torch.float32, device=CPU)
    assert isinstance(chosen, Sdpa)
    assert [why.split(":")[0] for why in passed] == [
        "flashinfer",
        "flash-attn",
        "torch-varlen",
        "torch-flash",
    ]


def choose_among(wanted: str, kinds: dict[str, Any]) -> tuple[Attention, list[str]]:
    return choose(wanted, TINY, page_tokens=None, dtype=torch.float32, device=CPU, kinds=kinds)


def test_kernels_that_compute_something_else_are_not_used() -> None:
    def upper_left(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths
    ) -> torch.Tensor:
        """The other convention: a chunk sees its prefix as if it began with the KV."""
        out, at = [], 0
        for i in range(len(lengths.used_k)):
            rows = slice(int(lengths.cu_q[i]), int(lengths.cu_q[i + 1]))
            upto = at + rows.stop - rows.start
            out.append(attend_one(q[rows], k[at:upto], v[at:upto]))
            at = int(lengths.cu_k[i + 1])
        return torch.cat(out)

    kinds = {"flash-attn": lambda: Varlen("wrong", upper_left, pages=True), "torch-sdpa": Sdpa}
    chosen, passed = choose_among("auto", kinds)
    assert isinstance(chosen, Sdpa)
    assert passed[0].startswith("flash-attn: differs from the reference by")
    with pytest.raises(AttentionError, match="no attention kernels work here: flash-attn: differs"):
        choose_among("flash-attn", kinds)


def test_kernels_that_give_no_number_are_not_used() -> None:
    def nothing(q: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.full_like(q, math.nan)

    with pytest.raises(AttentionError, match="differs from the reference by nan"):
        choose_among("nan", {"nan": lambda: Varlen("nan", nothing, pages=True)})


def test_torchs_varlen_is_called_by_its_signature() -> None:
    """Two versions of the function: causal by a flag, and by a window; with and without pages."""
    calls: list[dict[str, Any]] = []

    def as_in_2_10(  # noqa: PLR0917 - torch's signature
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any,
        is_causal: bool = False, return_aux: Any = None,
    ) -> Any:  # fmt: skip
        calls.append({"is_causal": is_causal})
        return q

    old = torch_varlen(as_in_2_10)
    lengths = SimpleNamespace(cu_q=0, cu_k=0, used_k=1, pages=None, max_q=2, max_k=3)
    old._call(torch.zeros(1), None, None, lengths)
    assert calls == [{"is_causal": True}]
    assert not old._pages

    def as_in_2_13(  # noqa: PLR0917 - torch's signature
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, *,
        window_size: Any = (-1, -1), enable_gqa: bool = False, seqused_k: Any = None,
        block_table: Any = None,
    ) -> Any:  # fmt: skip
        calls.append({"window_size": window_size, "gqa": enable_gqa, "pages": block_table})
        return q

    new = torch_varlen(as_in_2_13)
    assert new._pages
    lengths.pages = "table"
    new._call(torch.zeros(1), None, None, lengths)
    assert calls[-1] == {"window_size": (-1, 0), "gqa": True, "pages": "table"}
    lengths.max_q = 1  # decode alone: the kernel need not look for what is hidden
    new._call(torch.zeros(1), None, None, lengths)
    assert calls[-1] == {"window_size": (-1, -1), "gqa": True, "pages": "table"}
