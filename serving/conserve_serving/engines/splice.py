"""Adding fields to a JSON object that is kept as bytes.

The gateway adds ``rid``, ``session_id`` and the like to a client's request. Parsing and
serialising a 2 MB history for that would cost milliseconds of the event loop; this costs
microseconds whatever the size.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

_WHITESPACE = b" \t\r\n"


def splice(body: bytes, fields: Mapping[str, object]) -> list[bytes | memoryview]:
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
    text = body.rstrip(_WHITESPACE)
    if not text.endswith(b"}") or not body.lstrip(_WHITESPACE).startswith(b"{"):
        raise ValueError("request body is not a JSON object: it must start with { and end with }")
    if not fields:
        return [body]
    end = len(text) - 1
    before = end
    while text[before - 1] in _WHITESPACE:
        before -= 1
    # A "{" right before the final "}" can only be the outer one: a nested object ends with its
    # own "}", a string with a quote.
    separator = b"" if text[before - 1] == ord("{") else b","
    return [memoryview(body)[:end], separator + msgspec.json.encode(fields)[1:]]
