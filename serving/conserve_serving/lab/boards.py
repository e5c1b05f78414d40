"""Boards and links: what GPUs cost and may draw, and how KV gets from one engine to another.

``clusters.toml`` has them, each figure with its source. Clusters made of them: ``cluster_spec.py``.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any, Literal

from conserve_serving.engines.profile import Confidence, HandoffAffine
from conserve_serving.lab.toml_data import Data, decode, pick


class Price(Data, frozen=True):
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


class Board(Data, frozen=True):
    """One kind of GPU board. ``gpu`` is the profiles' name of it."""

    gpu: str
    rated_w: float
    rated_source: str
    price: Price


class LinkSpec(Data, frozen=True):
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


class _Shipped(Data, frozen=True):
    boards: dict[str, Board]
    links: dict[str, LinkSpec]
    clusters: dict[str, Any]  # read in clusters.py


def find_link(name: str) -> LinkSpec:
    """One of the links that come with the package.

    Raises:
        ClusterError: there is none of that name.
    """
    return pick(_shipped().links, name, "link")


def list_links() -> list[str]:
    """Names of the links that come with the package, fastest first."""
    return list(_shipped().links)


def board_of(gpu: str) -> Board:
    """Rated power and rent of a GPU, by the profiles' name of it.

    Raises:
        ClusterError: it is not known.
    """
    return pick(_boards_by_gpu(), gpu, "board for GPU")


@cache
def _shipped() -> _Shipped:
    path = resources.files("conserve_serving.lab") / "clusters.toml"
    return decode(path.read_bytes(), _Shipped, origin="clusters.toml")


@cache
def _boards_by_gpu() -> dict[str, Board]:
    return {board.gpu: board for board in _shipped().boards.values()}
