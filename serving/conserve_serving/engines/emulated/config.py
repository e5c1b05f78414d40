"""Settings of one emulated engine."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

from conserve_serving.engines.emulated.errors import EngineConfigError


class Role(enum.StrEnum):
    """What the engine does with the hand-off store: write, read, or both."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def writes(self) -> bool:
        """Whether prompts computed here are stored."""
        return self is not Role.DECODE

    @property
    def reads(self) -> bool:
        """Whether prompts are looked up in the store."""
        return self is not Role.PREFILL


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an emulated engine is started.

    Attributes:
        profile: name of a hardware profile (``engines/profiles``).
        model_name: served model name; also part of the store's stamp.
        engine_id: how this engine names itself in hand-off acknowledgements.
        host, port: where to listen; port 0 takes a free one.
        speed: model seconds per wall-clock second.
        role: see :class:`Role`.
        page_tokens: KV page size.
        store_dir: folder of the hand-off store; None: no hand-off.
        ack_url: where acknowledgements are posted; None: nowhere.
        kv_capacity_tokens, host_capacity_tokens: smaller pools than the profile's; None: its own.
        max_running_requests: requests on the device at once.
        session_protection: whether KV of open sessions is evicted last.
        dtype: KV data type, part of the store's stamp.
        store_max_age_s, store_max_files: older or more hand-offs than this are removed.
    """

    profile: str = "a40-qwen3-0.6b"
    model_name: str = "emulated"
    engine_id: str = "engine"
    host: str = "127.0.0.1"
    port: int = 0
    speed: float = 1.0
    role: Role = Role.BOTH
    page_tokens: int = 64
    store_dir: Path | None = None
    ack_url: str | None = None
    kv_capacity_tokens: int | None = None
    host_capacity_tokens: int | None = None
    max_running_requests: int = 256
    session_protection: bool = True
    dtype: str = "bfloat16"
    store_max_age_s: float = 900.0
    store_max_files: int = 4096

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "role", Role(self.role))  # plain strings are welcome
        except ValueError:
            known = ", ".join(repr(role.value) for role in Role)
            raise EngineConfigError(f"role is {self.role!r}: give one of {known}") from None
        if not self.speed > 0:
            raise EngineConfigError(
                f"speed is {self.speed}: give a positive factor (1.0: real time)"
            )
        if self.page_tokens <= 0:
            raise EngineConfigError(f"page_tokens is {self.page_tokens}: give a positive page size")
        if not 0 <= self.port <= 65535:
            raise EngineConfigError(f"port is {self.port}: give 0 (any free port) … 65535")
        if self.ack_url is not None and not self.ack_url.startswith("http://"):
            raise EngineConfigError(f"ack_url is {self.ack_url!r}: give an http:// address")
        for name in ("kv_capacity_tokens", "host_capacity_tokens"):
            value = getattr(self, name)
            if value is not None and value < (1 if name.startswith("kv") else 0):
                raise EngineConfigError(f"{name} is {value}: give a positive number of tokens")
