"""Lets SGLang 0.5.23's hierarchical cache run with ``--device cpu``; an SGLang plug-in.

Replaced is what needs a GPU, and nothing else: pinned host memory becomes plain memory, the kernel
that copies KV pages between device and host becomes an index copy, and idle schedulers wait a few
milliseconds for work instead of spinning (several share two cores here). Scheduler, radix tree,
cache controller and storage stay SGLang's own. Not exercised: device copies, stream ordering.
"""

import hashlib
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Longest wait of an idle scheduler: write-back and prefetch are polled between waits.
IDLE_WAIT_MS = 5


def register() -> None:
    """Called by SGLang in each of its processes before it builds anything."""
    import torch
    from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper
    from sglang.srt.mem_cache.pool_host import common, mha

    def allocate(dims: Any, dtype: Any, device: Any, pin_memory: bool, allocator: Any, *_: Any,
                 **__: Any) -> Any:  # fmt: skip
        return allocator.allocate(dims, dtype=dtype, device="cpu")

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate
    mha.ALLOC_MEMORY_FUNCS["cpu"] = allocate

    def copy_pages(
        src_layers: Any, dst_layers: Any, src_indices: Any, dst_indices: Any, page_size: int
    ) -> None:
        for src, dst in zip(src_layers, dst_layers, strict=True):
            dst[dst_indices.long()] = src[src_indices.long()]

    mha.transfer_kv_direct = copy_pages
    if not hasattr(torch.cpu.Stream, "synchronize"):
        torch.cpu.Stream.synchronize = lambda self: None

    pinned_page = mha.MHATokenToKVPoolHost.get_dummy_flat_data_page

    def plain_page(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.pin_memory = False
        return pinned_page(self, *args, **kwargs)

    mha.MHATokenToKVPoolHost.get_dummy_flat_data_page = plain_page
    IdleSleeper.maybe_sleep = lambda self: self.poller.poll(IDLE_WAIT_MS)
    _hash_without_compiler()


def _hash_without_compiler() -> None:
    """Page hashes in Python where SGLang's C++ for them could not be built (see the Makefile)."""
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "")) / "hicache_hash_cpp"
    if list(built.glob("*.so")):
        return
    from sglang.srt.mem_cache import utils
    from sglang.srt.mem_cache.cpp_utils import native_hash

    def get_hash(token_ids: Any, prior: bytes | None, page_size: int | None = None) -> Any:
        raw, length, width, bigram = native_hash._native_hash_input(token_ids)
        if width != 1 or bigram:
            raise NotImplementedError("page hashes of token pairs need the C++ extension")
        return page_hashes(raw[:length], prior, page_size)

    native_hash.get_native_hash = get_hash
    utils.get_native_hash = get_hash


def page_hashes(ids: Sequence[int], prior: bytes | None, page_size: int | None) -> Any:
    """SHA-256 of each page, chained, as hex; of everything at once without a page size."""
    words = array("I", ids)
    step = page_size or max(len(words), 1)
    digest = prior or b""
    pages = []
    for start in range(0, len(words), step) if page_size else (0,):
        digest = hashlib.sha256(digest + words[start : start + step].tobytes()).digest()
        pages.append(digest.hex())
    return pages if page_size else pages[0]
