"""The hand-off store: SGLang's ``dynamic`` storage back end that ConServe's protocol stands on.

SGLang's reply to a prefill comes before its pages are stored. On a prefiller this class therefore
tells the gateway when *every* page of a prompt can be read (:mod:`desk`), keeps the pages for as
long as their conversation lasts (:mod:`files`) and stores again what was removed meanwhile
(:mod:`plugin`). On a decoder it reads, and storing is a successful no-op: what a conversation
computes there stays there.

SGLang loads it by name::

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{
      "backend_name": "conserve", "module_path": "conserve_serving.engines.sglang.store",
      "class_name": "HandoffStore", "interface_v1": 1, "role": "prefill", "engine": "p0",
      "ack_url": "http://GATEWAY/conserve/v1/handoffs", "path": "/SHARED/FOLDER"}'

Loaded inside SGLang: the standard library, torch and SGLang; written against SGLang 0.5.23.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig

from conserve_serving.engines.sglang import plugin
from conserve_serving.engines.sglang.desk import Desk
from conserve_serving.engines.sglang.errors import StoreConfigError, StoreError
from conserve_serving.engines.sglang.expectations import STORE_FULL
from conserve_serving.engines.sglang.layout import Layout
from conserve_serving.engines.sglang.poster import Poster
from conserve_serving.engines.sglang.store_config import parse
from conserve_serving.engines.sglang.transport import SglangTransport, Transport, open_transport

_log = logging.getLogger(__name__)


class HandoffStore(HiCacheStorage):
    """See the module. One object in each rank's scheduler process.

    Args:
        storage_config: SGLang's description of this rank; ``extra_config`` holds our settings.
        kwargs: of the factory; unused.

    Raises:
        StoreConfigError: a setting is missing or impossible.
        StoreError: SGLang did not load our plug-in, or runs this rank in a way we cannot serve.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: object = None) -> None:
        extra = storage_config.extra_config or {}
        self.config = parse(extra)
        if not extra.get("interface_v1"):
            raise StoreConfigError("interface_v1 is missing: set it to 1")
        if storage_config.attn_cp_size > 1 or storage_config.dcp_size > 1:
            raise StoreError("context parallelism is not supported: start without it")
        plugin.require_hooks()
        self._storage = storage_config
        self._writes = self.config.stores and storage_config.is_storage_writer
        self._transport: Transport | None = None
        self._desk: Desk | None = None
        self._poster: Poster | None = None
        self.page_tokens = 0

    # --- set-up, by SGLang ---------------------------------------------------------------------
    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the host pool; now the layout is known, and the transport opens.

        Raises:
            LayoutMismatchError: other engines' pages have another layout.
            StoreError: the transport cannot be used.
        """
        super().register_mem_pool_host(mem_pool_host)
        if self._desk is not None:  # SGLang attaches anew after a detach
            self.close()
        storage, config = self._storage, self.config
        layout = _layout(storage, mem_pool_host)
        self.page_tokens = layout.page_tokens
        self._transport = open_transport(config, storage, layout, mem_pool_host)
        ranks = 1 if storage.is_mla_model else storage.tp_size
        rank = 0 if storage.is_mla_model else storage.tp_rank
        if self._writes:
            self._poster = Poster(config.ack_url)
        first = storage.tp_rank == 0 and storage.pp_rank == 0
        self._desk = Desk(
            self._transport,
            tell=self._poster.send if self._poster is not None else None,
            engine=config.engine,
            page_tokens=layout.page_tokens,
            rank=storage.pp_rank * ranks + rank,
            ranks=storage.pp_size * ranks,
            expect_timeout_s=config.expect_timeout_s,
            collect_interval_s=config.collect_interval_s if self._writes and first else None,
            clock=time.monotonic,
        )
        _log.info("ConServe hand-off store: %s, %s, %s", config.role, config.transport, layout)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Take a further pool, of a hybrid model."""
        if str(host_pool_name) != "kv":
            self._ready().register_pool(host_pool, host_pool_name)

    # --- pages, by SGLang's storage threads ------------------------------------------------------
    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many pages, from the first on without a gap, are stored."""
        return self._ready().count_present(keys, extra_info)

    def exists(self, key: str) -> bool:
        """Whether a page is stored."""
        return self._ready().has(key)

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Load pages into the host pool."""
        return self._ready().get_pages(keys, host_indices, extra_info)

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Store pages; where this engine does not store, say that it is done."""
        if not self._writes:
            return [True] * len(keys)
        try:
            taken = self._ready().set_pages(keys, host_indices, extra_info)
        except (OSError, RuntimeError) as error:  # the file system's trouble, or a back end's
            _log.error("ConServe hand-off store: %s", error)
            taken = [False] * len(keys)
        self._tell_desk(keys, taken)
        return taken

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None
    ) -> Any:
        """For hybrid models, whose further pools only SGLang's own back ends carry."""
        return self._hybrid().batch_exists_v2(keys, pool_transfers, extra_info)

    def batch_get_v2(self, transfers: Any, extra_info: Any = None) -> Any:
        """See `batch_exists_v2`."""
        return self._hybrid().batch_get_v2(transfers, extra_info)

    def batch_set_v2(self, transfers: Any, extra_info: Any = None) -> Any:
        """See `batch_exists_v2`."""
        if not self._writes:
            return {transfer.name: [True] * len(transfer.keys or ()) for transfer in transfers}
        return self._hybrid().batch_set_v2(transfers, extra_info)

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """SGLang's older interface, which ``interface_v1`` replaces."""
        raise NotImplementedError("interface_v1 is set: SGLang calls batch_get_v1")

    def batch_get(self, keys: Any, target_locations: Any = None, target_sizes: Any = None) -> Any:
        """SGLang's older interface, which ``interface_v1`` replaces."""
        raise NotImplementedError("interface_v1 is set: SGLang calls batch_get_v1")

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        """SGLang's older interface, which ``interface_v1`` replaces."""
        raise NotImplementedError("interface_v1 is set: SGLang calls batch_set_v1")

    def batch_set(
        self, keys: Any, values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """SGLang's older interface, which ``interface_v1`` replaces."""
        raise NotImplementedError("interface_v1 is set: SGLang calls batch_set_v1")

    def clear(self) -> None:
        """Remove every page, by SGLang's admin call."""
        self._ready().clear()

    def close(self) -> None:
        """Let go of threads and connections."""
        if self._desk is not None:
            self._desk.close()
        if self._poster is not None:
            self._poster.close()
        if self._transport is not None:
            self._transport.close()
        self._desk = self._poster = self._transport = None

    # --- conversations, by the plug-in, on SGLang's scheduler thread ------------------------------
    @property
    def writes(self) -> bool:
        """Whether this rank stores pages."""
        return self._writes

    def missing(self, keys: Sequence[str]) -> bool:
        """Whether one of these pages is not stored."""
        return self._ready().count_present(keys, None) < len(keys)

    def expect(self, conversation: str, keys: Sequence[str]) -> None:
        """A prompt has been prefilled: keep its pages, and say when they are there."""
        if self._writes and self._desk is not None and keys:
            self._desk.expect(conversation, keys)

    def release(self, conversation: str) -> None:
        """A conversation is over: its pages may go."""
        if self._desk is not None:
            self._desk.release(conversation)

    # --- inside --------------------------------------------------------------------------------
    def _tell_desk(self, keys: Sequence[str], taken: Sequence[bool]) -> None:
        if self._desk is None:
            return
        written = [key for key, ok in zip(keys, taken, strict=True) if ok]
        refused = [key for key, ok in zip(keys, taken, strict=True) if not ok]
        if written:
            self._desk.written(written)
        if refused:
            self._desk.failed(refused, STORE_FULL)

    def _ready(self) -> Transport:
        if self._transport is None:
            raise StoreError("used before SGLang registered its host pool")
        return self._transport

    def _hybrid(self) -> HiCacheStorage:
        transport = self._ready()
        if not isinstance(transport, SglangTransport):
            raise StoreError("hybrid models need transport 'mooncake'")
        return transport.hybrid()


def _layout(storage: HiCacheStorageConfig, pool: Any) -> Layout:
    page = pool.get_dummy_flat_data_page()
    return Layout(
        model=storage.model_name or "model",
        page_tokens=int(pool.page_size),
        dtype=str(pool.dtype).removeprefix("torch."),
        memory_layout=str(pool.layout),
        tp_size=1 if storage.is_mla_model else storage.tp_size,
        pp_size=storage.pp_size,
        page_bytes=page.numel() * page.element_size(),
    )
