"""The sections that say what runs: tiers of engines, and how they hand KV over."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from conserve_serving.core.types import Tier
from conserve_serving.engines.profile import list_profiles
from conserve_serving.engines.sglang.flags import (
    DEFAULT_PREFETCH_THRESHOLD_TOKENS,
    OPTIONAL_FLAGS,
    check_flags,
    check_omit,
)
from conserve_serving.gateway.config_checks import (
    DEFAULT_PROFILE,
    check_extra,
    check_tier,
    check_url,
    complete_tier,
)


class Section(BaseModel):
    """A section of the file: unknown keys are refused, and it does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class HandoffSection(Section):
    """How SGLang engines that `conserve` starts hand KV over; attached ones have own flags."""

    transport: Literal["file", "mooncake", "nixl"] = Field(
        default="file",
        description="what carries the pages: files in a folder that all engines share, or SGLang's "
        "own Mooncake or NIXL back end",
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="folder of the file transport; engines on several machines need one on a file "
        "system they share. Default: a new one in shared memory, or in the run folder where that "
        "is small; removed at the end",
    )
    max_bytes: int | None = Field(
        default=None,
        ge=1,
        description="most that pages in the store may take; default: half of what is free where "
        "path is (in shared memory: a quarter of the memory that is free)",
    )
    max_age_s: float = Field(
        default=3600.0,
        gt=0,
        description="conversations without a new page for this long are removed from the store; "
        "those that end are removed at once",
    )
    prefetch_threshold_tokens: int = Field(
        default=DEFAULT_PREFETCH_THRESHOLD_TOKENS,
        ge=16,
        description="shorter hits in the store are computed instead of loaded; keep "
        "scheduler.handoff_floor_tokens at least as large",
    )
    ack_url: str | None = Field(
        default=None,
        description="where prefillers' stores acknowledge hand-offs: the gateway's "
        "/conserve/v1/handoffs as those machines reach it. Default: from gateway.host and port",
    )
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="further keys of the store's configuration: those of the mooncake or nixl "
        "back end, and SGLang's own (prefetch_timeout_base …)",
    )

    @field_validator("extra")
    @classmethod
    def _free_keys(cls, extra: dict[str, Any]) -> dict[str, Any]:
        check_extra(extra)
        return extra

    @field_validator("ack_url")
    @classmethod
    def _legal_ack_url(cls, url: str | None) -> str | None:
        if url is not None:
            check_url(url, path=True)
        return url


class TierSection(Section):
    """One group of equal engines."""

    name: str | None = Field(
        default=None, description="prefix of its engines' ids; default: p or d"
    )
    role: Tier = Field(strict=False, description="prefill or decode")
    engine: Literal["emulated", "sglang", "attach"] = Field(
        default="emulated",
        description="emulated, sglang: `conserve up` starts them; attach: running engines, by URL",
    )
    count: int = Field(
        default=1,
        ge=1,
        le=256,
        description="engines to start (emulated, sglang); default: one for each entry of gpus or "
        "urls, else 1",
    )
    urls: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="attach: URLs of the running engines. sglang: where each engine listens; those "
        "on other machines are started there, with `conserve engine`. Default there: free ports "
        "of this machine",
    )
    model: str | None = Field(
        default=None,
        description="sglang: path or hub name of the weights, required. Else the served model's "
        "name; default: the profile's (emulated) or the engine's",
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="what clients call the model (sglang); default: model",
    )
    profile: str | None = Field(
        default=None,
        description="hardware profile: what an emulated engine runs on, and the speeds an "
        "attached engine is believed to have until it has been observed",
    )
    kv_capacity_tokens: int | None = Field(
        default=None, ge=1, description="KV tokens on the device; default: the profile's (emulated)"
    )
    host_capacity_tokens: int | None = Field(
        default=None,
        ge=0,
        description="KV tokens in host memory; default: the profile's (emulated), else 0",
    )
    page_tokens: int = Field(default=64, ge=1, description="KV page size (emulated, sglang)")
    speed: float = Field(
        default=1.0, gt=0, description="how many times faster than the wall clock (emulated)"
    )
    gpus: tuple[tuple[str, ...], ...] | None = Field(
        default=None,
        strict=False,
        description="GPUs of each engine, by number or UUID: [0, 1] for one each, "
        "[[0, 1], [2, 3]] for several. sglang: what it runs on; default: the next free ones of "
        "this machine, tp for each engine; [] leaves CUDA_VISIBLE_DEVICES as it is. attach: those "
        "of this machine, whose energy is measured; [] for an engine elsewhere",
    )
    tp: int = Field(
        default=1,
        ge=1,
        description="tensor-parallel size (sglang); default: as many GPUs as gpus gives an engine",
    )
    host_kv_gb: int | None = Field(
        default=None,
        ge=1,
        description="host memory for KV, 10^9 bytes for each rank of an engine (sglang); default: "
        "twice the device's, or what fits",
    )
    python: str | None = Field(
        default=None,
        min_length=1,
        description="interpreter of the environment that has SGLang; default: the one that runs "
        "`conserve`",
    )
    flags: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="further flags for SGLang, flag and value as two items; those that would break "
        "the hand-off are refused",
    )
    omit: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="flags that `conserve` adds and this model or machine cannot have: "
        + ", ".join(OPTIONAL_FLAGS),
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="further environment variables (sglang)"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="SGLang's log level"
    )
    ready_timeout_s: float = Field(
        default=900.0, gt=0, description="how long an engine may take to come up (sglang)"
    )

    @model_validator(mode="before")
    @classmethod
    def _follow_from_others(cls, data: Any) -> Any:
        """``count`` and ``tp`` follow from ``gpus`` and ``urls`` where they are not given."""
        return complete_tier(data)

    @field_validator("profile")
    @classmethod
    def _known_profile(cls, profile: str | None) -> str | None:
        if profile is not None and profile not in list_profiles():
            raise ValueError(f"no such profile: use one of {', '.join(list_profiles())}")
        return profile

    @field_validator("urls")
    @classmethod
    def _legal_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            check_url(url)
        return urls

    @field_validator("flags")
    @classmethod
    def _legal_flags(cls, flags: tuple[str, ...]) -> tuple[str, ...]:
        check_flags(flags)
        return flags

    @field_validator("omit")
    @classmethod
    def _legal_omit(cls, omit: tuple[str, ...]) -> tuple[str, ...]:
        check_omit(omit)
        return omit

    @model_validator(mode="after")
    def _consistent(self) -> TierSection:
        check_tier(self)
        return self

    @property
    def served_name(self) -> str | None:
        """The name its engines serve their model under; None: whatever they say."""
        return self.served_model_name or self.model


def default_tiers() -> tuple[TierSection, ...]:
    """One prefiller and two decoders, emulated: what runs when nothing is said."""
    return (
        TierSection(role=Tier.PREFILL, count=1, profile=DEFAULT_PROFILE),
        TierSection(role=Tier.DECODE, count=2, profile=DEFAULT_PROFILE),
    )
