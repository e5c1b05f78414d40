"""What a row's cluster is: its price, its rated power, its profiles; where the package knows."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from conserve_serving.engines.errors import ProfileError
from conserve_serving.engines.profile import HardwareProfile, load_profile
from conserve_serving.lab.cluster_spec import ClusterSpec
from conserve_serving.lab.errors import LabError
from conserve_serving.lab.report.context import Context
from conserve_serving.lab.report.rows import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A cluster as its rows describe it.

    Attributes:
        title: for people.
        dollars_per_hour, rated_w: of all boards; None where the package knows no price, no rating
            or no such profile.
        profiles: names, prefill tier first.
        equal: both tiers are of one kind, with one power limit.
        model: what the engines serve, where the package knows.
    """

    title: str
    dollars_per_hour: float | None
    rated_w: float | None
    profiles: tuple[str, ...]
    equal: bool
    model: str | None = None


def hardware(context: Context, place: Place) -> Hardware:
    """Of the cluster at ``place``."""
    cell = next(row.raw["cell"] for row in context.rows.all if row.place == place)
    told = cell["cluster"]
    profiles = tuple(str(group["profile"]) for group in told["groups"])
    dollars: float | None = None
    model: str | None = None
    rated_w: float | None = None
    try:
        spec = msgspec.convert(told, ClusterSpec)
        dollars, rated_w, model = spec.dollars_per_hour, spec.rated_w, spec.model
    except (msgspec.ValidationError, ProfileError, LabError):
        pass  # a cluster of somebody else's: its rows are good, its price is not known here
    return Hardware(
        title=str(told.get("title") or place.cluster),
        dollars_per_hour=dollars,
        rated_w=rated_w,
        profiles=profiles,
        equal=len({(group["profile"], group.get("cap_w")) for group in told["groups"]}) == 1,
        model=model,
    )


def profile_of(name: str) -> HardwareProfile | None:
    """A profile that the package has; None for others."""
    try:
        return load_profile(name)
    except ProfileError:
        return None
