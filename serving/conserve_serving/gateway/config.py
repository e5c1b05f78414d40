"""The gateway's configuration: one TOML file, every key checked, every setting explained.

    [gateway]     where to listen, limits, time-outs
    [identity]    where a conversation's id is looked for
    [responses]   what the Responses API remembers
    [scheduler]   the policy and its settings
    [[tiers]]     groups of engines: prefillers and decoders, emulated or attached by URL

Unknown keys are refused by name, with the nearest known one suggested.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from conserve_serving.core.policies import POLICIES
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.types import Tier, TierMode
from conserve_serving.engines.profile import list_profiles
from conserve_serving.gateway.config_checks import (
    DEFAULT_PROFILE,
    check_cluster,
    check_headers,
    check_tier,
    check_url,
)
from conserve_serving.gateway.errors import ConfigError
from conserve_serving.gateway.sources import DEFAULT_ORDER, expand


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class GatewaySection(_Section):
    """Where the gateway listens, its limits and its time-outs."""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(
        default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one"
    )
    max_body_bytes: int = Field(
        default=32 * 1024 * 1024, ge=1024, description="largest request body; larger ones get 413"
    )
    max_connections: int = Field(
        default=4096, ge=1, description="clients' connections open at once; further ones get 503"
    )
    handoff_ack_timeout_s: float = Field(
        default=5.0,
        gt=0,
        description="longest wait for the prefiller's store to acknowledge a hand-off, in wall "
        "seconds; after it the decoder prefills by itself (counted as ack_late)",
    )
    stall_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="longest silence of an engine within a turn before it is retried; where the "
        "reply is not streamed, an engine that says it is at work is waited for",
    )
    connect_timeout_s: float = Field(default=2.0, gt=0, description="time to connect to an engine")
    control_timeout_s: float = Field(
        default=5.0,
        gt=0,
        description="time an engine has for control calls: health, loads, sessions, tokenizing",
    )
    poll_interval_s: float = Field(
        default=0.5, gt=0, description="interval at which engines' loads and occupancy are read"
    )
    health_interval_s: float = Field(
        default=1.0,
        gt=0,
        description="interval at which an engine that is not serving is tried again",
    )
    health_failures: int = Field(
        default=3, ge=1, description="polls an engine may miss in a row before it is taken for lost"
    )
    drain_timeout_s: float = Field(
        default=30.0, ge=0, description="time running turns have to finish after SIGTERM"
    )
    max_idle_connections: int = Field(
        default=256, ge=1, description="idle connections kept open to each engine"
    )
    max_conversations: int = Field(
        default=200_000,
        ge=1,
        description="conversations remembered, ended ones included; the longest idle are "
        "forgotten first",
    )
    remember_turns: int = Field(
        default=8,
        ge=0,
        description="latest turns remembered of each conversation, for people to look at",
    )
    placement_key: str | None = Field(
        default=None,
        min_length=16,
        description="secret that signs placement tokens; set it so that they survive a restart "
        "and agree across gateways; default: a new one at each start",
    )
    decision_journal: str | None = Field(
        default=None, description="file to which every event and its decisions are appended"
    )
    engine_api_key: str | None = Field(
        default=None,
        description="sent to engines as 'Authorization: Bearer …' where they ask for a key",
    )
    admin_token: str | None = Field(
        default=None,
        min_length=8,
        description="asked of those who add, drain or remove engines; default: nobody is asked, "
        "so keep the port to a trusted network",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="what is logged to standard error"
    )


class IdentitySection(_Section):
    """Where a conversation's id is looked for; the first that is there wins."""

    aliases: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="further request headers that carry a conversation id. X-Correlation-ID and "
        "X-Client-Request-ID are not looked at unless listed here: in many clients they change "
        "with every request",
    )
    order: tuple[str, ...] = Field(
        default=DEFAULT_ORDER,
        strict=False,
        description="where an id is looked for after X-ConServe-Conversation-ID: groups (aliases, "
        "routers, agents, generic, previous_response, body, baggage, lineage) and single sources "
        "(header:<name>, body:<field>); what is not listed is not looked at",
    )

    @field_validator("aliases")
    @classmethod
    def _legal_aliases(cls, aliases: tuple[str, ...]) -> tuple[str, ...]:
        check_headers(aliases)
        return aliases

    @field_validator("order")
    @classmethod
    def _known_sources(cls, order: tuple[str, ...]) -> tuple[str, ...]:
        expand(order)
        return order

    lineage_entries: int = Field(
        default=200_000,
        ge=1,
        description="prompts remembered to recognise conversations without an id by; oldest "
        "forgotten first",
    )


class ResponsesSection(_Section):
    """What the Responses API remembers, for ``previous_response_id`` and ``conversation``."""

    ttl_s: float = Field(
        default=86_400.0,
        gt=0,
        description="a stored response or conversation is forgotten this long after its last use",
    )
    max_stored: int = Field(
        default=100_000, ge=0, description="responses and conversations stored at most"
    )
    max_stored_bytes: int = Field(
        default=256 * 1024 * 1024,
        ge=0,
        description="bytes of stored responses and histories together, at most; those used "
        "longest ago are forgotten first",
    )


class SchedulerSection(_Section):
    """The policy and its settings. Times are the engines' own seconds: wall seconds × speed."""

    policy: str = Field(default="conserve", description="conserve, collocated or round_robin")

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, policy: str) -> str:
        if policy not in POLICIES:
            raise ValueError(f"no such policy: use one of {', '.join(sorted(POLICIES))}")
        return policy

    tier_mode: TierMode = Field(
        default=TierMode.DEDICATED,
        strict=False,
        description="dedicated: the prefill tier only prefills; hosting: it also holds "
        "conversations",
    )
    handoff_min_tokens: int | None = Field(
        default=None,
        ge=0,
        description="first turns shorter than this stay on their decoder; default: from the costs "
        "measured so far",
    )
    handoff_floor_tokens: int = Field(
        default=256,
        ge=0,
        description="first turns shorter than this are never handed over by cost: engines compute "
        "short hits in the store instead of loading them",
    )
    max_waiting_turns: int = Field(
        default=1024, ge=0, description="new conversations held at once before further ones get 429"
    )
    max_hold_s: float = Field(
        default=60.0, ge=0, description="longest time a turn is held before 429"
    )
    no_engine_hold_s: float = Field(
        default=10.0,
        ge=0,
        description="the same while no engine takes conversations; then 503",
    )
    protect_idle_s: float = Field(
        default=120.0,
        ge=0,
        description="how long an idle conversation's KV is safe from others that find no room, "
        "where the host tier has none left to park it in",
    )
    idle_timeout_s: float = Field(
        default=3600.0, gt=0, description="a conversation without a turn for this long is ended"
    )
    max_attempts: int = Field(
        default=3, ge=1, description="placements a turn may have before it fails"
    )
    headroom: float = Field(
        default=1.0,
        ge=0,
        description="share of the growth observed on live conversations that is kept free",
    )
    output_reserve_tokens: int = Field(
        default=256,
        ge=0,
        description="room reserved for an output until outputs have been observed",
    )

    def settings(self) -> SchedulerSettings:
        """The same for the scheduler."""
        names = [field.name for field in dataclasses.fields(SchedulerSettings)]
        return SchedulerSettings(**{name: getattr(self, name) for name in names})


class TierSection(_Section):
    """One group of equal engines."""

    name: str | None = Field(
        default=None, description="prefix of its engines' ids; default: p or d"
    )
    role: Tier = Field(strict=False, description="prefill or decode")
    engine: Literal["emulated", "attach"] = Field(
        default="emulated",
        description="emulated: `conserve up` starts them; attach: running engines, by URL",
    )
    count: int = Field(default=1, ge=1, le=256, description="engines to start (emulated)")
    urls: tuple[str, ...] = Field(
        default=(), strict=False, description="URLs of the running engines (attach)"
    )
    model: str | None = Field(
        default=None,
        description="served model's name; default: the profile's (emulated) or the engine's",
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
        description="KV tokens in host memory; default: the profile's (emulated), 0 (attach)",
    )
    page_tokens: int = Field(default=64, ge=1, description="KV page size (emulated)")
    speed: float = Field(
        default=1.0, gt=0, description="how many times faster than the wall clock (emulated)"
    )

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

    @model_validator(mode="after")
    def _consistent(self) -> TierSection:
        check_tier(self)
        return self


def _default_tiers() -> tuple[TierSection, ...]:
    return (
        TierSection(role=Tier.PREFILL, count=1, profile=DEFAULT_PROFILE),
        TierSection(role=Tier.DECODE, count=2, profile=DEFAULT_PROFILE),
    )


class Config(_Section):
    """The whole file."""

    gateway: GatewaySection = Field(default_factory=GatewaySection)
    identity: IdentitySection = Field(default_factory=IdentitySection)
    responses: ResponsesSection = Field(default_factory=ResponsesSection)
    scheduler: SchedulerSection = Field(default_factory=SchedulerSection)
    tiers: tuple[TierSection, ...] = Field(default_factory=_default_tiers, strict=False)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        check_cluster(self)
        return self


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting, as ``conserve config --explain`` shows it."""

    section: str
    name: str
    type: str
    default: str
    description: str


_SECTIONS: dict[str, type[_Section]] = {
    "gateway": GatewaySection,
    "identity": IdentitySection,
    "responses": ResponsesSection,
    "scheduler": SchedulerSection,
    "tiers": TierSection,
}


def explain() -> Iterator[Setting]:
    """Every setting with its type, default and description, in the file's order."""
    for section, model in _SECTIONS.items():
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else _toml(field.default)
            annotation = str(field.annotation)
            if annotation.startswith("<"):  # a plain class prints as <class 'x.Y'>
                annotation = getattr(field.annotation, "__name__", annotation)
            annotation = annotation.replace("tuple[str, ...]", "list of str")
            yield Setting(
                section=f"[[{section}]]" if section == "tiers" else f"[{section}]",
                name=name,
                type=annotation.replace("typing.", ""),
                default=default,
                description=field.description or "",
            )


def _toml(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def load_config(path: Path) -> Config:
    """Read and check a configuration file.

    Raises:
        ConfigError: the file is missing, no TOML, or holds an unknown or illegal key; the message
            names every one of them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give an existing TOML file") from error
    return parse_config(text, origin=str(path))


def parse_config(text: str, *, origin: str = "configuration") -> Config:
    """Check a configuration given as TOML text. Raises ``ConfigError`` like `load_config`."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not TOML: {error}") from error
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = [_explain_error(dict(item)) for item in error.errors()]
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from error


def _explain_error(error: dict[str, Any]) -> str:
    path = list(error["loc"])
    where = ".".join(str(part) for part in path)
    if error["type"] == "extra_forbidden":
        section = _SECTIONS.get(str(path[0])) if len(path) > 1 else None
        known = list(section.model_fields) if section else list(_SECTIONS)
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where!r}: {hint}"
    if error["type"] == "missing":
        return f"{where!r} is missing: add it"
    if path == ["tiers"] and isinstance(error["input"], dict):
        return "'tiers': write [[tiers]], once for each tier, instead of [tiers]"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = "" if isinstance(error["input"], dict) else f" (it is {error['input']!r})"
    return f"{where or 'file'!r}: {message}{given}"
