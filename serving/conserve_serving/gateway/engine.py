"""One engine as the gateway sees it, and what is believed of it before it has been observed."""

from __future__ import annotations

import asyncio
from typing import Final

from conserve_serving.core.types import EngineId, EngineSpeeds, Link, Tier
from conserve_serving.engines.client import EngineClient
from conserve_serving.engines.client_types import EngineDescription, Loads, Occupancy
from conserve_serving.engines.profile import load_profile
from conserve_serving.gateway.config import TierSection
from conserve_serving.gateway.observe import MixedSteps

#: Believed of an attached engine without a profile, until it has been observed: an 8B model on
#: one large GPU, in round figures. Reports soon outweigh it.
_UNKNOWN_SPEEDS: Final = EngineSpeeds(
    prefill_tokens_per_s=10_000.0, decode_step_s=0.015, decode_step_s_per_kv_token=2e-8
)
_UNKNOWN_LINK: Final = Link(setup_s=0.02, bytes_per_s=10e9, kv_bytes_per_token=131_072)


class Engine:
    """One engine as the gateway sees it.

    Attributes:
        state: ``joining``, ``ready``, ``draining``, ``lost`` or ``unfit``.
        note: why it does not serve, for people.
        gpus: GPUs of this machine it runs on, by number or UUID, where that is known.
        energy_j, energy_source, model_time_s: an emulated engine's own figures.
        active_tokens: context of the turns the gateway runs there, estimated.
        ended_tokens, ended: the same of the turns that ended since the last report.
        last_byte_s: when it last answered anything (wall).
    """

    def __init__(
        self,
        id: EngineId,
        url: str,
        section: TierSection,
        client: EngineClient,
        *,
        gpus: tuple[str, ...] = (),
    ) -> None:
        self.id = id
        self.url = url
        self.tier: Tier = section.role
        self.section = section
        self.client = client
        self.gpus = gpus
        self.state = "joining"
        self.note: str | None = None
        self.epoch = 0
        self.description: EngineDescription | None = None
        self.loads: Loads | None = None
        self.occupancy: Occupancy | None = None
        self.energy_j: float | None = None
        self.energy_source: str | None = None
        self.model_time_s: float | None = None
        self.running = 0
        self.active_tokens = 0
        self.ended_tokens = 0
        self.ended = 0
        self.last_byte_s = 0.0
        self.mixed = MixedSteps()
        self.misses = 0
        self.drain_wanted = False
        self.keeps_sessions = False
        self.told_no_cache_report = False
        self.probe: asyncio.Task[None] | None = None
        self.watcher: asyncio.Task[None] | None = None

    @property
    def serving(self) -> bool:
        """Whether it may be sent turns."""
        return self.state in ("ready", "draining")

    @property
    def has_store(self) -> bool:
        """Whether it runs our hand-off store and plug-in."""
        return self.description is not None and self.description.handoff_role is not None

    def turn_started(self, context_tokens: int) -> None:
        """A turn with this much context was sent there."""
        self.running += 1
        self.active_tokens += context_tokens

    def turn_ended(self, context_tokens: int) -> None:
        """The same turn is no longer there."""
        self.running -= 1
        self.active_tokens -= context_tokens
        self.ended += 1
        self.ended_tokens += context_tokens

    def take_mean_context_tokens(self) -> float:
        """Mean context of the turns that ran since the last call; 0 when there were none."""
        turns, tokens = self.running + self.ended, self.active_tokens + self.ended_tokens
        self.ended = self.ended_tokens = 0
        return tokens / turns if turns else 0.0

    @property
    def page_tokens(self) -> int:
        """KV page size; 1 while it is not known."""
        return self.description.page_tokens if self.description is not None else 1

    def priority(self, priority: int) -> int | None:
        """The value to send for a priority (larger first); None where it takes none."""
        return None if self.description is None else self.description.priority_field(priority)


def priors(section: TierSection, description: EngineDescription) -> tuple[EngineSpeeds, Link]:
    """What is believed of an engine's costs before it has reported anything."""
    if description.emulated is not None:
        return description.emulated.speeds, description.emulated.link
    if section.profile is not None:
        profile = load_profile(section.profile)  # known: checked with the configuration
        return profile.speeds(), profile.link()
    return _UNKNOWN_SPEEDS, _UNKNOWN_LINK
