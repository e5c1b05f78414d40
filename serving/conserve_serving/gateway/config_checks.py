"""What one setting alone cannot show: settings that contradict each other or the world.

Each function raises ``ValueError`` with a message that names the keys and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from conserve_serving.core.types import Tier, TierMode
from conserve_serving.engines.profile import load_profile
from conserve_serving.engines.sglang.flags import STORE_KEYS, named_flags
from conserve_serving.gateway.sources import HEADER_NAME

if TYPE_CHECKING:
    from conserve_serving.gateway.config import Config
    from conserve_serving.gateway.config_tiers import TierSection

#: What an emulated engine runs when its tier names no profile.
DEFAULT_PROFILE: Final = "a40-qwen3-0.6b"


def check_headers(names: Sequence[str]) -> None:
    """Names of request headers must be such."""
    for name in names:
        if not HEADER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no header's name: letters, digits and hyphens")


def check_url(url: str, *, path: bool = False) -> None:
    """An engine's URL must be an address and nothing else; with ``path``, it may have a path."""
    parts = urlsplit(url)
    try:
        legal = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no legal port
        legal = False
    beyond = parts.query or parts.fragment or parts.username
    if not legal or beyond or (parts.path not in ("", "/") and not path):
        form = "http://host:port/path" if path else "http://host:port"
        raise ValueError(f"{url!r} is not of the form {form}")


def check_extra(extra: Mapping[str, object]) -> None:
    """What is passed through to a store must not take the place of what we set."""
    for key in extra:
        if key in STORE_KEYS:
            raise ValueError(
                f"{key!r} is set by conserve: remove it (the other settings decide it)"
            )


def complete_tier(data: Any) -> Any:
    """A tier as it stands in the file, with what follows from its other settings.

    ``gpus`` gets its long form, one list for each engine; ``count`` and ``tp`` follow from it.
    """
    if not isinstance(data, dict) or data.get("engine") not in ("sglang", "attach"):
        return data
    data = dict(data)
    gpus, urls = data.get("gpus"), data.get("urls")
    if isinstance(gpus, (list, tuple)):
        rows = [row if isinstance(row, (list, tuple)) else [row] for row in gpus]
        for gpu in (gpu for row in rows for gpu in row):
            if isinstance(gpu, bool) or not isinstance(gpu, (int, str)):
                raise ValueError(  # noqa: TRY004 - pydantic reports these with the key
                    f"gpus: {gpu!r} is neither a GPU's number nor its UUID"
                )
        data["gpus"] = tuple(tuple(str(gpu) for gpu in row) for row in rows)
    if data["engine"] == "attach":
        return data
    if data.get("gpus"):
        data.setdefault("tp", len(data["gpus"][0]) or 1)
    for rows in (data.get("gpus"), urls):
        if isinstance(rows, (list, tuple)) and rows:
            data.setdefault("count", len(rows))
    return data


def with_engine(data: dict[str, Any], engine: str) -> dict[str, Any]:
    """A configuration file's content with another kind of engine for tiers that start some.

    Run emulated, a description of SGLang tiers keeps what an emulated engine has, too.
    """
    tiers = data.get("tiers")
    if tiers is None and engine == "sglang":
        raise ValueError("no [[tiers]]: SGLang engines need some that name the model")
    if not isinstance(tiers, list):
        return data
    changed = []
    for tier in tiers:
        if not isinstance(tier, dict) or tier.get("engine") == "attach":
            changed.append(tier)
            continue
        row = complete_tier(tier | {"engine": tier.get("engine", engine)}) | {"engine": engine}
        if engine == "emulated":
            model = row.get("served_model_name", row.get("model"))
            row = {key: value for key, value in row.items() if key not in _NOT_EMULATED}
            row |= {"model": model} if model is not None else {}
        changed.append(row)
    return {**data, "tiers": changed}


#: Settings that only tiers with ``engine = "sglang"`` have.
SGLANG_ONLY: Final = (
    "served_model_name",
    "tp",
    "host_kv_gb",
    "python",
    "flags",
    "omit",
    "env",
    "log_level",
    "ready_timeout_s",
)
_NOT_EMULATED: Final = frozenset({*SGLANG_ONLY, "urls", "gpus"})


def check_tier(tier: TierSection) -> None:
    """One tier by itself."""
    if tier.engine != "sglang":
        for key in SGLANG_ONLY:
            default = type(tier).model_fields[key].get_default(call_default_factory=True)
            if getattr(tier, key) != default:
                raise ValueError(
                    f'{key} is given, but engine is "{tier.engine}": write engine = "sglang", or '
                    f"remove {key}"
                )
    if tier.engine == "emulated" and tier.gpus:
        raise ValueError('gpus is given, but engine is "emulated": remove it')
    if tier.engine == "attach":
        if not tier.urls:
            raise ValueError('urls is missing: engine = "attach" needs the engines\' URLs')
        _check_rows(tier, len(tier.urls))
        return
    if tier.engine == "sglang":
        _check_sglang(tier)
    elif tier.urls:
        raise ValueError(
            'urls is given, but engine is "emulated": write engine = "attach", or remove urls'
        )
    if tier.kv_capacity_tokens is not None and tier.kv_capacity_tokens < tier.page_tokens:
        raise ValueError(
            f"kv_capacity_tokens = {tier.kv_capacity_tokens} is less than one page: make it at "
            f"least page_tokens = {tier.page_tokens}"
        )


def _check_rows(tier: TierSection, engines: int) -> None:
    for key, rows in (("gpus", tier.gpus), ("urls", tier.urls)):
        if rows and len(rows) != engines:
            raise ValueError(
                f"{key} has entries for {len(rows)} engines, but there are {engines}: one for each"
            )


def _check_sglang(tier: TierSection) -> None:
    if not tier.model:
        raise ValueError(
            'model is missing: engine = "sglang" needs the path or the hub name of the weights'
        )
    if tier.speed != 1.0:
        raise ValueError("speed is for emulated engines: remove it")
    _check_rows(tier, tier.count)
    for number, row in enumerate(tier.gpus or ()):
        if len(row) % tier.tp or not row:
            raise ValueError(
                f"gpus.{number} has {len(row)} GPUs, but tp is {tier.tp}: give every engine tp of "
                "them"
            )
    for url in tier.urls:
        if urlsplit(url).port is None:
            raise ValueError(f"urls: {url!r} names no port: SGLang needs one to listen on")


def check_cluster(config: Config) -> None:
    """All tiers together."""
    tiers, scheduler = config.tiers, config.scheduler
    seen: set[tuple[str | None, int]] = set()
    for number, tier in enumerate(tiers):
        for url in tier.urls:
            parts = urlsplit(url)
            address = (parts.hostname, parts.port or 80)
            if address in seen:
                raise ValueError(f"tiers.{number}.urls: {url!r} is listed twice: remove one")
            seen.add(address)
    decodes = scheduler.policy != "conserve" or scheduler.tier_mode is TierMode.HOSTING
    if tiers and not decodes and not any(tier.role is Tier.DECODE for tier in tiers):
        raise ValueError(
            'tiers: none has role = "decode": add one, or set scheduler.tier_mode = "hosting"'
        )
    started = [(n, tier) for n, tier in enumerate(tiers) if tier.engine != "attach"]
    for key in ("engine", "page_tokens", "model", "speed", "tp"):
        for number, tier in started[1:]:
            first, other = _value(started[0][1], key), _value(tier, key)
            if first != other:
                raise ValueError(
                    f"tiers.{started[0][0]}.{key} = {_shown(first)}, but tiers.{number}.{key} = "
                    f"{_shown(other)}: engines of one cluster have the same"
                )
    taken: set[str] = set()
    for number, tier in started:
        for gpu in (gpu for row in tier.gpus or () for gpu in row):
            if gpu in taken and not tier.urls:  # with urls they may be on several machines
                raise ValueError(
                    f"tiers.{number}.gpus: {gpu} is given to two engines: an engine has its GPUs "
                    "alone"
                )
            taken.add(gpu)
        keys = {value for name, value in named_flags(tier.flags) if name == "--api-key"}
        if keys and keys != {config.gateway.engine_api_key}:
            raise ValueError(
                f"tiers.{number}.flags has --api-key: write the same key as gateway.engine_api_key"
            )


def _value(tier: TierSection, key: str) -> int | float | str:
    if key == "model":
        return tier.served_name or load_profile(tier.profile or DEFAULT_PROFILE).model
    value: int | float | str = getattr(tier, key)
    return value


def _shown(value: float | str) -> str:
    return repr(value) if isinstance(value, str) else f"{value:g}"
