"""One HTTP/1.1 connection to an engine: an ``asyncio.Protocol`` around httptools' parser.

This is the gateway's hot path. One ``data_received`` gives at most one ``on_chunk``: an event of
a stream is passed on when it arrives, and events that arrived together stay together.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Protocol, cast

import httptools

from conserve_serving.engines.http_errors import ConnectionLost, EngineHttpError, ProtocolError

#: Anything a transport can write without a copy.
Buffer = bytes | bytearray | memoryview
Headers = list[tuple[bytes, bytes]]

#: Requests up to this size leave in one write; larger ones in slices of it, between which other
#: connections get their turn (copying 256 KiB to a socket takes some 0.1 ms).
SLICE_BYTES = 256 * 1024
#: Largest response head we take; uvicorn and nginx send and accept far less.
MAX_HEAD_BYTES = 64 * 1024


class Exchange(Protocol):
    """Receives one response: ``on_head`` once, ``on_chunk`` any number of times, ``on_end`` once.

    ``on_error`` may come instead of what is still due, and is then the last call. Calls arrive
    on the event loop from inside the transport and must neither block nor raise.
    """

    def on_head(self, status: int, headers: Headers) -> None: ...

    def on_chunk(self, data: bytes) -> None: ...

    def on_end(self) -> None: ...

    def on_error(self, error: EngineHttpError) -> None: ...


class HttpConnection(asyncio.Protocol):
    """Carries one exchange at a time; its owner hears when it is free again or gone.

    Args:
        origin: ``host:port``, for error messages.
        on_idle: called when an exchange has ended and the connection may carry another.
        on_closed: called once, when the connection is gone.
    """

    __slots__ = (
        "_complete",
        "_drained",
        "_exchange",
        "_head_done",
        "_head_sent",
        "_headers",
        "_interim",
        "_keep_alive",
        "_no_body",
        "_on_closed",
        "_on_idle",
        "_origin",
        "_parser",
        "_parts",
        "_received_bytes",
        "_sending",
        "_status",
        "_transport",
        "_until_eof",
        "_write_paused",
    )

    def __init__(
        self,
        origin: str,
        *,
        on_idle: Callable[[HttpConnection], None],
        on_closed: Callable[[HttpConnection], None],
    ) -> None:
        self._origin = origin
        self._on_idle = on_idle
        self._on_closed = on_closed
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._drained: asyncio.Future[None] | None = None
        self._write_paused = False
        self._reset(no_body=False)

    def _reset(self, *, no_body: bool) -> None:
        self._no_body = no_body
        self._sending = False
        self._status = 0
        self._headers: Headers = []
        self._parts: list[bytes] = []
        self._received_bytes = 0
        self._interim = self._head_done = self._head_sent = self._complete = False
        self._keep_alive = self._until_eof = False

    # --- for the pool ---------------------------------------------------------------------

    @property
    def usable(self) -> bool:
        """Whether the connection can still be written to, as far as we have been told."""
        return self._transport is not None and not self._transport.is_closing()

    async def send(
        self, parts: list[Buffer], size_bytes: int, exchange: Exchange, *, no_body: bool
    ) -> None:
        """Send a request; its response goes to ``exchange``.

        Returns when everything is with the transport, or early when the response has begun or
        the connection is lost, which ``exchange`` is told. A request cut short that way makes
        the connection unfit for reuse. The caller aborts the connection if this is cancelled.

        Args:
            parts: head and body, in order.
            size_bytes: their total size.
            exchange: receives the response.
            no_body: the response has no body whatever its headers say (a HEAD request).
        """
        self._reset(no_body=no_body)
        transport = self._transport
        if transport is None:
            exchange.on_error(self._lost("closed before the request was sent"))
            return
        self._exchange = exchange
        if size_bytes <= SLICE_BYTES:
            transport.write(b"".join(parts) if len(parts) > 1 else parts[0])
            return
        for piece in _slices(parts):
            if self._sending:  # not the first
                if self._write_paused:
                    self._drained = asyncio.get_running_loop().create_future()
                    await self._drained
                else:
                    await asyncio.sleep(0)
                if self._exchange is not exchange or self._head_done or not self.usable:
                    return
            self._sending = True
            transport.write(piece)
        self._sending = False

    @property
    def complete(self) -> bool:
        """Whether the response has arrived whole; ``on_end`` follows its last ``on_chunk``."""
        return self._complete

    def pause_reading(self) -> None:
        """Stop reading, so that the engine is pushed back (its consumer is behind)."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once and forget the exchange, which hears nothing more."""
        self._exchange = None
        self.kill()

    def kill(self) -> None:
        """Close at once; the exchange, if there is one, hears that the connection is lost."""
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            # Without it a small write can wait 40 ms for the peer's delayed acknowledgement.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        exchange, self._exchange = self._exchange, None
        self._transport = None
        self._wake_sender()
        self._on_closed(self)
        if exchange is None:
            return
        if self._until_eof and exc is None:
            exchange.on_end()
        else:
            exchange.on_error(self._lost(str(exc) if exc else "closed by the engine"))

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:  # an answer nobody asked for: what follows cannot be trusted
            self.kill()
            return
        self._received_bytes += len(data)
        failure: str | None = None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            failure = f"invalid response: {error}"
        except httptools.HttpParserUpgrade:
            self._fail(exchange, "invalid response: a protocol upgrade nobody asked for")
            return
        if not self._head_done:
            if failure is None and self._received_bytes > MAX_HEAD_BYTES:
                failure = f"response head exceeds {MAX_HEAD_BYTES} bytes"
            if failure is not None:
                self._fail(exchange, failure)
            return
        if not self._head_sent:
            self._head_sent = True
            self._wake_sender()
            exchange.on_head(self._status, self._headers)
        if self._parts and self._exchange is exchange:
            parts, self._parts = self._parts, []
            exchange.on_chunk(parts[0] if len(parts) == 1 else b"".join(parts))
        if self._exchange is not exchange:  # aborted by the receiver
            return
        if self._complete:
            # Surplus bytes after a complete response spoil the connection, not the response.
            self._finish(exchange, reusable=failure is None)
        elif failure is not None:
            self._fail(exchange, failure)

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._wake_sender()

    # --- httptools' callbacks ---------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:
            self._keep_alive = False  # a second response to one request

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_done:  # trailers are dropped
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._complete:
            return
        status = self._parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self._interim = True
            return
        self._status = status
        self._head_done = True
        self._keep_alive = self._parser.should_keep_alive()
        if self._no_body:
            # The parser cannot be told, and would take the next response for this one's body.
            self._complete, self._keep_alive = True, False
        elif not self._keep_alive and status not in (204, 304):
            self._until_eof = not any(
                name.lower() in (b"content-length", b"transfer-encoding")
                for name, _ in self._headers
            )

    def on_body(self, data: bytes) -> None:
        if not self._complete:
            self._parts.append(data)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
            self._headers = []
        else:
            self._complete = True

    # --- inside -----------------------------------------------------------------------------

    def _finish(self, exchange: Exchange, *, reusable: bool) -> None:
        self._exchange = None
        transport = self._transport
        if (
            reusable
            and self._keep_alive
            and not self._sending
            and transport is not None
            and not transport.is_closing()
            and not transport.get_write_buffer_size()  # else the response overtook its request
        ):
            self._on_idle(self)
        else:
            self.kill()
        exchange.on_end()

    def _fail(self, exchange: Exchange, what: str) -> None:
        self.abort()
        self._wake_sender()
        exchange.on_error(ProtocolError(self._origin, what))

    def _lost(self, what: str) -> ConnectionLost:
        return ConnectionLost(
            self._origin,
            f"connection lost: {what}",
            before_first_byte=self._received_bytes == 0,
        )

    def _wake_sender(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)


def _slices(parts: list[Buffer]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part).cast("B")
        for start in range(0, len(view), SLICE_BYTES):
            yield view[start : start + SLICE_BYTES]
