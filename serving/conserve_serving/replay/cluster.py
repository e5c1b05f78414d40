"""What a replay reads from ``GET /conserve/v1/cluster``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from conserve_serving.replay.errors import GatewayUnusable


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """One engine, as the gateway describes it; None where it does not know."""

    id: str
    tier: str = "decode"
    state: str = "unknown"
    model: str | None = None
    profile: str | None = None
    kv_held_tokens: int | None = None
    kv_capacity_tokens: int | None = None
    parked_tokens: int | None = None
    running: int | None = None
    queued: int | None = None
    page_tokens: int | None = None
    max_context_tokens: int | None = None
    energy_j: float | None = None
    energy_source: str | None = None


class Gateway(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway itself."""

    version: str | None = None
    policy: str | None = None
    tier_mode: str | None = None


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """Tiers, engines and scheduler counters at one moment.

    Attributes:
        speed: model seconds per wall second of the engines' clocks (1.0 on real hardware).
        counters: nested counters by name; they only grow.
    """

    gateway: Gateway = Gateway()
    speed: float = 1.0
    engines: tuple[Engine, ...] = ()
    counters: dict[str, Any] = {}

    def max_context_tokens(self) -> int | None:
        """Longest prompt and answer that an engine which holds conversations can take."""
        limits = [
            min(
                limit
                for limit in (engine.max_context_tokens, engine.kv_capacity_tokens)
                if limit is not None
            )
            for engine in hosts(self)
            if engine.max_context_tokens is not None or engine.kv_capacity_tokens is not None
        ]
        return max(limits, default=None)


def hosts(cluster: Cluster) -> Iterable[Engine]:
    """Engines that hold conversations: the decode tier, and all of them where all host."""
    hosting = cluster.gateway.tier_mode == "hosting"
    return [engine for engine in cluster.engines if hosting or engine.tier != "prefill"]


def parse_cluster(body: bytes) -> Cluster:
    """The cluster from the gateway's JSON.

    Raises:
        GatewayUnusable: it is not what the gateway's API promises; the field is named.
    """
    try:
        cluster = msgspec.json.decode(body, type=Cluster)
    except msgspec.MsgspecError as error:
        raise GatewayUnusable(
            f"GET /conserve/v1/cluster: {error}. Use a gateway of the same release."
        ) from error
    if not cluster.speed > 0:
        raise GatewayUnusable(f"GET /conserve/v1/cluster: speed is {cluster.speed}, not above 0.")
    return cluster


def counter_delta(
    before: Mapping[str, Any], after: Mapping[str, Any], name: str
) -> dict[str, float]:
    """Growth of one labelled counter between two readings; labels that did not grow are left out.

    A counter that went down has been reset by a restart, and counts from zero again.
    """
    old, new = before.get(name), after.get(name)
    if not isinstance(new, Mapping):
        return {}
    old = old if isinstance(old, Mapping) else {}
    growth = {}
    for label, value in new.items():
        start = old.get(label, 0)
        grown = value - start if value >= start else value
        if grown:
            growth[str(label)] = grown
    return growth
