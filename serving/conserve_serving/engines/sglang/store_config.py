"""The store's settings, as they stand in ``--hicache-storage-backend-extra-config``.

Loaded inside SGLang: standard library only. Keys that SGLang itself reads are passed over; keys of
a transport (``mooncake``, ``nixl``) are left to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from conserve_serving.engines.sglang.errors import StoreConfigError

TRANSPORTS: Final = ("file", "mooncake", "nixl")
ROLES: Final = ("prefill", "decode", "both")

#: Read by SGLang: the factory, the cache controller, the tree.
_SGLANGS: Final = frozenset(
    {
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "hicache_storage_pass_prefix_keys",
        "tp_lcm_size",
    }
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Settings of one engine's store.

    Attributes:
        role: ``prefill`` stores pages and acknowledges them; ``decode`` reads, and storing is a
            successful no-op; ``both`` does all of it.
        engine: this engine's id at the gateway.
        ack_url: where the gateway takes acknowledgements; needed to store.
        transport: what carries the pages.
        path: folder shared by all engines of the cluster (``file``).
        max_bytes: most that pages may take (``file``).
        max_age_s: conversations without a new page for this long are forgotten (``file``).
        unclaimed_age_s: the same for pages that belong to no conversation.
        grace_s: younger conversations are never given up for room: their decoder may be reading.
        collect_interval_s: pause between two rounds of that.
        expect_timeout_s: longest wait for the rest of a prompt's pages before it is reported.
    """

    role: str
    engine: str
    ack_url: str = ""
    transport: str = "file"
    path: str = ""
    max_bytes: int = 64 * 1024**3
    max_age_s: float = 3600.0
    unclaimed_age_s: float = 60.0
    grace_s: float = 30.0
    collect_interval_s: float = 5.0
    expect_timeout_s: float = 30.0

    @property
    def stores(self) -> bool:
        """Whether this engine writes pages."""
        return self.role != "decode"


def parse(extra: Mapping[str, Any] | None) -> StoreConfig:
    """Check the settings.

    Raises:
        StoreConfigError: one is unknown, missing, or of the wrong kind; it names it.
    """
    given = {key: value for key, value in (extra or {}).items() if key not in _SGLANGS}
    fields = {field.name: field for field in dataclasses.fields(StoreConfig)}
    transport = given.get("transport", "file")
    if transport not in TRANSPORTS:
        raise StoreConfigError(f"transport is {transport!r}: use one of {', '.join(TRANSPORTS)}")
    if transport == "file":
        for key in given:
            if key not in fields:
                raise StoreConfigError(f"unknown setting {key!r}: use {', '.join(sorted(fields))}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in given:
            values[name] = _typed(name, given[name], str(field.type))
        elif field.default is dataclasses.MISSING:
            raise StoreConfigError(f"{name} is missing: add it to the extra config")
    config = StoreConfig(**values)
    _check(config)
    return config


def _typed(name: str, value: object, kind: str) -> object:
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if kind == "float" and isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
        if 0 <= number < float("inf"):
            return number
    what = {"str": "a string", "int": "a positive integer", "float": "a number of seconds"}[kind]
    raise StoreConfigError(f"{name} is {value!r}: give {what}")


def _check(config: StoreConfig) -> None:
    if config.role not in ROLES:
        raise StoreConfigError(f"role is {config.role!r}: use one of {', '.join(ROLES)}")
    if not config.engine:
        raise StoreConfigError("engine is empty: give the engine's id at the gateway")
    if config.transport == "file" and not config.path:
        raise StoreConfigError("path is missing: give the folder that all engines share")
    if not config.stores:
        return
    try:
        parts = urlsplit(config.ack_url)
        usable = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise StoreConfigError(
            f"ack_url is {config.ack_url!r}: give the gateway's, "
            "http://host:port/conserve/v1/handoffs"
        )
