"""Attention kernels that are not on every machine, and which of all to use.

`choose` takes the first that works here *and* agrees with `Reference`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import torch
from attention import Attend, Attention, AttentionError, Reference, Sdpa
from kv import Group, KvPool, Sequence, lay_out
from shapes import Shape
from torch import Tensor

#: Relative error of an attention output that is rounding, by dtype.
_TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Packed sequences as FlashAttention is told of them.

    Attributes:
        cu_q, cu_k: where each begins, among new tokens and among all; one more for the end.
        used_k: tokens of each.
        pages: their pages, a row for each, filled up with 0; None: all tokens in a row.
        max_q, max_k: the most of any.
    """

    cu_q: Tensor
    cu_k: Tensor
    used_k: Tensor
    pages: Tensor | None
    max_q: int
    max_k: int


class Varlen:
    """Kernels with FlashAttention's packed interface: torch's own, or the flash-attn package's.

    Args:
        name: for the result file.
        call: ``call(q, k, v, lengths)``; with pages, ``k`` and ``v`` are (pages, page, KV heads,
            head_dim), else the group's own tokens in a row.
        pages: whether pages can be given.
    """

    packs = True

    def __init__(
        self, name: str, call: Callable[[Tensor, Tensor, Tensor, Lengths], Tensor], *, pages: bool
    ) -> None:
        self.name = name
        self._call = call
        self._pages = pages

    def plan(self, group: Group, shape: Shape, dtype: torch.dtype, device: torch.device) -> Attend:
        if group.pages is not None and not self._pages:
            raise AttentionError("takes no pages in this version: use --kv contiguous")
        new = [sequence.new_tokens for sequence in group.sequences]
        kv = [sequence.kv_tokens for sequence in group.sequences]
        table = None
        if group.pages is not None:
            most = max(map(len, group.pages))
            rows = [[*pages, *[0] * (most - len(pages))] for pages in group.pages]
            table = torch.tensor(rows, dtype=torch.int32, device=device)
        lengths = Lengths(
            cu_q=_sums(new, device),
            cu_k=_sums(kv, device),
            used_k=torch.tensor(kv, dtype=torch.int32, device=device),
            pages=table,
            max_q=max(new),
            max_k=max(kv),
        )
        call = self._call
        if table is not None:
            page = (-1, group.page_tokens, shape.kv_heads, shape.head_dim)
            return lambda q, k, v: call(q, k.view(page), v.view(page), lengths)
        mine = slice(group.starts[0], group.starts[0] + sum(kv))
        return lambda q, k, v: call(q, k[mine], v[mine], lengths)


class FlashInfer:
    """FlashInfer's paged kernels: for decode alone its decode kernel, else the prefill one."""

    name = "flashinfer"
    packs = True

    def __init__(self, module: Any = None) -> None:
        if module is None:
            try:
                import flashinfer  # noqa: PLC0415 - not on every machine
            except ImportError as error:
                raise AttentionError("not installed") from error
            module = flashinfer
        self._module = module
        self.name = f"flashinfer {module.__version__}"

    def plan(self, group: Group, shape: Shape, dtype: torch.dtype, device: torch.device) -> Attend:
        if group.pages is None or group.page_tokens is None:
            raise AttentionError("takes only pages here: use --kv paged")
        page = group.page_tokens
        work = torch.empty(128 << 20, dtype=torch.uint8, device=device)
        pages = _sums([len(own) for own in group.pages], device)
        indices = torch.tensor(
            [place for own in group.pages for place in own], dtype=torch.int32, device=device
        )
        last = [(sequence.kv_tokens - 1) % page + 1 for sequence in group.sequences]
        lasts = torch.tensor(last, dtype=torch.int32, device=device)
        heads = (shape.heads, shape.kv_heads, shape.head_dim)
        if all(sequence.new_tokens == 1 for sequence in group.sequences):
            wrapper = self._module.BatchDecodeWithPagedKVCacheWrapper(
                work, "NHD", use_tensor_cores=shape.heads // shape.kv_heads >= 4
            )
            wrapper.plan(pages, indices, lasts, *heads, page, q_data_type=dtype, kv_data_type=dtype)
        else:
            rows = _sums([sequence.new_tokens for sequence in group.sequences], device)
            wrapper = self._module.BatchPrefillWithPagedKVCacheWrapper(work, "NHD")
            wrapper.plan(
                rows,
                pages,
                indices,
                lasts,
                *heads,
                page,
                causal=True,
                q_data_type=dtype,
                kv_data_type=dtype,
            )
        size = (-1, page, shape.kv_heads, shape.head_dim)
        return lambda q, k, v: wrapper.run(q, (k.view(size), v.view(size)))


def _sums(lengths: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def torch_varlen(function: Any = None) -> Varlen:
    """torch's ``varlen_attn`` (2.10 and later; pages where its signature has them).

    Args:
        function: another one of that kind.

    Raises:
        AttentionError: this torch has none.
    """
    if function is None:
        try:
            from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - not in every torch
        except ImportError as error:
            raise AttentionError(f"torch {torch.__version__} has no varlen_attn") from error
        function = varlen_attn
    names = inspect.signature(function).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {}
    if "is_causal" in names:
        causal = {"is_causal": True}
    gqa = {"enable_gqa": True} if "enable_gqa" in names else {}

    def call(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
        # One query sees all of its KV: told so, the kernel takes a group's heads together and
        # splits the KV over the GPU.
        how = causal if lengths.max_q > 1 else {}
        paged = {}
        if lengths.pages is not None:
            paged = {"seqused_k": lengths.used_k, "block_table": lengths.pages}
        return function(
            q, k, v, lengths.cu_q, lengths.cu_k, lengths.max_q, lengths.max_k, **how, **gqa, **paged
        )

    return Varlen(f"torch-varlen {torch.__version__}", call, pages="block_table" in names)


def torch_flash() -> Varlen:
    """The operator below ``varlen_attn``: in torch since 2.2, private, without pages.

    For versions whose ``varlen_attn`` is missing or wants as many KV heads as query heads.
    """

    def call(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
        sizes = (lengths.cu_q, lengths.cu_k, lengths.max_q, lengths.max_k)
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, *sizes, 0.0, lengths.max_q > 1, False
        )[0]
        return out

    return Varlen(f"torch-flash {torch.__version__}", call, pages=False)


def flash_attn() -> Varlen:
    """The flash-attn package.

    Raises:
        AttentionError: it is not installed.
    """
    try:
        import flash_attn as package  # noqa: PLC0415 - not on every machine
    except ImportError as error:
        raise AttentionError("not installed") from error

    def call(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
        return package.flash_attn_varlen_func(
            q,
            k,
            v,
            lengths.cu_q,
            lengths.cu_k,
            lengths.max_q,
            lengths.max_k,
            causal=lengths.max_q > 1,
            block_table=lengths.pages,
        )

    return Varlen(f"flash-attn {package.__version__}", call, pages=True)


#: By preference: what SGLang itself would run first.
KINDS: Final[dict[str, Callable[[], Attention]]] = {
    "flashinfer": FlashInfer,
    "flash-attn": flash_attn,
    "torch-varlen": torch_varlen,
    "torch-flash": torch_flash,
    "torch-sdpa": Sdpa,
    "reference": Reference,
}


def choose(
    wanted: str,
    shape: Shape,
    *,
    page_tokens: int | None,
    dtype: torch.dtype,
    device: torch.device,
    kinds: Mapping[str, Callable[[], Attention]] = KINDS,
) -> tuple[Attention, list[str]]:
    """The kernels to use, tried on a small mixed step first.

    Args:
        wanted: a name of ``kinds``, or ``auto`` for the first that works.
        shape: the model whose heads are tried.
        page_tokens: None for contiguous KV.

    Returns:
        The kernels, and why those before them were passed over.

    Raises:
        AttentionError: none works; the message says why for each.
    """
    names = [name for name in kinds if name != "reference"] if wanted == "auto" else [wanted]
    passed = []
    for name in names:
        try:
            kernels = kinds[name]()
            apart = _disagreement(kernels, shape, page_tokens, dtype, device)
        except Exception as error:  # noqa: BLE001 -- whatever a kernel says is why it is not used
            lines = str(error).strip().splitlines() or [repr(error)]
            passed.append(f"{name}: {lines[0].split('. ')[0][:160]}")
            continue
        if not apart <= _TOLERANCE[dtype]:  # also when it is no number
            passed.append(f"{name}: differs from the reference by {apart:.2g}")
            continue
        return kernels, passed
    raise AttentionError("no attention kernels work here: " + "; ".join(passed))


def _disagreement(
    kernels: Attention,
    shape: Shape,
    page_tokens: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Largest relative error over a prompt on a prefix, decodes, and both in one call."""
    page = page_tokens or 1
    tokens = -(-1400 // page) * page + 6 * page
    generator = torch.Generator(device=device).manual_seed(7)
    one_layer = Shape(
        name="trial",
        layers=1,
        hidden=1,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate=1,
        vocab=1,
    )
    pool = KvPool(one_layer, tokens, page_tokens=page_tokens, dtype=dtype, generator=generator)
    sequences = [Sequence(70, 130), *[Sequence(1, 299)] * 3, Sequence(1, 37)]
    whole = lay_out(pool, sequences, seed=7)
    worst = 0.0
    for group in (whole.of(slice(0, 1)), whole.of(slice(1, None)), whole):
        rows = group.new_tokens
        q = torch.randn(
            (rows, shape.heads, shape.head_dim), dtype=dtype, device=device, generator=generator
        )
        out, right = (
            kind.plan(group, one_layer, dtype, device)(q, pool.k[0], pool.v[0]).double()
            for kind in (kernels, Reference())
        )
        error = float((out - right).norm() / right.norm())
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst
