"""Reading the bodies of the other APIs: what both need, and refusals that name the remedy."""

from __future__ import annotations

from typing import Any, Final, Protocol, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from conserve_serving.gateway.errors import InvalidRequestError, quoted
from conserve_serving.gateway.request import Api, Original, TurnRequest, parse_turn, wrong_type

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)
Message = dict[str, Any]

#: Efforts of both APIs, all of which SGLang knows.
_EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class _Decodes(Protocol[_T_co]):
    def decode(self, buf: Raw, /) -> _T_co: ...


def decode(raw: Raw, decoder: _Decodes[_T], where: str) -> _T:
    """A part of a body.

    Args:
        raw: the part.
        decoder: of its type.
        where: its place in the body, for errors.

    Raises:
        InvalidRequestError: it is of another type; names the field.
    """
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise wrong_type(error, where) from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{where} is not valid UTF-8: {error.reason}", param=where, code="invalid_json"
        ) from error


def refuse(field: str, remedy: str, value: str | None = None) -> InvalidRequestError:
    """The error for a field, or a value of it, that cannot be honoured here and would matter."""
    what = field if value is None else f"{field} {quoted(value)}"
    return InvalidRequestError(
        f"{what} is not supported here: {remedy}", param=field, code="unsupported_parameter"
    )


def given(value: Raw | UnsetType) -> bool:
    """Whether a field is there and says something: not null, nor empty."""
    return isinstance(value, Raw) and bytes(memoryview(value)[:5]) not in _NOTHING


_QUOTE: Final = ord('"')
_BRACKET: Final = ord("[")
_NOTHING: Final = (b"null", b"[]", b"{}", b'""', b"false")


def is_string(raw: Raw | UnsetType) -> bool:
    """Whether it is there and a string."""
    return isinstance(raw, Raw) and memoryview(raw)[0] == _QUOTE


def is_list(raw: Raw | UnsetType) -> bool:
    """Whether it is there and a list."""
    return isinstance(raw, Raw) and memoryview(raw)[0] == _BRACKET


def string(raw: Raw | UnsetType, where: str) -> Raw:
    """``raw`` if it is a string; it goes on as it came.

    Raises:
        InvalidRequestError: it is not; names the field.
    """
    if isinstance(raw, Raw) and is_string(raw):
        return raw
    what = "missing" if raw is UNSET else "not a string"
    raise InvalidRequestError(f"{where} is {what}: send a string", param=where)


def function(
    name: str, description: str | None, parameters: Raw | UnsetType, *, strict: bool | None
) -> dict[str, Any]:
    """A tool, as chat completions offer it."""
    offered: dict[str, Any] = {"name": name}
    if description is not None:
        offered["description"] = description
    if given(parameters):
        offered["parameters"] = parameters
    if strict is not None:
        offered["strict"] = strict
    return {"type": "function", "function": offered}


def call(id: str, name: str, arguments: str) -> dict[str, Any]:
    """A tool call of the history."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def check_effort(effort: str | None, where: str) -> None:
    """Whether an effort of reasoning is one.

    Raises:
        InvalidRequestError: it is not; names the field.
    """
    if effort is not None and effort not in _EFFORTS:
        raise InvalidRequestError(
            f"{where} {quoted(effort)} is unknown: use {', '.join(_EFFORTS)}", param=where
        )


def translated(fields: Message, original: Original) -> TurnRequest:
    """The chat completion that was made of a request of another API."""
    request = parse_turn(Api.CHAT, msgspec.json.encode(fields))
    request.original = original
    return request
