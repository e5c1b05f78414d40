"""From the configuration file to what is started, and to the file the gateway itself reads.

The file describes tiers; `conserve up` starts those of this machine and rewrites them, for the
gateway, as engines attached by URL. Everything else reaches the gateway as it was written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conserve_serving.cli.commands import EmulatedEngine, EngineToStart
from conserve_serving.cli.errors import BadInputError
from conserve_serving.cli.ports import is_ours, reserve_port, url_host
from conserve_serving.cli.sglang_tiers import (
    ACK_PATH,
    engine_ids,
    sglang_engines,
    store_settings,
)
from conserve_serving.cli.store_place import default_max_bytes, make_store_folder
from conserve_serving.cli.supervisor import ClusterPlan
from conserve_serving.engines.profile import load_profile
from conserve_serving.engines.sglang.flags import StoreSettings
from conserve_serving.gateway.config import Config, TierSection, load_config
from conserve_serving.gateway.config_checks import DEFAULT_PROFILE, SGLANG_ONLY
from conserve_serving.gateway.errors import ConfigError


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
    here = [engine for engine in launched if is_ours(engine.host)]
    far_away = [engine for engine in launched if engine not in here]
    engines += here

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
                gpus={engine.id: engine.gpus or () for engine in here},
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
    handoff = config.handoff.model_dump(mode="json", exclude_none=True, exclude={"extra"})
    if store is not None:
        handoff |= {"path": store.path, "ack_url": store.ack_url, "max_bytes": store.max_bytes}
    if store is not None or "handoff" in config.model_fields_set:
        data["handoff"] = {key: value for key, value in handoff.items() if value is not None}
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
