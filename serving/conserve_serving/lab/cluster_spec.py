"""A cluster as data: which engines, over which link, at what rent and rated power.

A cluster becomes the simulator's engines with :meth:`ClusterSpec.engines`; what it can carry of a
workload is in ``capacity.py``. Those that have a name, and files of one's own: ``clusters.py``.
"""

from __future__ import annotations

import re
from typing import Any, Final, Literal, Self

import msgspec

from conserve_serving.core.types import EngineId, Tier
from conserve_serving.engines.errors import ProfileError
from conserve_serving.engines.model_types import ModelConfig
from conserve_serving.engines.profile import HardwareProfile, Part, PowerLevel, load_profile
from conserve_serving.lab.boards import LinkSpec, board_of, find_link
from conserve_serving.lab.errors import ClusterError
from conserve_serving.lab.toml_data import Data
from conserve_serving.simulator.cluster import SimulatedEngine

#: Watts of host (processors, memory, fans, NICs) per GPU: assumed, 25 to 50 % of it either way.
#: Splitwise's DGX figures, 1,500 W idle with eight GPUs, give a similar share.
HOST_W_PER_GPU: Final = 75.0

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.@_-]*")


class EngineGroup(Data, frozen=True):
    """Equal engines of one tier.

    Attributes:
        count: how many.
        tier: what they were bought for.
        profile: name of a hardware profile; tensor parallelism is the profile's.
        cap_w: power limit of each board; None: its rated power.
        cap_exponent: what the limit costs decode in time (``PowerModel``): 1 all it is short of
            power, 0 nothing.
    """

    count: int
    tier: Tier
    profile: str
    cap_w: float | None = None
    cap_exponent: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a group of none."""
        if self.count < 1:
            raise ValueError(f"count is {self.count}: leave the group out")

    def hardware(self) -> HardwareProfile:
        """The profile, limited to ``cap_w``.

        Raises:
            ProfileError: there is none of that name, or it cannot be limited so.
        """
        profile = load_profile(self.profile)
        if self.cap_w is None:
            return profile
        return profile.capped(self.cap_w, exponent=self.cap_exponent)

    @property
    def tensor_parallel(self) -> int:
        """Boards of one engine."""
        return load_profile(self.profile).tensor_parallel

    @property
    def boards(self) -> int:
        """Boards of all engines."""
        return self.count * self.tensor_parallel


class ClusterSpec(Data, frozen=True):
    """A cluster: JSON-able with ``msgspec``, and all there is to know about it.

    Attributes:
        name: what it is chosen by.
        title: one line for people.
        groups: its engines, prefill tier first.
        link: name of a link (:func:`list_links`), a link, or None: each profile's own hand-off.
        usd_per_hour: rent of one GPU by the profiles' name of it, where it is not the board's.
    """

    name: str
    title: str
    groups: tuple[EngineGroup, ...]
    link: str | LinkSpec | None = None
    usd_per_hour: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Refuse clusters that cannot serve, naming the field."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r}: lower-case letters, digits and . @ _ - only")
        if not any(group.tier is Tier.DECODE for group in self.groups):
            raise ValueError(f"cluster {self.name}: groups needs a decode tier")
        try:
            profiles = [group.hardware() for group in self.groups]
        except ProfileError as error:
            raise ValueError(f"cluster {self.name}: {error}") from error
        models = sorted({profile.model for profile in profiles})
        if len(models) > 1:
            raise ValueError(
                f"cluster {self.name}: groups serve {' and '.join(models)}; KV can only be handed "
                "over between engines of one model"
            )
        gpus = {profile.gpu for profile in profiles}
        for gpu, usd in self.usd_per_hour:
            if gpu not in gpus:
                raise ValueError(
                    f"cluster {self.name}: usd_per_hour names {gpu!r}, its GPUs are "
                    f"{', '.join(sorted(gpus))}"
                )
            if usd <= 0:
                raise ValueError(
                    f"cluster {self.name}: usd_per_hour of {gpu} is {usd}: it must be positive"
                )

    @property
    def model(self) -> str:
        """The model that every engine serves."""
        return load_profile(self.groups[0].profile).model

    @property
    def boards(self) -> int:
        """GPU boards."""
        return sum(group.boards for group in self.groups)

    @property
    def engine_count(self) -> int:
        """Engines of both tiers."""
        return sum(group.count for group in self.groups)

    @property
    def longest_context_tokens(self) -> int:
        """The longest context that every engine can hold."""
        profiles = [load_profile(group.profile) for group in self.groups]
        return min(min(one.max_context_tokens, one.kv_capacity_tokens) for one in profiles)

    @property
    def dollars_per_hour(self) -> float:
        """Rent of all boards."""
        own = dict(self.usd_per_hour)
        total = 0.0
        for group in self.groups:
            gpu = load_profile(group.profile).gpu
            total += group.boards * own.get(gpu, board_of(gpu).price.usd_per_hour)
        return total

    def dollars_between(self) -> tuple[float, float]:
        """Rent at the lowest and at the highest offer found; own prices count as they are."""
        own = dict(self.usd_per_hour)
        low = high = 0.0
        for group in self.groups:
            gpu = load_profile(group.profile).gpu
            price = board_of(gpu).price
            low += group.boards * own.get(gpu, price.low_usd_per_hour)
            high += group.boards * own.get(gpu, price.high_usd_per_hour)
        return low, high

    @property
    def rated_w(self) -> float:
        """Watts the boards may draw together: rated, or limited. The host is not in it."""
        total = 0.0
        for group in self.groups:
            rated_w = board_of(load_profile(group.profile).gpu).rated_w
            limit_w = rated_w if group.cap_w is None else min(rated_w, group.cap_w)
            total += group.boards * limit_w
        return total

    @property
    def rated_with_host_w(self) -> float:
        """The same with each board's share of its host."""
        return self.rated_w + self.boards * HOST_W_PER_GPU

    def engines(
        self,
        *,
        mixed_slowdown: float = 1.0,
        link: str | LinkSpec | None = None,
        power: PowerLevel | Literal["low", "mid", "high"] = PowerLevel.MID,
        config: ModelConfig | None = None,
    ) -> list[SimulatedEngine]:
        """The engines, prefill tier first, ids ``p0``, ``p1``, … and ``d0``, ``d1``, ….

        Args:
            mixed_slowdown: time of a step that prefills and decodes over the sum of the two.
            link: instead of the cluster's.
            power: which end of each power model's band.
            config: how every engine is set up; None: it writes to the hand-off store (any engine
                may hand KV over: a prefiller its prompts, a decoder a context that moves) and
                reports whole turns only.

        Raises:
            ClusterError: the link is not known, or a figure is impossible.
        """
        setup = config or ModelConfig(store_writes=True, token_events=False)
        chosen = link if link is not None else self.link
        carried = find_link(chosen) if isinstance(chosen, str) else chosen
        number = dict.fromkeys(Tier, 0)
        engines = []
        for group in sorted(self.groups, key=lambda group: group.tier is not Tier.PREFILL):
            profile = group.hardware()
            changes: dict[str, Any] = {"mixed_slowdown": mixed_slowdown}
            if carried is not None:
                changes["handoff"] = carried.handoff(profile.tensor_parallel)
                part = Part(confidence=carried.confidence, source=carried.source)
                changes["parts"] = profile.parts | {"handoff": part}
            if PowerLevel(power) is not PowerLevel.MID:
                changes["power"] = profile.power_at(PowerLevel(power))
            try:
                profile = profile.replace(**changes)
            except ProfileError as error:
                raise ClusterError(f"cluster {self.name}: {error}") from error
            for _ in range(group.count):
                identity = EngineId(f"{group.tier.value[0]}{number[group.tier]}")
                number[group.tier] += 1
                engines.append(
                    SimulatedEngine(id=identity, tier=group.tier, profile=profile, config=setup)
                )
        return engines

    def with_ratio(self, prefill: int, decode: int) -> Self:
        """As many engines of each tier instead; each tier must be one group.

        Raises:
            ClusterError: a tier has several groups, or would be needed and is not there.
        """
        wanted = {Tier.PREFILL: prefill, Tier.DECODE: decode}
        groups = []
        for tier, count in wanted.items():
            found = [group for group in self.groups if group.tier is tier]
            if len(found) > 1 or (count and not found):
                raise ClusterError(
                    f"cluster {self.name} has {len(found)} groups of tier {tier.value}: "
                    "with_ratio needs exactly 1"
                )
            if count:
                groups.append(msgspec.structs.replace(found[0], count=count))
        return self._changed(
            name=f"{self.name}@{prefill}p{decode}d",
            title=f"{self.title}, {prefill} + {decode}",
            groups=tuple(groups),
        )

    def with_link(self, link: str | LinkSpec) -> Self:
        """The same engines over another link.

        Raises:
            ClusterError: the link is not known.
        """
        name = link if isinstance(link, str) else "own-link"
        if isinstance(link, str):
            find_link(link)
        return self._changed(name=f"{self.name}@{name}", link=link)

    def with_prices(self, usd_per_hour: dict[str, float]) -> Self:
        """The same engines at other rents: USD per hour by the profiles' name of the GPU."""
        prices = tuple(sorted((dict(self.usd_per_hour) | usd_per_hour).items()))
        return self._changed(usd_per_hour=prices)

    def _changed(self, **changes: Any) -> Self:
        try:
            return msgspec.structs.replace(self, **changes)
        except (TypeError, ValueError) as error:
            raise ClusterError(str(error)) from error
