"""The gateway's configuration: one TOML file, every key checked, every setting explained.

    [gateway]     where to listen, limits, time-outs
    [identity]    where a conversation's id is looked for
    [responses]   what the Responses API remembers
    [scheduler]   the policy and its settings
    [handoff]     how SGLang engines that `conserve` starts hand KV over
    [[tiers]]     groups of engines: prefillers and decoders; emulated, SGLang, or attached by URL

Unknown keys are refused by name, with the nearest known one suggested.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from conserve_serving.core.policies import POLICIES
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.types import TierMode
from conserve_serving.gateway.config_checks import check_cluster, check_headers, with_engine
from conserve_serving.gateway.config_tiers import (
    HandoffSection,
    Section,
    TierSection,
    default_tiers,
)
from conserve_serving.gateway.errors import ConfigError
from conserve_serving.gateway.sources import DEFAULT_ORDER, expand


class GatewaySection(Section):
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
    energy_period_s: float = Field(
        default=0.1,
        ge=0.01,
        le=10.0,
        description="interval at which the energy counters (or the power) of the engines' GPUs are "
        "read, where tiers name GPUs of this machine",
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


class IdentitySection(Section):
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


class ResponsesSection(Section):
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


class SchedulerSection(Section):
    """The policy and its settings. Times are the engines' own seconds: wall seconds × speed."""

    policy: str = Field(
        default="conserve", description="conserve, or a baseline: see docs/policies.md"
    )

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
        "conversations; auto: whichever carries more, where the policy can tell (conserve_plus)",
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
    review_interval_s: float = Field(
        default=10.0,
        gt=0,
        description="how often it is judged which carries more (tier mode auto)",
    )

    def settings(self) -> SchedulerSettings:
        """The same for the scheduler."""
        # This driver moves KV through the hand-off store, to which decoders do not write theirs.
        names = [f.name for f in dataclasses.fields(SchedulerSettings) if f.name != "copies"]
        return SchedulerSettings(**{name: getattr(self, name) for name in names})


class Config(Section):
    """The whole file."""

    gateway: GatewaySection = Field(default_factory=GatewaySection)
    identity: IdentitySection = Field(default_factory=IdentitySection)
    responses: ResponsesSection = Field(default_factory=ResponsesSection)
    scheduler: SchedulerSection = Field(default_factory=SchedulerSection)
    handoff: HandoffSection = Field(default_factory=HandoffSection)
    tiers: tuple[TierSection, ...] = Field(default_factory=default_tiers, strict=False)

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


_SECTIONS: dict[str, type[Section]] = {
    "gateway": GatewaySection,
    "identity": IdentitySection,
    "responses": ResponsesSection,
    "scheduler": SchedulerSection,
    "handoff": HandoffSection,
    "tiers": TierSection,
}


def explain() -> Iterator[Setting]:
    """Every setting with its type, default and description, in the file's order."""
    for section, model in _SECTIONS.items():
        for name, field in model.model_fields.items():
            value = {} if field.default_factory is dict else field.default
            default = "required" if field.is_required() else _toml(value)
            annotation = str(field.annotation)
            if annotation.startswith("<"):  # a plain class prints as <class 'x.Y'>
                annotation = getattr(field.annotation, "__name__", annotation)
            annotation = annotation.replace("tuple[str, ...]", "list of str")
            annotation = annotation.replace("tuple[list of str, ...]", "list of lists")
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
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def load_config(path: Path, *, engine: str | None = None) -> Config:
    """Read and check a configuration file.

    Args:
        path: the file.
        engine: ``sglang`` or ``emulated`` where the command line says so: what tiers run that do
            not attach to engines.

    Raises:
        ConfigError: the file is missing, no TOML, or holds an unknown or illegal key; the message
            names every one of them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give an existing TOML file") from error
    return parse_config(text, origin=str(path), engine=engine)


def parse_config(text: str, *, origin: str = "configuration", engine: str | None = None) -> Config:
    """Check a configuration given as TOML text. Raises ``ConfigError`` like `load_config`."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not TOML: {error}") from error
    try:
        return Config.model_validate(data if engine is None else with_engine(data, engine))
    except ValidationError as error:
        lines = [_explain_error(dict(item)) for item in error.errors()]
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from error
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from error


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


__all__ = [
    "Config",
    "GatewaySection",
    "HandoffSection",
    "IdentitySection",
    "SchedulerSection",
    "Setting",
    "TierSection",
    "explain",
    "load_config",
    "parse_config",
]
