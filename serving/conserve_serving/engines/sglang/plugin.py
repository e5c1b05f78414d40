"""SGLang's side of a conversation: an SGLang plug-in (entry point ``sglang.srt.plugins``).

Hooks, applied through SGLang's hook registry, idle unless the engine runs our store:

- when a prefill ends whose request names its conversation (``routing_key``), the store is told
  which pages the prompt has; pages that the tree still holds and the store has lost meanwhile are
  stored again, for SGLang itself stores a page once and never looks back;
- a request keeps its session from timing out: SGLang counts from the opening, and would take the
  protection of every conversation away that lasts longer;
- what a request leaves in the tree is its session's, also when it was aborted, and goes with it,
  also when the request ends after its session;
- when a session is closed with a mark (:mod:`marks`), the KV that only this session held leaves the
  device and the host tier, or its pages the store. SGLang itself only takes the protection away;
- what could not leave at once, because a copy was under way, leaves a few steps later;
- the occupancy gauges are published when the engine comes to rest after that.

One more is for every engine: prompts with token ids outside the vocabulary are refused, for the
scheduler dies of them, and a gateway that retries would take such a prompt to the next engine.

All but the last run on the scheduler thread, where tensor-parallel ranks act in step.
Loaded inside SGLang: standard library, torch and SGLang; written against SGLang 0.5.23.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from conserve_serving.engines.sglang import marks
from conserve_serving.engines.sglang.errors import StoreError

_log = logging.getLogger(__name__)

_TREE: Final = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_SCHEDULER: Final = "sglang.srt.managers.scheduler.Scheduler"
_TOKENIZER: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_REPORTER: Final = (
    "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter"
)
#: Sessions closed lately whose KV may still be freed; SGLang remembers as many.
_MOST_CLOSED: Final = 8192


def register() -> None:
    """Register the hooks; called by SGLang in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_TREE}.checkpoint_into_tree", prompt_cached, HookType.AFTER)
    HookRegistry.register(f"{_SCHEDULER}.handle_generate_request", session_used, HookType.BEFORE)
    HookRegistry.register(f"{_TREE}.on_release", request_over, HookType.AFTER)
    HookRegistry.register(f"{_SCHEDULER}.close_session", session_closed, HookType.AROUND)
    HookRegistry.register(f"{_TREE}.release_radix_session", session_let_go, HookType.BEFORE)
    HookRegistry.register(f"{_TREE}.check_hicache_events", step_taken, HookType.AFTER)
    HookRegistry.register(f"{_REPORTER}._maybe_log_idle_metrics", resting, HookType.BEFORE)
    HookRegistry.register(f"{_TOKENIZER}._validate_one_request", check_ids, HookType.BEFORE)


def require_hooks() -> None:
    """Check that SGLang has applied the hooks.

    Raises:
        StoreError: it has not; without them no hand-off would ever be acknowledged.
    """
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    for name in ("checkpoint_into_tree", "check_hicache_events"):
        if not hasattr(getattr(UnifiedRadixCache, name, None), "__wrapped__"):
            raise StoreError(
                f"SGLang has not loaded our plug-in 'conserve' ({name} is not hooked): install "
                "conserve-agents in SGLang's environment, and name 'conserve' in SGLANG_PLUGINS "
                "if that is set"
            )


def _harmless(hook: Callable[..., None]) -> Callable[..., None]:
    """A fault of ours may cost a hand-off or some KV that stays; it must not end the engine."""

    @functools.wraps(hook)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            hook(*args, **kwargs)
        except Exception:  # noqa: BLE001 - see above; SGLang's scheduler dies of what escapes here
            _log.exception("ConServe plug-in: %s failed", hook.__name__)

    return guarded


# --- a request has come ------------------------------------------------------------------------
def check_ids(manager: Any, request: Any, input_ids: Any) -> None:
    """Before a request is taken on: its token ids must be the model's.

    Raises:
        ValueError: one is not; SGLang answers 400 with this text.
    """
    if not input_ids or not all(isinstance(one, int) for one in input_ids):
        return  # no ids, or SGLang's own trouble with them
    size = manager.model_config.vocab_size
    for one in (min(input_ids), max(input_ids)):
        if not 0 <= one < size:
            raise ValueError(f"input_ids holds {one}: this model's token ids are 0 to {size - 1}")


# --- a prompt has been prefilled ---------------------------------------------------------------
@_harmless
def prompt_cached(result: object, cache: Any, req: Any, *, up_to: int) -> None:
    """After a request's KV went into the tree: tell the store which pages its prompt has."""
    conversation = req.routing_key
    store = _store(cache)
    if not conversation or store is None or not store.config.stores or not req.finished():
        return
    path = cache.tree_core.collect_path_info([req.last_node])[0]
    pages = [(node.node_id, cache.tree_core.get_hash_values(node.node_id)) for node in path]
    keys = [key for _, hashes in pages for key in hashes]
    # First, so that what becomes of pages stored again is not told before anybody expects them.
    store.expect(conversation, keys[: len(req.origin_input_ids) // store.page_tokens])
    _store_again(cache, store, pages)


def _store_again(cache: Any, store: Any, pages: list[tuple[Any, list[str]]]) -> None:
    """Store what the host tier holds and the store has lost."""
    import torch

    under_way = {entry[0] for entry in cache.ongoing_backup.values()}
    for entry in cache.ongoing_write_through.values():  # not copied to the host yet
        under_way.update(entry[2])
    held = [
        (node_id, hashes)
        for node_id, hashes in pages
        if node_id not in under_way and cache.tree_core.is_backuped(node_id)
    ]
    if not held:
        return
    lost = torch.tensor(
        [store.writes and store.missing(hashes) for _, hashes in held], dtype=torch.int
    )
    # Ranks must write in step: what one has lost, all store again.
    cache._all_reduce_attn_groups(lost, torch.distributed.ReduceOp.MAX)
    for (node_id, _), gone in zip(held, lost.tolist(), strict=True):
        if gone:
            cache.write_backup_storage(node_id)


# --- a session has been closed -----------------------------------------------------------------
class _Sessions:
    """Where the KV of closed sessions is, and what of it is on its way out.

    Nodes are named by their ids, which are never used again: a node holds its tokens' ids, and
    would be kept alive by us long after the tree has dropped it.

    Attributes:
        paths: of each session closed lately, its nodes, the lowest first.
        leaving: lowest nodes of paths that could not leave at once.
        changed: KV has left since the gauges were published.
    """

    def __init__(self) -> None:
        self.paths: OrderedDict[str, list[list[int]]] = OrderedDict()
        self.leaving: list[int] = []
        self.changed = False


@_harmless
def session_used(scheduler: Any, request: Any, **_: Any) -> None:
    """Before a request begins: its session is in use."""
    session = scheduler.session_controller.get(request.session_id)
    if session is not None:
        session.last_active_time = time.monotonic()


@_harmless
def request_over(result: object, cache: Any, req: Any, **_: Any) -> None:
    """After a request has let go of its KV: see that what is in the tree goes with its session.

    SGLang itself forgets whose it is when the request was aborted.
    """
    name = req.session_id
    if not name or req.last_node is None or not req.finished():
        return
    if _store(cache) is None or not cache.enable_session_radix_cache:
        return
    if cache.session_refs._session_generations.get(name) == req.session_generation:
        cache.session_refs.register_session_ref(req, leaf=req.last_node)  # again does nothing
    else:  # closed since it began
        _sessions(cache).leaving.append(req.last_node)


def session_closed(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """Around the close of a session: see :mod:`marks`."""
    name, mark = marks.split(request.session_id)
    if mark is None:
        return original(scheduler, request)
    if mark == marks.FREE:
        _free(scheduler.tree_cache, name)
    else:
        _end(scheduler.tree_cache, name)
    return None


@_harmless
def session_let_go(cache: Any, session_id: str) -> None:
    """Before a session's references go, closed or timed out: remember where its KV is, for a
    ``FREE`` to come."""
    if _store(cache) is None:
        return
    component = getattr(cache, "components", {}).get(_base_component())
    leaves = component._session_leaves.get(session_id, ()) if component is not None else ()
    if not leaves:
        return
    paths = _sessions(cache).paths
    paths[session_id] = [_upwards(leaf) for leaf in leaves]
    paths.move_to_end(session_id)
    if len(paths) > _MOST_CLOSED:
        paths.popitem(last=False)


@_harmless
def _free(cache: Any, name: str) -> None:
    sessions = _sessions(cache)
    for path in sessions.paths.pop(name, ()):
        there = [node_id for node_id in path if node_id in cache.tree_core._node_arena]
        sessions.leaving += there[:1]
    _let_leave(cache, sessions)


@_harmless
def _end(cache: Any, name: str) -> None:
    store = _store(cache)
    if store is not None:
        store.release(name)


@_harmless
def step_taken(result: object, cache: Any) -> None:
    """After a scheduler step: try again what could not leave before."""
    sessions = getattr(cache, "_conserve_sessions", None)
    if sessions is not None and sessions.leaving:
        _let_leave(cache, sessions)


@_harmless
def resting(reporter: Any) -> None:
    """Before the engine may publish its gauges at rest: see that it does, when KV has left."""
    sessions = getattr(reporter.scheduler.tree_cache, "_conserve_sessions", None)
    if sessions is not None and sessions.changed and reporter.current_scheduler_metrics_enabled:
        sessions.changed = False
        reporter.metrics_collector.last_log_time = 0.0


def _let_leave(cache: Any, sessions: _Sessions) -> None:
    stuck = [_evict_upwards(cache, node_id, sessions) for node_id in sessions.leaving]
    sessions.leaving = [node_id for node_id in stuck if node_id is not None]


def _evict_upwards(cache: Any, node_id: int, sessions: _Sessions) -> int | None:
    """Evict a node and those above it that nobody needs; the first that is still in use."""
    core = cache.tree_core
    node = core._node_arena.get(node_id)
    base = _base_component()
    tracker = dict.fromkeys(cache.tree_components, 0)
    while node is not None and node.parent is not None and node.id in core._node_arena:
        if node.component_data[base].session_ref > 0 or node.children:
            return None  # another conversation goes on from here
        parent = node.parent
        if not node.evicted:
            if node not in core.evictable_device_leaves:
                return int(node.id)
            cache._evict_device_leaf(node.id, tracker)
            sessions.changed = True
        if node.backuped:
            if node not in core.evictable_host_leaves:
                return int(node.id)
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


# --- SGLang's objects --------------------------------------------------------------------------
def _store(cache: Any) -> Any | None:
    """Our store, if this cache's engine runs it."""
    controller = getattr(cache, "cache_controller", None)
    backend = getattr(controller, "storage_backend", None)
    backend = getattr(backend, "_backend", backend)  # SGLang's failure injector wraps it in tests
    return backend if hasattr(backend, "expect") and hasattr(backend, "release") else None


def _sessions(cache: Any) -> _Sessions:
    sessions = getattr(cache, "_conserve_sessions", None)
    if sessions is None:
        sessions = cache._conserve_sessions = _Sessions()
    return sessions


def _upwards(node: Any) -> list[int]:
    path = []
    while node is not None and node.parent is not None:
        path.append(int(node.id))
        node = node.parent
    return path


def _base_component() -> Any:
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import BASE_COMPONENT_TYPE

    return BASE_COMPONENT_TYPE
