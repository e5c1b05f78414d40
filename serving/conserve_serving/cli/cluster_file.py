"""From the configuration file to what is started, and to the file the gateway itself reads.

The file describes tiers; `conserve up` starts those of this machine and rewrites them, for the
gateway, as engines attached by URL. Everything else reaches the gateway as it was written.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conserve_serving.cli.errors import BadInputError
from conserve_serving.cli.ports import is_ours, reserve_port, url_host
from conserve_serving.cli.store_place import default_max_bytes, make_store_folder
from conserve_serving.cli.supervisor import ClusterPlan, EmulatedEngine, EngineToStart
from conserve_serving.core.types import Tier, TierMode
from conserve_serving.engines.profile import load_profile
from conserve_serving.engines.sglang.flags import SglangEngine, StoreSettings, named_flags
from conserve_serving.gateway.config import Config, TierSection, load_config
from conserve_serving.gateway.config_checks import DEFAULT_PROFILE, SGLANG_ONLY
from conserve_serving.gateway.errors import ConfigError

ACK_PATH = "/conserve/v1/handoffs"


def read_config(path: Path | None, *, engine: str | None = None) -> Config:
    """The configuration in a file, or the defaults: one prefiller and two decoders, emulated.

    Args:
        path: the file, if any.
        engine: ``emulated`` or ``sglang`` where the command line says what tiers run.

    Raises:
        BadInputError: the file cannot be used; the message names the key and the remedy.
    """
    if path is None and engine == "sglang":
        raise BadInputError(
            "--engine sglang needs a configuration file that names the model",
            remedy='write one with --config FILE: [[tiers]] role = "prefill" model = "PATH", and '
            'the same with role = "decode" count = 2',
        )
    try:
        return Config() if path is None else load_config(path, engine=engine)
    except ConfigError as failure:
        raise BadInputError(
            str(failure), remedy="`conserve config --explain` shows every setting"
        ) from failure


def attached_config(config: Config, *, environ: Mapping[str, str] = os.environ) -> str:
    """The file the gateway itself reads, when others start all engines.

    Args:
        config: a configuration whose tiers all have ``urls``.
        environ: the environment that engines inherit.
    """
    tiers = list(zip(config.tiers, engine_ids(config), strict=True))
    here = {
        engine.id: engine.gpus or ()
        for engine in sglang_engines(config, environ=environ)
        if is_ours(engine.host)
    }
    return to_toml(_attached(config, tiers, {}, gateway={}, store=None, gpus=here))


def plan_cluster(
    config: Config,
    *,
    port: int | None,
    speed: float | None = None,
    run_dir: Path,
    environ: Mapping[str, str] = os.environ,
) -> ClusterPlan:
    """What `conserve up` is to start.

    Args:
        config: the configuration.
        port: the port the gateway is to listen on; None: the configuration's, or when it names
            none the default port or the next free one.
        speed: replaces every emulated tier's speed.
        run_dir: where the run's files go.
        environ: the environment that engines inherit.

    Raises:
        PortInUseError: the port asked for is taken.
        CliError: the address cannot be listened on.
        BadInputError: engines on other machines lack what only the file can say.
        ProfileError: a profile does not exist; the configuration has been checked for that.
    """
    gateway = config.gateway
    asked = gateway.port if "port" in gateway.model_fields_set and port is None else port
    reserved = reserve_port(gateway.host, asked)
    tiers = list(zip(config.tiers, engine_ids(config), strict=True))
    engines: list[EngineToStart] = [
        _emulated(tier, id_, speed)
        for tier, ids in tiers
        if tier.engine == "emulated"
        for id_ in ids
    ]
    launched = sglang_engines(config, environ=environ)
    engines += [engine for engine in launched if is_ours(engine.host)]
    far_away = [engine for engine in launched if not is_ours(engine.host)]

    # One key for the whole run: the gateway's placement tokens then survive its restart.
    placement_key = gateway.placement_key or secrets.token_hex(32)
    store = store_settings(
        config, f"http://{url_host(gateway.host)}:{reserved.port}{ACK_PATH}", far_away=far_away
    )
    remove_store = not store.path
    if remove_store:
        folder = make_store_folder(run_dir) if launched else run_dir / "store"
        store = dataclasses.replace(
            store,
            path=str(folder),
            max_bytes=store.max_bytes or default_max_bytes(folder),
        )

    def gateway_config(urls: Mapping[str, str]) -> str:
        return to_toml(
            _attached(
                config,
                tiers,
                urls,
                gateway={"port": reserved.port, "placement_key": placement_key},
                store=store if launched else None,
                gpus={e.id: e.gpus or () for e in launched if is_ours(e.host)},
            )
        )

    return ClusterPlan(
        engines=tuple(engines),
        store=store,
        remove_store=remove_store,
        host=gateway.host,
        reserved=reserved,
        gateway_config=gateway_config,
        drain_s=gateway.drain_timeout_s,
        admin_token=gateway.admin_token,
    )


def engine_ids(config: Config) -> list[list[str]]:
    """The ids the gateway gives to each tier's engines, tier by tier."""
    result: list[list[str]] = []
    next_number: dict[str, int] = {}
    for tier in config.tiers:
        prefix = tier.name or ("p" if tier.role is Tier.PREFILL else "d")
        count = len(tier.urls) if tier.engine == "attach" else tier.count
        start = next_number.get(prefix, 0)
        next_number[prefix] = start + count
        result.append([f"{prefix}{number}" for number in range(start, start + count)])
    return result


def _emulated(tier: TierSection, id_: str, speed: float | None) -> EmulatedEngine:
    profile = load_profile(tier.profile or DEFAULT_PROFILE)
    return EmulatedEngine(
        id=id_,
        role=tier.role.value,
        profile=profile.name,
        model=tier.model or profile.model,
        speed=speed or tier.speed,
        page_tokens=tier.page_tokens,
        kv_capacity_tokens=tier.kv_capacity_tokens,
        host_capacity_tokens=tier.host_capacity_tokens,
    )


def sglang_engines(config: Config, *, environ: Mapping[str, str]) -> list[SglangEngine]:
    """The SGLang engines that the file describes, wherever they run.

    Args:
        config: the configuration.
        environ: the environment that engines inherit; its CUDA_VISIBLE_DEVICES is what tiers
            without ``gpus`` take from.
    """
    hosting = config.scheduler.tier_mode is TierMode.HOSTING
    free = _FreeGpus(config, environ)
    engines: list[SglangEngine] = []
    for tier, ids in zip(config.tiers, engine_ids(config), strict=True):
        if tier.engine != "sglang":
            continue
        for number, id_ in enumerate(ids):
            address = urlsplit(tier.urls[number]) if tier.urls else None
            gpus: tuple[str, ...] | None
            if tier.gpus is None and not _without_gpu(tier):
                gpus = free.take(address.hostname if address is not None else None, tier.tp)
            else:
                gpus = tier.gpus[number] if tier.gpus else None
            prefills = tier.role is Tier.PREFILL
            engines.append(
                SglangEngine(
                    id=id_,
                    role="both" if prefills and hosting else tier.role.value,
                    model=tier.model or "",  # checked: it is there
                    served_model_name=tier.served_name or "",
                    host=(address.hostname or "") if address is not None else "127.0.0.1",
                    port=(address.port or 0) if address is not None else 0,
                    tp=tier.tp,
                    gpus=gpus,
                    page_tokens=tier.page_tokens,
                    kv_capacity_tokens=tier.kv_capacity_tokens,
                    host_kv_gb=tier.host_kv_gb,
                    keeps_conversations=hosting or not prefills,
                    python=tier.python or sys.executable,
                    flags=tier.flags,
                    omit=tier.omit,
                    env=tier.env,
                    log_level=tier.log_level,
                    ready_timeout_s=tier.ready_timeout_s,
                )
            )
    return engines


class _FreeGpus:
    """GPUs that no tier names, machine by machine, in order: those this process may see, else all.

    There is always a next one: CUDA says what is wrong with a GPU that is not there, and `conserve
    doctor` says it before.
    """

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        self._named: dict[str | None, set[str]] = {}
        for tier in config.tiers:
            hosts = [urlsplit(url).hostname for url in tier.urls] or [None] * tier.count
            for host, row in zip(hosts, tier.gpus or (), strict=False):
                self._named.setdefault(host, set()).update(row)
        visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        self._visible = [gpu.strip() for gpu in visible if gpu.strip()]
        self._free: dict[str | None, Iterator[str]] = {}

    def take(self, host: str | None, number: int) -> tuple[str, ...]:
        """The next so many of a machine."""
        free = self._free.setdefault(host, self._of(self._named.get(host, set())))
        return tuple(itertools.islice(free, number))

    def _of(self, named: set[str]) -> Iterator[str]:
        taken = set(named)
        for gpu in itertools.chain(self._visible, map(str, itertools.count())):
            if gpu not in taken:
                taken.add(gpu)
                yield gpu


def _without_gpu(tier: TierSection) -> bool:
    return any(
        name == "--device" and value not in (None, "cuda")
        for name, value in named_flags(tier.flags)
    )


def store_settings(config: Config, ack_url: str, *, far_away: list[SglangEngine]) -> StoreSettings:
    """How engines hand KV over; ``path`` is empty where the file names none.

    Args:
        config: the configuration.
        ack_url: where the gateway takes acknowledgements, as this machine reaches it.
        far_away: engines on other machines.

    Raises:
        BadInputError: engines on other machines need a shared folder, or the gateway's address.
    """
    handoff = config.handoff
    if far_away and handoff.transport == "file" and handoff.path is None:
        raise BadInputError(
            f"{far_away[0].id} runs on another machine ({far_away[0].host}), and handoff.path is "
            "not set",
            remedy="set it to a folder on a file system that all machines share",
        )
    near_only = (urlsplit(ack_url).hostname or "").startswith("127.")
    if far_away and near_only and handoff.ack_url is None:
        raise BadInputError(
            f"{far_away[0].id} runs on another machine ({far_away[0].host}), and cannot "
            f"acknowledge hand-offs at {ack_url}",
            remedy="set gateway.host to this machine's address, or handoff.ack_url to the "
            f"gateway's URL as other machines reach it, with {ACK_PATH}",
        )
    path = handoff.path or ""
    return StoreSettings(
        transport=handoff.transport,
        path=path,
        ack_url=handoff.ack_url or ack_url,
        max_bytes=handoff.max_bytes or (default_max_bytes(Path(path)) if path else None),
        max_age_s=handoff.max_age_s,
        prefetch_threshold_tokens=handoff.prefetch_threshold_tokens,
        extra=handoff.extra,
    )


def _attached(
    config: Config,
    tiers: list[tuple[TierSection, list[str]]],
    urls: Mapping[str, str],
    *,
    gateway: Mapping[str, Any],
    store: StoreSettings | None,
    gpus: Mapping[str, tuple[str, ...]],
) -> dict[str, Any]:
    """The configuration with every tier attached by URL, and the store where it really is."""
    data = config.model_dump(
        mode="json", exclude_unset=True, exclude_none=True, exclude={"tiers", "handoff"}
    )
    data["gateway"] = {**data.get("gateway", {}), **gateway}
    if store is None and "handoff" in config.model_fields_set:
        data["handoff"] = config.handoff.model_dump(
            mode="json", exclude_none=True, exclude={"extra"}
        )
    if store is not None:
        handoff = config.handoff.model_dump(mode="json", exclude_none=True, exclude={"extra"})
        data["handoff"] = handoff | {"path": store.path, "ack_url": store.ack_url}
        if store.max_bytes is not None:
            data["handoff"]["max_bytes"] = store.max_bytes
    data["tiers"] = []
    for tier, ids in tiers:
        row = tier.model_dump(
            mode="json", exclude_none=True, exclude={"count", "speed", *SGLANG_ONLY}
        )
        if tier.engine != "attach":
            row |= {"engine": "attach"}
            row["urls"] = list(tier.urls) or [urls[id_] for id_ in ids]
            row.pop("gpus", None)
            if any(gpus.get(id_) for id_ in ids):  # GPUs elsewhere are not for it to measure
                row["gpus"] = [list(gpus.get(id_, ())) for id_ in ids]
            if tier.served_name is not None:
                row["model"] = tier.served_name
        data["tiers"].append(row)
    return data


def to_toml(data: Mapping[str, Any]) -> str:
    """Sections of plain values, and arrays of such sections, as TOML text.

    Args:
        data: ``{section: {key: value}}`` or ``{section: [{key: value}]}``; the values are
            strings, numbers, booleans and lists of those.
    """
    lines: list[str] = []
    for section, content in data.items():
        repeated = isinstance(content, list)
        for table in content if repeated else [content]:
            lines.append(f"[[{section}]]" if repeated else f"[{section}]")
            # JSON writes these values as TOML does.
            lines += [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in table.items()]
            lines.append("")
    return "\n".join(lines)
