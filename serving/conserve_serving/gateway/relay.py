"""Between an engine's response and the client: bytes, headers, backpressure.

The client side is a small protocol, so that the turn's life does not depend on ASGI.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from conserve_agents import wire
from conserve_serving.engines.http import Response
from conserve_serving.engines.http_errors import BadReply
from conserve_serving.gateway.conversations import Usage
from conserve_serving.gateway.usage import StreamTap

Headers = list[tuple[bytes, bytes]]

#: Headers that belong to one connection, or that this side writes itself.
_NOT_PASSED: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
        b"date",
        b"server",
        b"set-cookie",
    }
)
_DONE: Final = b"data: [DONE]"


def _line(name: str, value: str) -> str:
    return f"{name.lower()}: {value}\r\n"


#: One piece of bytes for all of them: a response's head is half of what a short stream costs.
_CONVERSATION: Final = (
    _line(wire.CONVERSATION_ID, "%b")
    + _line(wire.IDENTITY_SOURCE, "%b")
    + _line(wire.RELATION, "%b")
    + _line(wire.TURN_INDEX, "%d")
).encode()
_TURN: Final = (
    _CONVERSATION
    + (
        _line(wire.PREFILL_ENGINE, "%b")
        + _line(wire.DECODE_ENGINE, "%b")
        + _line(wire.TRANSFERS, "%d")
        + _line(wire.REASON, "%b")
        + _line(wire.OVERHEAD_MS, "%.3f")
        + _line(wire.PLACEMENT, "%b")
    ).encode()
)
_CACHED: Final = _line(wire.CACHED_TOKENS, "%d").encode()


class Client(Protocol):
    """The one who asked. Writing to a client that has left does nothing."""

    @property
    def started(self) -> bool:
        """Whether a byte of the response has been sent."""

    def start(self, status: int, headers: Headers, block: bytes = b"") -> None:
        """Send status and headers; ``block`` are further header lines as they go out."""

    def send(self, data: bytes) -> bool:
        """Send a part of the body; returns whether the client can take more already."""

    async def drained(self) -> None:
        """Return when the client can take more."""

    def finish(self, data: bytes = b"") -> None:
        """Send the last part of the body."""


def turn_headers(
    *,
    conversation: str,
    source: str,
    relation: str,
    turn_index: int,
    prefill_engine: str,
    decode_engine: str,
    transfers: int,
    reason: str,
    overhead_ms: float,
    placement: bytes,
) -> bytes:
    """Header lines: what the response says about the turn and its conversation."""
    return _TURN % (
        conversation.encode("ascii"),
        source.encode("ascii", "replace"),
        relation.encode("ascii"),
        turn_index,
        prefill_engine.encode("ascii", "replace"),
        decode_engine.encode("ascii", "replace"),
        transfers,
        reason.encode("ascii"),
        overhead_ms,
        placement,
    )


def conversation_headers(
    *, conversation: str, source: str, relation: str, turn_index: int
) -> bytes:
    """The same, for a turn that was not placed."""
    return _CONVERSATION % (
        conversation.encode("ascii"),
        source.encode("ascii", "replace"),
        relation.encode("ascii"),
        turn_index,
    )


def cached_tokens_header(usage: Usage | None) -> bytes:
    """How many prompt tokens were cached, where the engine said."""
    if usage is None or usage.cached_tokens is None:
        return b""
    return _CACHED % usage.cached_tokens


def passed_headers(response: Response) -> Headers:
    """The engine's headers that go on to the client."""
    return [
        (name, value)
        for name, value in ((n.lower(), v) for n, v in response.headers)
        if name not in _NOT_PASSED and not name.startswith(b"x-conserve-")
    ]


async def relay_stream(
    response: Response,
    origin: str,
    client: Client,
    tap: StreamTap,
    *,
    head: Callable[[], bytes],
    on_chunk: Callable[[], None],
    on_done: Callable[[], None],
) -> None:
    """Pass a stream of events on as it arrives.

    Nothing is sent to the client before the first chunk has come, so that a turn whose engine
    fails before it can run elsewhere unnoticed.

    Args:
        response: the engine's, its status 200.
        origin: the engine's address, for errors.
        client: receives it.
        tap: sees every chunk and says what of it the client gets.
        head: header lines to add to the engine's; called at the first chunk.
        on_chunk: called for every chunk, before it is passed on.
        on_done: called once, when the stream's own end has been seen and before it is passed on:
            a client's next turn must not overtake the end of this one.

    Raises:
        EngineHttpError: the engine's connection broke before the end, or there was none.
    """
    done, last = False, b""

    def take(chunk: bytes) -> bool:
        nonlocal done, last
        on_chunk()
        if not client.started:
            client.start(response.status, passed_headers(response), head())
        out = tap.feed(chunk)
        if not done and _DONE in chunk and tap.ended():
            done = True
            on_done()
        if response.exhausted:  # the end came with this chunk: one write for both
            last = out
            return True
        return client.send(out) if out else True

    await response.forward(take, client.drained)
    out = last + tap.flush()
    if not done:
        if not tap.ended() and not tap.error():
            if client.started and out:
                client.send(out)
            raise BadReply(origin, "the stream ended without its last event, data: [DONE]")
        on_done()
    if not client.started:
        client.start(response.status, passed_headers(response), head())
    client.finish(out)
