"""What one setting alone cannot show: settings that contradict each other or the world.

Each function raises ``ValueError`` with a message that names the keys and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from conserve_serving.core.types import Tier, TierMode
from conserve_serving.engines.profile import load_profile
from conserve_serving.gateway.sources import HEADER_NAME

if TYPE_CHECKING:
    from conserve_serving.gateway.config import Config, TierSection

#: What an emulated engine runs when its tier names no profile.
DEFAULT_PROFILE: Final = "a40-qwen3-0.6b"


def check_headers(names: Sequence[str]) -> None:
    """Names of request headers must be such."""
    for name in names:
        if not HEADER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no header's name: letters, digits and hyphens")


def check_url(url: str) -> None:
    """An engine's URL must be an address and nothing else."""
    parts = urlsplit(url)
    try:
        legal = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no legal port
        legal = False
    if not legal or parts.path not in ("", "/") or parts.query or parts.fragment or parts.username:
        raise ValueError(f"{url!r} is not of the form http://host:port")


def check_tier(tier: TierSection) -> None:
    """One tier by itself."""
    if tier.engine == "attach":
        if not tier.urls:
            raise ValueError('urls is missing: engine = "attach" needs the engines\' URLs')
        return
    if tier.urls:
        raise ValueError(
            'urls is given, but engine is "emulated": write engine = "attach", or remove urls'
        )
    if tier.kv_capacity_tokens is not None and tier.kv_capacity_tokens < tier.page_tokens:
        raise ValueError(
            f"kv_capacity_tokens = {tier.kv_capacity_tokens} is less than one page: make it at "
            f"least page_tokens = {tier.page_tokens}"
        )


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
    emulated = [(n, tier) for n, tier in enumerate(tiers) if tier.engine == "emulated"]
    for key in ("page_tokens", "model", "speed"):
        for number, tier in emulated[1:]:
            first, other = _value(emulated[0][1], key), _value(tier, key)
            if first != other:
                raise ValueError(
                    f"tiers.{emulated[0][0]}.{key} = {_shown(first)}, but tiers.{number}.{key} = "
                    f"{_shown(other)}: engines of one cluster have the same"
                )


def _value(tier: TierSection, key: str) -> int | float | str:
    if key == "model":
        return tier.model or load_profile(tier.profile or DEFAULT_PROFILE).model
    return tier.page_tokens if key == "page_tokens" else tier.speed


def _shown(value: float | str) -> str:
    return repr(value) if isinstance(value, str) else f"{value:g}"
