"""What a cluster does for its hardware, rent and power, so that unlike ones can be compared.

Three comparisons, for no one of them is fair alone:

* **as it is**: two clusters of as many boards. Says what placement makes of given hardware; says
  nothing when one of them has the dearer boards;
* **normalised**: the rate that each carries at its SLO, per dollar and per rated watt. Takes size
  out where a cluster can be bought in any size, and flatters the small: latency gets better, and
  peaks rarer, in a large one of the same load per board;
* **right-sized**: against equal tiers that cost or draw as much (:func:`right_sized`), run for
  themselves. Keeps the effects of size; boards come whole, so it misses the budget by up to half a
  board, and the normalised figure says by how much.

Power is rated power: what a rack must be built for. Energy that was used is ``tokens_per_j``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from conserve_serving.core.types import Tier
from conserve_serving.engines.profile import load_profile
from conserve_serving.lab.boards import board_of
from conserve_serving.lab.cluster_spec import HOST_W_PER_GPU, ClusterSpec, EngineGroup
from conserve_serving.lab.errors import ClusterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """A rate that a cluster carries, in conversations, by what it takes.

    Attributes:
        per_s: as it is.
        per_board_hour: of one GPU.
        per_dollar: of its rent.
        per_rated_kwh: of rated power, GPU boards only.
        per_rated_kwh_with_host: the same with each board's share of its host.
    """

    per_s: float
    per_board_hour: float
    per_dollar: float
    per_rated_kwh: float
    per_rated_kwh_with_host: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """One cluster over another: above 1 where the first does more.

    Attributes:
        as_is, per_board, per_dollar, per_rated_w, per_rated_w_with_host: see :class:`Worth`.
        per_dollar_low, per_dollar_high: the least and the most that ``per_dollar`` can be while
            every GPU's rent is anywhere between its lowest and its highest offer, the same in both.
    """

    as_is: float
    per_board: float
    per_dollar: float
    per_dollar_low: float
    per_dollar_high: float
    per_rated_w: float
    per_rated_w_with_host: float


def worth(cluster: ClusterSpec, rate_per_s: float) -> Worth:
    """What ``rate_per_s`` conversations per second are worth on that cluster."""
    per_hour = rate_per_s * 3600
    return Worth(
        per_s=rate_per_s,
        per_board_hour=per_hour / cluster.boards,
        per_dollar=per_hour / cluster.dollars_per_hour,
        per_rated_kwh=per_hour / (cluster.rated_w / 1e3),
        per_rated_kwh_with_host=per_hour / (cluster.rated_with_host_w / 1e3),
    )


def compare(
    cluster: ClusterSpec, rate_per_s: float, other: ClusterSpec, other_rate_per_s: float
) -> Ratios:
    """How much more the first cluster carries than the other, by what either takes.

    Raises:
        ClusterError: the other carries nothing.
    """
    if other_rate_per_s <= 0:
        raise ClusterError(
            f"cluster {other.name} carries nothing: there is nothing to compare with"
        )
    one, two = worth(cluster, rate_per_s), worth(other, other_rate_per_s)
    as_is = rate_per_s / other_rate_per_s
    gpus = sorted(_gpus(cluster) | _gpus(other))
    offers = []
    for gpu in gpus:
        price = board_of(gpu).price
        offers.append((price.low_usd_per_hour, price.high_usd_per_hour))
    by_rent = []
    for corner in itertools.product(*offers):  # the ratio is extreme in a corner of the ranges
        rents = dict(zip(gpus, corner, strict=True))
        by_rent.append(as_is * _rent(other, rents) / _rent(cluster, rents))
    return Ratios(
        as_is=as_is,
        per_board=one.per_board_hour / two.per_board_hour,
        per_dollar=one.per_dollar / two.per_dollar,
        per_dollar_low=min(by_rent),
        per_dollar_high=max(by_rent),
        per_rated_w=one.per_rated_kwh / two.per_rated_kwh,
        per_rated_w_with_host=one.per_rated_kwh_with_host / two.per_rated_kwh_with_host,
    )


def right_sized(
    like: ClusterSpec, profile: str, *, by: Literal["dollars", "watts"] = "dollars"
) -> ClusterSpec:
    """Equal engines that together cost, or are rated, as nearly as possible what ``like`` is.

    Args:
        like: the cluster to be matched; its link is taken over.
        profile: of every engine. One is put in the prefill tier where there are two or more.
        by: ``dollars``: rent; ``watts``: rated power, the host's share included.

    Raises:
        ClusterError: the profile serves another model, or its GPU's rent is not known.
        ProfileError: there is no such profile.
    """
    hardware = load_profile(profile)
    if hardware.model != like.model:
        raise ClusterError(
            f"cluster {like.name} serves {like.model}, profile {profile} {hardware.model}"
        )
    board = board_of(hardware.gpu)
    own = dict(like.usd_per_hour)
    if by == "dollars":
        each = own.get(hardware.gpu, board.price.usd_per_hour)
        budget = like.dollars_per_hour
    else:
        each = board.rated_w + HOST_W_PER_GPU
        budget = like.rated_with_host_w
    count = max(1, round(budget / (each * hardware.tensor_parallel)))
    tiers = [(Tier.PREFILL, 1), (Tier.DECODE, count - 1)] if count > 1 else [(Tier.DECODE, 1)]
    kept = tuple((gpu, usd) for gpu, usd in like.usd_per_hour if gpu == hardware.gpu)
    return ClusterSpec(
        name=f"{count}-{profile}",
        title=f"{count} {profile}, as {like.name} by {by}",
        groups=tuple(EngineGroup(count=of, tier=tier, profile=profile) for tier, of in tiers),
        link=like.link,
        usd_per_hour=kept,
    )


def _gpus(cluster: ClusterSpec) -> set[str]:
    """GPUs whose rent is not the cluster's own."""
    found = {load_profile(group.profile).gpu for group in cluster.groups}
    return found - dict(cluster.usd_per_hour).keys()


def _rent(cluster: ClusterSpec, usd_per_hour: dict[str, float]) -> float:
    own = usd_per_hour | dict(cluster.usd_per_hour)
    return sum(group.boards * own[load_profile(group.profile).gpu] for group in cluster.groups)
