"""TOML files as frozen data: what boards, links and clusters have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from conserve_serving.lab.errors import ClusterError

_Kind = TypeVar("_Kind")
_Value = TypeVar("_Value")


class Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything in a cluster file: frozen, unknown keys refused by name."""


def decode(data: bytes, kind: type[_Kind], *, origin: str) -> _Kind:
    """The bytes of a TOML file as ``kind``.

    Raises:
        ClusterError: it is not TOML, or a field is missing, unknown or impossible; ``origin`` is
            how the file is named there.
    """
    try:
        return msgspec.toml.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError) as error:  # tomllib's errors are ValueErrors
        raise ClusterError(f"{origin}: {error}") from error


def pick(known: Mapping[str, _Value], name: str, what: str) -> _Value:
    """What is known under ``name``.

    Raises:
        ClusterError: nothing is; it names ``what`` was asked for, and the choices.
    """
    if name not in known:
        raise ClusterError(f"no {what} {name!r}: choose one of {', '.join(known)}")
    return known[name]
