"""Clusters as data: which engines, over which link, at what rent and rated power.

``clusters.toml`` has the ones that come with the package, a file of your own has yours in the same
format (``docs/clusters.md``). A cluster becomes the simulator's engines with
:meth:`ClusterSpec.engines`; what a cluster can carry of a workload is in ``capacity.py``.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

import msgspec

from conserve_serving.core.types import EngineId, Tier
from conserve_serving.engines.errors import ProfileError
from conserve_serving.engines.model_types import ModelConfig
from conserve_serving.engines.profile import (
    Confidence,
    HandoffAffine,
    HardwareProfile,
    Part,
    PowerLevel,
    load_profile,
)
from conserve_serving.lab.errors import ClusterError
from conserve_serving.simulator.cluster import SimulatedEngine

#: Watts of host (processors, memory, fans, NICs) per GPU: assumed, 25 to 50 % of it either way.
#: Splitwise's DGX figures, 1,500 W idle with eight GPUs, give a similar share.
HOST_W_PER_GPU: Final = 75.0

_File = TypeVar("_File", bound="_OwnFile")
_Value = TypeVar("_Value")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.@_-]*")


class _Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything in a cluster file: frozen, unknown keys refused by name."""


class Price(_Data, frozen=True):
    """Rent of one GPU with its share of the host.

    Attributes:
        usd_per_hour: what is counted.
        low_usd_per_hour, high_usd_per_hour: how far other offers go.
        date: when it was asked, ISO format.
        confidence: ``published`` (a list price) or ``assumed``.
        source: who asked it, and who recorded it.
    """

    usd_per_hour: float
    low_usd_per_hour: float
    high_usd_per_hour: float
    date: str
    confidence: Literal["published", "assumed"]
    source: str

    def __post_init__(self) -> None:
        """Refuse a range that does not hold its price."""
        if not 0 < self.low_usd_per_hour <= self.usd_per_hour <= self.high_usd_per_hour:
            raise ValueError("low_usd_per_hour ≤ usd_per_hour ≤ high_usd_per_hour, all positive")


class Board(_Data, frozen=True):
    """One kind of GPU board. ``gpu`` is the profiles' name of it."""

    gpu: str
    rated_w: float
    rated_source: str
    price: Price


class LinkSpec(_Data, frozen=True):
    """How KV gets from one engine to another: see ``HandoffAffine`` for what the figures mean.

    ``per_gpu``: an engine of several GPUs has as many such links; else it has one.
    """

    title: str
    setup_ms: float
    bytes_per_s: float
    via_store: bool
    per_gpu: bool
    confidence: Confidence
    source: str

    def __post_init__(self) -> None:
        """Refuse a link that carries nothing."""
        self.handoff(1)

    def handoff(self, gpus: int) -> HandoffAffine:
        """The hand-off of an engine of so many GPUs on this link."""
        return HandoffAffine(
            setup_ms=self.setup_ms,
            bytes_per_s=self.bytes_per_s * (gpus if self.per_gpu else 1),
            via_store=self.via_store,
        )


class EngineGroup(_Data, frozen=True):
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


class ClusterSpec(_Data, frozen=True):
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


class _ClusterTable(_Data, frozen=True):
    """A cluster as it is written: its name is the table's."""

    title: str
    groups: tuple[EngineGroup, ...]
    link: str | LinkSpec | None = None
    usd_per_hour: dict[str, float] = {}


class _OwnFile(_Data, frozen=True):
    clusters: dict[str, _ClusterTable] = {}
    links: dict[str, LinkSpec] = {}


class _ShippedFile(_OwnFile, frozen=True):
    boards: dict[str, Board] = {}


def parse_clusters(data: bytes, *, origin: str) -> dict[str, ClusterSpec]:
    """The clusters of a file of one's own, in its order.

    Args:
        data: the file's bytes, TOML: tables ``clusters`` and, for links of its own, ``links``.
        origin: how to name the file in an error.

    Raises:
        ClusterError: it is not TOML, or a field is missing, unknown or impossible.
    """
    specs = _specs(_read(data, origin, _OwnFile), origin)
    for spec in specs.values():
        if isinstance(spec.link, str):
            try:
                find_link(spec.link)
            except ClusterError as error:
                raise ClusterError(f"{origin}: cluster {spec.name}: {error}") from error
    return specs


def read_clusters(path: Path) -> dict[str, ClusterSpec]:
    """The clusters of a file of one's own: see :func:`parse_clusters`.

    Raises:
        ClusterError: it cannot be read, or see there.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror}") from error
    return parse_clusters(data, origin=str(path))


def cluster(name: str) -> ClusterSpec:
    """One of the clusters that come with the package.

    Raises:
        ClusterError: there is none of that name.
    """
    return _pick(_shipped()[1], name, "cluster")


def list_clusters() -> list[str]:
    """Names of the clusters that come with the package, in the order of ``docs/clusters.md``."""
    return list(_shipped()[1])


def find_link(name: str) -> LinkSpec:
    """One of the links that come with the package.

    Raises:
        ClusterError: there is none of that name.
    """
    return _pick(_shipped()[0].links, name, "link")


def list_links() -> list[str]:
    """Names of the links that come with the package, fastest first."""
    return list(_shipped()[0].links)


def board_of(gpu: str) -> Board:
    """Rated power and rent of a GPU, by the profiles' name of it.

    Raises:
        ClusterError: it is not known.
    """
    return _pick(_shipped_boards(), gpu, "board for GPU")


@cache
def _shipped() -> tuple[_ShippedFile, dict[str, ClusterSpec]]:
    path = resources.files("conserve_serving.lab") / "clusters.toml"
    file = _read(path.read_bytes(), "clusters.toml", _ShippedFile)
    return file, _specs(file, "clusters.toml")


@cache
def _shipped_boards() -> dict[str, Board]:
    return {board.gpu: board for board in _shipped()[0].boards.values()}


def _read(data: bytes, origin: str, kind: type[_File]) -> _File:
    try:
        return msgspec.toml.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError) as error:  # tomllib's errors are ValueErrors
        raise ClusterError(f"{origin}: {error}") from error


def _specs(file: _OwnFile, origin: str) -> dict[str, ClusterSpec]:
    specs = {}
    for name, table in file.clusters.items():
        link = table.link
        if isinstance(link, str):
            link = file.links.get(link, link)
        try:
            specs[name] = ClusterSpec(
                name=name,
                title=table.title,
                groups=table.groups,
                link=link,
                usd_per_hour=tuple(sorted(table.usd_per_hour.items())),
            )
        except ValueError as error:
            raise ClusterError(f"{origin}: {error}") from error
    return specs


def _pick(known: dict[str, _Value], name: str, kind: str) -> _Value:
    if name not in known:
        raise ClusterError(f"no {kind} {name!r}: choose one of {', '.join(known)}")
    return known[name]
