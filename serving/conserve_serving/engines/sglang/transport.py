"""What carries pages between engines: files of our own, or one of SGLang's RDMA back ends.

Loaded inside SGLang: the standard library, torch and SGLang.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig
from sglang.srt.mem_cache.storage import StorageBackendFactory

from conserve_serving.engines.sglang.errors import StoreError
from conserve_serving.engines.sglang.files import PageFiles
from conserve_serving.engines.sglang.layout import Layout
from conserve_serving.engines.sglang.store_config import StoreConfig

_log = logging.getLogger(__name__)


class Transport(Protocol):
    """Pages in and out of the host pool, and the shelf's duties (see ``desk.Shelf``)."""

    def count_present(self, keys: Sequence[str], extra_info: Any) -> int:
        """How many pages, from the first on without a gap, are stored."""

    def get_pages(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any
    ) -> list[bool]:
        """Copy pages into the host pool; which of them arrived."""

    def set_pages(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any
    ) -> list[bool]:
        """Store pages out of the host pool; which of them were taken."""

    def register_pool(self, pool: Any, name: Any) -> None:
        """A further pool of a hybrid model."""

    def has(self, key: str) -> bool:
        """Whether a page is stored."""

    def claim(self, conversation: str, keys: Sequence[str]) -> list[str]:
        """Keep pages for a conversation; the keys that are not there."""

    def release(self, conversation: str) -> int:
        """Forget a conversation; pages removed."""

    def collect(self) -> object:
        """Remove what is too old."""

    def clear(self) -> None:
        """Remove everything."""

    def close(self) -> None:
        """Let go of connections."""


def open_transport(
    config: StoreConfig, storage: HiCacheStorageConfig, layout: Layout, pool: Any
) -> Transport:
    """The transport that the settings name.

    Raises:
        StoreError: it cannot be used.
        LayoutMismatchError: the folder holds pages of another layout.
    """
    if config.transport == "file":
        return FileTransport(config, storage, layout, pool)
    return SglangTransport(config, storage, layout, pool)


class FileTransport:
    """Pages as files in a folder that all engines share; works wherever a file system does."""

    def __init__(
        self, config: StoreConfig, storage: HiCacheStorageConfig, layout: Layout, pool: Any
    ) -> None:
        model = layout.model.strip("/").replace("/", "--") or "model"
        folder = Path(config.path) / model
        shard = "all" if storage.is_mla_model else f"t{storage.tp_rank}"
        if storage.pp_size > 1:
            shard += f"p{storage.pp_rank}"
        try:
            self._files = PageFiles(
                folder,
                shard=shard,
                max_bytes=config.max_bytes,
                max_age_s=config.max_age_s,
                unclaimed_age_s=config.unclaimed_age_s,
                grace_s=config.grace_s,
                clock=time.time,
            )
        except OSError as error:
            raise StoreError(
                f"cannot use the folder {folder}: {error.strerror}: give one that every engine "
                "may write to"
            ) from error
        layout.check_stamp(folder)
        self._pool = pool
        self.has = self._files.has
        self.claim = self._files.claim
        self.release = self._files.release
        self.collect = self._files.collect
        self.clear = self._files.clear

    def count_present(self, keys: Sequence[str], extra_info: Any) -> int:
        """See :class:`Transport`."""
        return self._files.count_present(keys)

    def get_pages(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any
    ) -> list[bool]:
        """See :class:`Transport`."""
        page = self._pool.get_dummy_flat_data_page()
        target = memoryview(page.view(torch.uint8).numpy())
        step = self._pool.page_size
        for done, key in enumerate(keys):
            if not self._files.read_into(key, target):
                return [True] * done + [False] * (len(keys) - done)
            self._pool.set_from_flat_data_page(int(host_indices[done * step]), page)
        return [True] * len(keys)

    def set_pages(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any
    ) -> list[bool]:
        """See :class:`Transport`."""
        step = self._pool.page_size
        for done, key in enumerate(keys):
            page = self._pool.get_data_page(int(host_indices[done * step]), flat=True)
            data = memoryview(page.contiguous().view(torch.uint8).numpy())
            if not self._files.put(key, data):
                return [True] * done + [False] * (len(keys) - done)
        return [True] * len(keys)

    def register_pool(self, pool: Any, name: Any) -> None:
        """See :class:`Transport`.

        Raises:
            StoreError: always: files carry the KV of ordinary attention only.
        """
        raise StoreError(
            f"this model keeps a second cache ({name}) beside its KV, which the file transport "
            "does not carry: use transport 'mooncake', or a model with ordinary attention"
        )

    def close(self) -> None:
        """See :class:`Transport`."""


class SglangTransport:
    """One of SGLang's own back ends (Mooncake store, NIXL), with the layout in its keys.

    These back ends remove pages by rules of their own (Mooncake's leases and watermarks, NIXL's
    cleaner), so a conversation's end removes nothing here.
    """

    def __init__(
        self, config: StoreConfig, storage: HiCacheStorageConfig, layout: Layout, pool: Any
    ) -> None:
        # Their keys hold the model's name: another layout is then another model, and is not found.
        tagged = dataclasses.replace(storage, model_name=f"{layout.model}-{layout.digest()}")
        self._name = config.transport
        self._backend: HiCacheStorage = StorageBackendFactory.create_backend(
            config.transport, tagged, pool
        )
        self._backend.register_mem_pool_host(pool)

    def count_present(self, keys: Sequence[str], extra_info: Any) -> int:
        """See :class:`Transport`."""
        return int(self._backend.batch_exists(list(keys), extra_info))

    def get_pages(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any
    ) -> list[bool]:
        """See :class:`Transport`."""
        return list(self._backend.batch_get_v1(list(keys), host_indices, extra_info))

    def set_pages(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any
    ) -> list[bool]:
        """See :class:`Transport`."""
        return list(self._backend.batch_set_v1(list(keys), host_indices, extra_info))

    def register_pool(self, pool: Any, name: Any) -> None:
        """See :class:`Transport`."""
        self._backend.register_mem_host_pool_v2(pool, name)

    def hybrid(self) -> HiCacheStorage:
        """The back end, for the calls that concern further pools of hybrid models."""
        return self._backend

    def has(self, key: str) -> bool:
        """See :class:`Transport`."""
        return bool(self._backend.batch_exists([key]) == 1)

    def claim(self, conversation: str, keys: Sequence[str]) -> list[str]:
        """See :class:`Transport`. Only looks: the back end has its own leases."""
        return list(keys[self.count_present(keys, None) :])

    def release(self, conversation: str) -> int:
        """See :class:`Transport`. Left to the back end's own eviction."""
        return 0

    def collect(self) -> None:
        """See :class:`Transport`. Left to the back end."""

    def clear(self) -> None:
        """See :class:`Transport`."""
        self._backend.clear()

    def close(self) -> None:
        """See :class:`Transport`."""
        close = getattr(self._backend, "close", None)
        if close is not None:
            close()
