"""From the configuration file to what is started, and to the file the gateway itself reads.

The file describes tiers; `conserve up` starts the emulated ones and rewrites them, for the
gateway, as engines attached by URL. Everything else reaches the gateway as it was written.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conserve_serving.cli.errors import BadInputError
from conserve_serving.cli.ports import reserve_port
from conserve_serving.cli.supervisor import ClusterPlan, EmulatedEngine
from conserve_serving.core.types import Tier
from conserve_serving.engines.profile import load_profile
from conserve_serving.gateway.config import Config, TierSection, load_config
from conserve_serving.gateway.config_checks import DEFAULT_PROFILE
from conserve_serving.gateway.errors import ConfigError


def read_config(path: Path | None) -> Config:
    """The configuration in a file, or the defaults: one prefiller and two decoders, emulated.

    Raises:
        BadInputError: the file cannot be used; the message names the key and the remedy.
    """
    try:
        return Config() if path is None else load_config(path)
    except ConfigError as failure:
        raise BadInputError(
            str(failure), remedy="`conserve config --explain` shows every setting"
        ) from failure


def plan_cluster(config: Config, *, port: int | None, speed: float | None = None) -> ClusterPlan:
    """What `conserve up` is to start.

    Args:
        config: the configuration.
        port: the port the gateway is to listen on; None: the configuration's, or when it names
            none the default port or the next free one.
        speed: replaces every emulated tier's speed.

    Raises:
        PortInUseError: the port asked for is taken.
        CliError: the address cannot be listened on.
        ProfileError: a profile does not exist; the configuration has been checked for that.
    """
    gateway = config.gateway
    asked = gateway.port if "port" in gateway.model_fields_set and port is None else port
    reserved = reserve_port(gateway.host, asked)
    engines: dict[str, EmulatedEngine] = {}
    tiers: list[tuple[TierSection, list[str]]] = []
    for tier, ids in zip(config.tiers, engine_ids(config), strict=True):
        tiers.append((tier, ids))
        if tier.engine == "emulated":
            profile = load_profile(tier.profile or DEFAULT_PROFILE)
            for id_ in ids:
                engines[id_] = EmulatedEngine(
                    id=id_,
                    role=tier.role.value,
                    profile=profile.name,
                    model=tier.model or profile.model,
                    speed=speed or tier.speed,
                    page_tokens=tier.page_tokens,
                    kv_capacity_tokens=tier.kv_capacity_tokens,
                    host_capacity_tokens=tier.host_capacity_tokens,
                )

    # One key for the whole run: the gateway's placement tokens then survive its restart.
    placement_key = gateway.placement_key or secrets.token_hex(32)

    def gateway_config(urls: Mapping[str, str]) -> str:
        return to_toml(
            _attached(config, tiers, urls, port=reserved.port, placement_key=placement_key)
        )

    return ClusterPlan(
        engines=tuple(engines.values()),
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
        count = tier.count if tier.engine == "emulated" else len(tier.urls)
        start = next_number.get(prefix, 0)
        next_number[prefix] = start + count
        result.append([f"{prefix}{number}" for number in range(start, start + count)])
    return result


def _attached(
    config: Config,
    tiers: list[tuple[TierSection, list[str]]],
    urls: Mapping[str, str],
    *,
    port: int,
    placement_key: str,
) -> dict[str, Any]:
    """The configuration with every emulated tier attached by URL."""
    data = config.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={"tiers"})
    data["gateway"] = {**data.get("gateway", {}), "port": port, "placement_key": placement_key}
    data["tiers"] = []
    for tier, ids in tiers:
        row = tier.model_dump(mode="json", exclude_none=True, exclude={"count", "speed"})
        if tier.engine == "emulated":
            row |= {"engine": "attach", "urls": [urls[id_] for id_ in ids]}
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
