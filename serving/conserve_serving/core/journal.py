"""Decision log records: (now_s, event, decisions) as plain data, and back.

A record holds nothing but strings, numbers, lists and dicts, so that any driver can write it as
JSON. Reading a journal and handing its events to a fresh scheduler must give the same decisions.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from conserve_serving.core import decisions as decisions_module
from conserve_serving.core import events as events_module
from conserve_serving.core.decisions import Decision
from conserve_serving.core.errors import JournalError
from conserve_serving.core.events import Event

_KIND: Final = "kind"


def to_record(now_s: float, event: Event, decisions: Iterable[Decision]) -> dict[str, Any]:
    """One entry of the journal as plain data."""
    return {"now_s": now_s, "event": encode(event), "decisions": [encode(d) for d in decisions]}


def from_record(record: Mapping[str, Any]) -> tuple[float, Event, list[Decision]]:
    """The inverse of `to_record`.

    Raises:
        JournalError: the record names an unknown kind, or a field is missing or not known.
    """
    try:
        now_s, event, decided = record["now_s"], record["event"], record["decisions"]
    except KeyError as error:
        raise JournalError(f"journal record lacks {error}: is this a decision journal?") from error
    return float(now_s), decode(event), [decode(d) for d in decided]


def encode(value: Any) -> Any:
    """A dataclass as a dict that names its kind; enums as their values."""
    if dataclasses.is_dataclass(value):
        encoded: dict[str, Any] = {_KIND: type(value).__name__}
        for name in value.__dataclass_fields__:
            encoded[name] = encode(getattr(value, name))
        return encoded
    return value.value if isinstance(value, enum.Enum) else value


def decode(data: Mapping[str, Any]) -> Any:
    """The dataclass that `encode` was given."""
    fields = dict(data)
    kind = fields.pop(_KIND, None)
    makers = _MAKERS.get(kind) if isinstance(kind, str) else None
    if makers is None:
        raise JournalError(f"journal names the unknown kind {kind!r}: written by another version?")
    cls, makes = makers
    unknown = sorted(fields.keys() - makes.keys())
    if unknown:
        raise JournalError(f"journal: {kind} has no field {', '.join(unknown)}")
    try:
        return cls(**{name: makes[name](value) for name, value in fields.items()})
    except (TypeError, ValueError) as error:
        raise JournalError(f"journal: {kind} cannot be read: {error}") from error


def _maker(annotation: Any) -> Callable[[Any], Any]:
    """How a field of this annotation is read back."""
    if isinstance(annotation, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        make = _maker(inner[0])
        return lambda value: None if value is None else make(value)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return annotation
    if dataclasses.is_dataclass(annotation):
        return decode
    return lambda value: value


def _makers() -> dict[str, tuple[type, dict[str, Callable[[Any], Any]]]]:
    table: dict[str, tuple[type, dict[str, Callable[[Any], Any]]]] = {}
    for module in (events_module, decisions_module):
        for cls in vars(module).values():
            if isinstance(cls, type) and dataclasses.is_dataclass(cls):
                hints = typing.get_type_hints(cls)
                table[cls.__name__] = (cls, {name: _maker(h) for name, h in hints.items()})
    return table


_MAKERS: Final = _makers()
