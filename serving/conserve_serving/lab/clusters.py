"""Clusters that have a name: those that come with the package, and files of one's own.

``clusters.toml`` has the first, in the format of the others (``docs/clusters.md``). What a cluster
is: ``cluster_spec.py``; boards and links: ``boards.py``.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from msgspec import field

from conserve_serving.lab.boards import LinkSpec, find_link
from conserve_serving.lab.cluster_spec import ClusterSpec, EngineGroup
from conserve_serving.lab.errors import ClusterError
from conserve_serving.lab.toml_data import Data, decode, pick


class _ClusterTable(Data, frozen=True):
    """A cluster as it is written: its name is the table's."""

    title: str
    groups: tuple[EngineGroup, ...]
    link: str | LinkSpec | None = None
    usd_per_hour: dict[str, float] = field(default_factory=dict)


class _OwnFile(Data, frozen=True):
    clusters: dict[str, _ClusterTable] = field(default_factory=dict)
    links: dict[str, LinkSpec] = field(default_factory=dict)


class _ShippedFile(_OwnFile, frozen=True):
    boards: dict[str, Any] = field(default_factory=dict)  # read in boards.py


def parse_clusters(data: bytes, *, origin: str) -> dict[str, ClusterSpec]:
    """The clusters of a file of one's own, in its order.

    Args:
        data: the file's bytes, TOML: tables ``clusters`` and, for links of its own, ``links``.
        origin: how to name the file in an error.

    Raises:
        ClusterError: it is not TOML, or a field is missing, unknown or impossible.
    """
    specs = _specs(decode(data, _OwnFile, origin=origin), origin)
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
    return pick(_shipped(), name, "cluster")


def list_clusters() -> list[str]:
    """Names of the clusters that come with the package, in the order of ``docs/clusters.md``."""
    return list(_shipped())


@cache
def _shipped() -> dict[str, ClusterSpec]:
    path = resources.files("conserve_serving.lab") / "clusters.toml"
    file = decode(path.read_bytes(), _ShippedFile, origin="clusters.toml")
    return _specs(file, "clusters.toml")


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
