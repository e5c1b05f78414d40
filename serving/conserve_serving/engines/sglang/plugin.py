"""SGLang's side of a conversation: an SGLang plug-in (entry point ``sglang.srt.plugins``).

Four hooks, applied through SGLang's hook registry, idle unless the engine runs our store:

- when a prefill ends whose request names its conversation (``routing_key``), the store is told
  which pages the prompt has; pages that the tree still holds and the store has lost meanwhile are
  stored again, for SGLang itself stores a page once and never looks back;
- when a session is closed, the KV that only this session held leaves the device and the host tier.
  SGLang only takes its protection away and leaves it to be evicted some day;
- what could not leave at once, because a copy was under way, leaves a few steps later;
- the occupancy gauges are published when the engine comes to rest after that.

Everything runs on the scheduler thread, at points where tensor-parallel ranks act in step.
Loaded inside SGLang: standard library, torch and SGLang; written against SGLang 0.5.23.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from conserve_serving.engines.sglang.errors import StoreError

_log = logging.getLogger(__name__)

_TREE: Final = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_REPORTER: Final = (
    "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter"
)


def register() -> None:
    """Register the hooks; called by SGLang in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_TREE}.checkpoint_into_tree", prompt_cached, HookType.AFTER)
    HookRegistry.register(f"{_TREE}.release_radix_session", session_released, HookType.AROUND)
    HookRegistry.register(f"{_TREE}.check_hicache_events", step_taken, HookType.AFTER)
    HookRegistry.register(f"{_REPORTER}._maybe_log_idle_metrics", resting, HookType.BEFORE)


def require_hooks() -> None:
    """Check that SGLang has applied the hooks.

    Raises:
        StoreError: it has not; without them no hand-off would ever be acknowledged.
    """
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    for name in ("checkpoint_into_tree", "release_radix_session", "check_hicache_events"):
        if not hasattr(getattr(UnifiedRadixCache, name, None), "__wrapped__"):
            raise StoreError(
                f"SGLang has not loaded our plug-in 'conserve' ({name} is not hooked): install "
                "conserve-agents in SGLang's environment, and name 'conserve' in SGLANG_PLUGINS "
                "if that is set"
            )


# --- a prompt has been prefilled --------------------------------------------------------------
def prompt_cached(result: object, cache: Any, req: Any, *, up_to: int) -> None:
    """After a request's KV went into the tree: tell the store which pages its prompt has."""
    conversation = req.routing_key
    store = _store(cache)
    if not conversation or store is None or not store.config.stores or not req.finished():
        return
    path = _path(cache, req.last_node)
    keys = [key for node in path for key in node.hash_value or ()]
    keys = keys[: len(req.origin_input_ids) // store.page_tokens]
    _store_again(cache, store, path)
    store.expect(conversation, keys)


def _store_again(cache: Any, store: Any, path: list[Any]) -> None:
    """Store what the host tier holds and the store has lost."""
    import torch

    under_way = {entry[0] for entry in cache.ongoing_backup.values()}
    held = [
        node
        for node in path
        if node.backuped and node.write_through_pending_id is None and node.id not in under_way
    ]
    if not held:
        return
    lost = torch.tensor(
        [store.writes and store.missing(node.hash_value or ()) for node in held], dtype=torch.int
    )
    # Ranks must write in step: what one has lost, all store again.
    cache._all_reduce_attn_groups(lost, torch.distributed.ReduceOp.MAX)
    for node, gone in zip(held, lost.tolist(), strict=True):
        if gone:
            cache.write_backup_storage(node.id)


# --- a session has been closed ----------------------------------------------------------------
class _Leaving:
    """KV of closed sessions that has not left yet: the lowest node of each path."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.changed = False


def session_released(original: Callable[..., Any], cache: Any, session_id: str) -> Any:
    """Around the release of a session: let its KV leave the device and the host tier."""
    store = _store(cache)
    if store is None:
        return original(cache, session_id)
    leaves = _session_leaves(cache, session_id)
    result = original(cache, session_id)
    leaving = _leaving(cache)
    leaving.nodes += leaves
    _let_leave(cache, leaving)
    store.release(session_id)
    return result


def step_taken(result: object, cache: Any) -> None:
    """After a scheduler step: try again what could not leave before."""
    leaving = getattr(cache, "_conserve_leaving", None)
    if leaving is not None and leaving.nodes:
        _let_leave(cache, leaving)


def resting(reporter: Any) -> None:
    """Before the engine may publish its gauges at rest: see that it does, when KV has left."""
    leaving = getattr(reporter.scheduler.tree_cache, "_conserve_leaving", None)
    if leaving is not None and leaving.changed and reporter.current_scheduler_metrics_enabled:
        leaving.changed = False
        reporter.metrics_collector.last_log_time = 0.0


def _let_leave(cache: Any, leaving: _Leaving) -> None:
    stuck = [_evict_upwards(cache, node, leaving) for node in leaving.nodes]
    leaving.nodes = [node for node in stuck if node is not None]


def _evict_upwards(cache: Any, node: Any, leaving: _Leaving) -> Any | None:
    """Evict a node and those above it that nobody needs; the first that is still in use."""
    core = cache.tree_core
    tracker = dict.fromkeys(cache.tree_components, 0)
    while node is not None and node.parent is not None and node.id in core._node_arena:
        if _full(node).session_ref > 0 or node.children:
            return None  # another conversation goes on from here
        parent = node.parent
        if not node.evicted:
            if node not in core.evictable_device_leaves:
                return node
            cache._evict_device_leaf(node.id, tracker)
            leaving.changed = True
        if node.backuped:
            if node not in core.evictable_host_leaves:
                return node
            _evict_host_leaf(cache, node)
        node = parent
    return None


def _evict_host_leaf(cache: Any, node: Any) -> None:
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import DriveHostEvictionResult

    result = DriveHostEvictionResult()
    cache.tree_core._evict_host_leaf(
        node, result.tracker, result.device_frees, result.host_frees, result.cache_actions
    )
    cache._apply_eviction_result(result)


# --- SGLang's objects -------------------------------------------------------------------------
def _store(cache: Any) -> Any | None:
    """Our store, if this cache's engine runs it."""
    controller = getattr(cache, "cache_controller", None)
    backend = getattr(controller, "storage_backend", None)
    backend = getattr(backend, "_backend", backend)  # SGLang's failure injector wraps it in tests
    return backend if hasattr(backend, "expect") and hasattr(backend, "release") else None


def _leaving(cache: Any) -> _Leaving:
    leaving = getattr(cache, "_conserve_leaving", None)
    if leaving is None:
        leaving = cache._conserve_leaving = _Leaving()
    return leaving


def _path(cache: Any, node_id: Any) -> list[Any]:
    """Nodes from the first page's down to ``node_id``'s."""
    node = cache.tree_core.node_by_id(node_id)
    path = []
    while node is not None and node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def _full(node: Any) -> Any:
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import BASE_COMPONENT_TYPE

    return node.component_data[BASE_COMPONENT_TYPE]


def _session_leaves(cache: Any, session_id: str) -> list[Any]:
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import BASE_COMPONENT_TYPE

    component = cache.components[BASE_COMPONENT_TYPE]
    return list(component._session_leaves.get(session_id, ()))
