"""What `conserve doctor` looks at in a cluster that runs: every engine's own settings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import SplitResult, urlsplit

from conserve_serving.cli.errors import CliError
from conserve_serving.cli.findings import Finding, Findings
from conserve_serving.cli.gateway_http import ClusterStatus, EngineStatus, GatewayStatus
from conserve_serving.engines.client_types import EngineDescription
from conserve_serving.engines.http_errors import EngineHttpError
from conserve_serving.engines.sglang.environment import SUPPORTED_VERSION

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class EngineApi(Protocol):
    """What is asked of an engine; ``engines.client.EngineClient`` answers."""

    async def describe(self) -> EngineDescription:
        """What joining needs."""
        ...

    async def settings(self) -> dict[str, object]:
        """What it was started with."""
        ...

    def close(self) -> None:
        """Close its connections."""
        ...


@dataclass(frozen=True, slots=True)
class _Answer:
    """What an engine said of itself."""

    engine: EngineStatus
    description: EngineDescription
    #: What our store was configured with; empty where the engine runs another, or none.
    store: Mapping[str, Any]


async def check_cluster(
    url: str, cluster: Callable[[], ClusterStatus], connect: Callable[[str], EngineApi]
) -> list[Finding]:
    """Look at a gateway and its engines.

    Args:
        url: the gateway's.
        cluster: asks it for its state.
        connect: a client for an engine's URL.
    """
    into = Findings(f"gateway {url}")
    try:
        status = await asyncio.to_thread(cluster)
    except CliError as failure:
        into.bad(failure.what, failure.remedy)
        return into.all
    gateway = status.gateway
    into.ok(f"answers: ConServe {gateway.version}, policy {gateway.policy}")
    if gateway.draining:
        into.warn("it is draining: it takes no new conversations", "start it again")
    tiers = {engine.tier for engine in status.engines}
    if not tiers or ("decode" not in tiers and not _lives_everywhere(gateway)):
        into.bad("it has no decoder", 'add a tier with role = "decode"')
    hands_over = gateway.policy == "conserve" and tiers >= {"prefill", "decode"}
    looked = await asyncio.gather(
        *(_look_at(engine, gateway, hands_over, url, connect) for engine in status.engines)
    )
    findings = [*into.all, *(finding for found, _ in looked for finding in found.all)]
    answers = [answer for _, answer in looked if answer is not None]
    if len(answers) > 1:
        findings += _compare(answers)
    return findings


def _lives_everywhere(gateway: GatewayStatus) -> bool:
    """Whether prefillers hold conversations too."""
    return gateway.tier_mode == "hosting" or gateway.policy != "conserve"


async def _look_at(
    engine: EngineStatus,
    gateway: GatewayStatus,
    hands_over: bool,
    url: str,
    connect: Callable[[str], EngineApi],
) -> tuple[Findings, _Answer | None]:
    into = Findings(f"engine {engine.id} ({engine.tier}, {engine.url})")
    if engine.state in ("unfit", "lost"):
        into.bad(
            f"the gateway says it is {engine.state}: {engine.note or 'no reason given'}",
            "see below" if engine.state == "unfit" else "start it again; its log says why it ended",
        )
    client = connect(engine.url)
    try:
        description = await client.describe()
        settings = await client.settings()
    except EngineHttpError as error:
        if engine.is_up:
            into.warn(
                f"the gateway reaches it, this machine does not: {error}",
                "run the doctor on the gateway's machine, with the gateway's configuration "
                "(--config) where engines want a key",
            )
        else:
            into.bad(str(error), "start it, or remove it from the gateway")
        return into, None
    finally:
        client.close()
    store: dict[str, Any] = {}
    if description.emulated is not None:
        into.ok(f"emulated, {description.emulated.profile}")
    else:
        _check_settings(engine, gateway, description, settings, into)
        if hands_over:
            store = _check_store(engine, settings, url, into)
    return into, _Answer(engine, description, store)


def _check_settings(
    engine: EngineStatus,
    gateway: GatewayStatus,
    description: EngineDescription,
    settings: Mapping[str, Any],
    into: Findings,
) -> None:
    """What the driver needs of any engine."""
    version = description.version
    if version == SUPPORTED_VERSION:
        into.ok(f"SGLang {version}, {description.model}, {description.kv_layout}")
    else:
        into.warn(
            f"SGLang {version or 'of an unknown version'}; ConServe was tested with "
            f"{SUPPORTED_VERSION} only",
            f"pip install sglang=={SUPPORTED_VERSION}",
        )
    if not settings.get("enable_metrics"):
        into.bad("it does not report its occupancy", "start it with --enable-metrics")
    if not settings.get("enable_cache_report"):
        into.bad(
            "it does not say how much of a prompt was cached, so no hand-off can be checked",
            "start it with --enable-cache-report",
        )
    if (engine.tier == "decode" or _lives_everywhere(gateway)) and not description.keeps_sessions:
        into.bad(
            "it cannot hold idle conversations: their KV is evicted like any other",
            "start it with --enable-session-radix-cache",
        )
    if not description.takes_priority:
        into.warn(
            "it serves its queue in order of arrival: first turns delay tail turns",
            "start it with --enable-priority-scheduling --disable-priority-preemption",
        )


def _check_store(
    engine: EngineStatus, settings: Mapping[str, Any], url: str, into: Findings
) -> dict[str, Any]:
    """Whether it takes part in hand-offs; the store's configuration, when it is ours."""
    if not settings.get("enable_hierarchical_cache"):
        into.bad("it has no hierarchical cache", "start it with --enable-hierarchical-cache")
        return {}
    store = _store_of(settings)
    if store is None:
        into.bad(
            f"its storage back end is {settings.get('hicache_storage_backend') or 'none'}, not "
            "ConServe's hand-off store",
            "start it with `conserve engine`, or with the flags in docs/operations.md",
        )
        return {}
    wanted = {"prefill": ("prefill", "both"), "decode": ("decode", "both")}[
        "prefill" if engine.tier == "prefill" else "decode"
    ]
    role = store.get("role")
    if role not in wanted:
        into.bad(
            f"its store has the role {role!r}, but the gateway has it in the {engine.tier} tier",
            f'write "role": "{wanted[0]}" in --hicache-storage-backend-extra-config',
        )
    if engine.tier == "prefill":
        _check_acknowledgement(str(store.get("ack_url", "")), url, into)
        if settings.get("hicache_write_policy") != "write_through":
            into.bad(
                f"it writes to the store by {settings.get('hicache_write_policy')!r}: hand-offs "
                "would wait in vain",
                "start it with --hicache-write-policy write_through",
            )
    elif settings.get("hicache_storage_prefetch_policy") == "best_effort":
        into.bad(
            "it starts turns before the KV handed over is loaded, and prefills them again",
            "start it with --hicache-storage-prefetch-policy wait_complete",
        )
    if store.get("engine") != engine.id:
        into.warn(
            f"its store calls itself {store.get('engine')!r}, the gateway {engine.id}",
            f'write "engine": "{engine.id}" there, so that logs and metrics agree',
        )
    if not any(finding.remedy for finding in into.all):
        into.ok(f"hands KV over ({store.get('transport', 'file')}, role {role})")
    return store


def _store_of(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of our store; None: it runs another, or none."""
    if settings.get("hicache_storage_backend") != "dynamic":
        return None
    text = str(settings.get("hicache_storage_backend_extra_config") or "")
    if text.startswith("@"):  # a file on its machine, perhaps on ours
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except OSError:
            return None
    try:
        store = json.loads(text)
    except ValueError:
        return None
    ours = isinstance(store, dict) and str(store.get("module_path", "")).startswith(
        "conserve_serving."
    )
    return store if ours else None


def _check_acknowledgement(ack_url: str, url: str, into: Findings) -> None:
    ack, gateway = urlsplit(ack_url), urlsplit(url)
    if not ack_url:
        into.bad(
            "its store acknowledges to nobody: decoders would prefill everything themselves",
            f'write "ack_url": "{url}/conserve/v1/handoffs" in its extra config',
        )
    elif _port(ack) != _port(gateway) or ack.path != "/conserve/v1/handoffs":
        into.bad(
            f"its store acknowledges to {ack_url}, which is not this gateway",
            f'write "ack_url": "{url}/conserve/v1/handoffs" in its extra config',
        )
    elif ack.hostname != gateway.hostname and not {ack.hostname, gateway.hostname} <= _LOOPBACK:
        into.warn(
            f"its store acknowledges to {ack_url}; this gateway was asked at {url}",
            "make sure that both are the same machine",
        )


def _port(parts: SplitResult) -> int:
    try:
        return parts.port or 80
    except ValueError:
        return -1


def _compare(answers: Sequence[_Answer]) -> list[Finding]:
    """What must be the same everywhere."""
    into = Findings("all engines")
    _same(
        into,
        "model",
        {answer.engine.id: answer.description.model for answer in answers},
        "start all with the same --served-model-name",
    )
    _same(
        into,
        "KV layout",
        {answer.engine.id: answer.description.kv_layout for answer in answers},
        "start all with the same --page-size, --dtype, --kv-cache-dtype, --hicache-mem-layout and "
        "--tp-size: pages would be read wrong",
    )
    stores = [answer for answer in answers if answer.store]
    for key in ("transport", "path"):
        _same(
            into,
            f"store's {key}",
            {answer.engine.id: str(answer.store.get(key, "")) for answer in stores},
            f'write the same "{key}" in every engine\'s extra config',
        )
    versions = {answer.engine.id: answer.description.version for answer in answers}
    if len(set(versions.values())) > 1:
        into.warn(f"versions differ: {_told(versions)}", "run the same SGLang everywhere")
    if not into.all:
        into.ok("agree on model, KV layout and store")
    return into.all


def _same(into: Findings, what: str, values: Mapping[str, str], remedy: str) -> None:
    if len(set(values.values())) > 1:
        into.bad(f"{what} differs: {_told(values)}", remedy)


def _told(values: Mapping[str, str]) -> str:
    return "; ".join(f"{id_}: {value or '-'}" for id_, value in values.items())
