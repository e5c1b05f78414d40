"""Adding fields to a JSON object that is kept as bytes.

The gateway adds ``rid``, ``session_id`` and the like to a client's request. Parsing and
serialising a 2 MB history for that would cost milliseconds of the event loop; this costs
microseconds whatever the size.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

_WHITESPACE = b" \t\r\n"
_OPEN, _CLOSE = b"{}"
_encode = msgspec.json.Encoder().encode


def splice(body: bytes | bytearray, fields: Mapping[str, object]) -> list[bytes | memoryview]:
    """Append ``fields`` to the JSON object in ``body``, without copying it.

    They come last, so they win over the same names sent by a client: JSON parsers, SGLang's
    included, keep the last of several. ``body`` is taken to be valid JSON; only its first and
    last characters are looked at.

    Args:
        body: a JSON object, as UTF-8; white space around it is fine.
        fields: encoded with msgspec (``msgspec.Raw`` values pass as they are).

    Returns:
        Buffers which, one after the other, are the new object.

    Raises:
        ValueError: ``body`` is not a JSON object.
    """
    last = len(body) - 1
    while last > 0 and body[last] in _WHITESPACE:
        last -= 1
    first = 0
    while first < last and body[first] in _WHITESPACE:
        first += 1
    if last <= first or body[last] != _CLOSE or body[first] != _OPEN:
        raise ValueError("request body is not a JSON object: it must start with { and end with }")
    if not fields:
        return [memoryview(body)]
    before = last
    while body[before - 1] in _WHITESPACE:
        before -= 1
    # A "{" right before the final "}" can only be the outer one: a nested object ends with its
    # own "}", a string with a quote.
    separator = b"" if body[before - 1] == _OPEN else b","
    return [memoryview(body)[:last], separator + _encode(fields)[1:]]
