"""What the gateway shows of itself as JSON: the cluster, its engines, its counters."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

from conserve_serving.gateway.engine import Engine

if TYPE_CHECKING:
    from conserve_serving.gateway.gateway import Gateway

VERSION = metadata.version("conserve-agents")


def describe_cluster(gateway: Gateway) -> dict[str, Any]:
    """The body of ``GET /conserve/v1/cluster``."""
    runtime, config = gateway.runtime, gateway.config
    scheduler = runtime.scheduler
    counters = scheduler.counters
    return {
        "gateway": {
            "version": VERSION,
            "uptime_s": round(gateway.wall() - gateway.started_s, 3),
            "policy": config.scheduler.policy,
            "tier_mode": config.scheduler.tier_mode.value,
            "model": gateway.fleet.model,
            "open_conversations": gateway.conversations.open_count,
            "waiting_turns": scheduler.waiting_turns,
            "live_turns": runtime.live_turns,
            "draining": gateway.draining,
        },
        "speed": runtime.clock.speed,
        "engines": [describe_engine(gateway, engine) for engine in gateway.fleet],
        "counters": {
            "turns_by_outcome": dict(counters.outcomes),
            "placements_by_reason": dict(counters.placements),
            "holds_by_reason": dict(counters.holds),
            "rejections_by_reason": dict(counters.rejections),
            "transfers_by_reason": dict(counters.transfers),
            "moves_by_reason": dict(counters.moves),
            "fallbacks_by_reason": dict(counters.fallbacks),
            "releases_by_reason": dict(counters.releases),
            "ignored_events": dict(counters.ignored_events),
            "transferred_tokens": counters.transferred_tokens,
            "parks": counters.parks,
            "parked_tokens": counters.parked_tokens,
            "cached_token_shortfall_tokens": counters.shortfall_tokens,
            "shortfall_turns": counters.shortfall_turns,
            "prompt_tokens": gateway.metrics.prompt_tokens,
            "output_tokens": gateway.metrics.output_tokens,
            "cached_tokens": gateway.metrics.cached_tokens,
            "client_aborts": gateway.metrics.aborts,
            "usage_missing": gateway.metrics.usage_missing,
        },
    }


def kv_drift_tokens(gateway: Gateway, engine: Engine) -> int | None:
    """KV an engine says it holds beyond what the ledger knows of; None before it has said so.

    Positive: ended conversations or others' prompts it has not evicted yet (harmless: evicted on
    demand). Negative for long: it has lost KV of open conversations. While turns run, their
    prompts under way are in one figure and not in the other.
    """
    state = gateway.runtime.scheduler.engines.get(engine.id)
    if state is None or engine.occupancy is None:
        return None
    return engine.occupancy.kv_held_tokens - state.resident_tokens


def describe_engine(gateway: Gateway, engine: Engine) -> dict[str, Any]:
    """One engine: what it is, what the ledger and its own reports say of it."""
    state = gateway.runtime.scheduler.engines.get(engine.id)
    description, emulated = engine.description, None
    if description is not None:
        emulated = description.emulated
    learned = None
    if state is not None:
        speeds = state.speeds.snapshot()
        learned = {
            "prefill_tokens_per_s": speeds.prefill_tokens_per_s,
            "decode_step_s": speeds.decode_step_s,
            "decode_step_s_per_kv_token": speeds.decode_step_s_per_kv_token,
            "mixed_slowdown": speeds.mixed_slowdown,
        }
    loads, occupancy = engine.loads, engine.occupancy
    return {
        "id": engine.id,
        "url": engine.url,
        "tier": engine.tier.value,
        "state": engine.state,
        "note": engine.note,
        "epoch": engine.epoch,
        "model": description.model if description is not None else engine.section.model,
        "profile": emulated.profile if emulated is not None else engine.section.profile,
        "page_tokens": engine.page_tokens,
        "kv_held_tokens": state.held_tokens if state is not None else 0,
        "kv_reported_tokens": occupancy.kv_held_tokens if occupancy is not None else None,
        "kv_drift_tokens": kv_drift_tokens(gateway, engine),
        "kv_capacity_tokens": description.kv_capacity_tokens if description is not None else 0,
        "max_context_tokens": description.max_context_tokens if description is not None else 0,
        "parked_tokens": state.parked_tokens if state is not None else 0,
        "host_capacity_tokens": state.host_capacity_tokens if state is not None else 0,
        "running": loads.running_requests if loads is not None else 0,
        "queued": loads.waiting_requests if loads is not None else 0,
        "turns": engine.running,
        "conversations": state.conversations if state is not None else 0,
        "learned": learned,
        **gateway.energy.describe(engine),
        "model_time_s": engine.model_time_s,
    }
