"""The gateway's HTTP/1.1 server: an ``asyncio.Protocol`` around httptools' parser.

Why not an ASGI server: the hot path is one request and a few small writes, and half of it was
the server's own (docs/benchmarks). A request is handed over once its body is complete, so that a
handler is one plain call; bodies are bounded. Keep-alive, pipelining (one at a time, in order),
chunked and ``Expect: 100-continue`` bodies, HTTP/1.0, back-pressure and a drain are supported;
TLS, HTTP/2 and upgrades belong to a proxy in front.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, cast

import httptools

from conserve_serving.gateway.errors import ApiError, BodyTooLargeError, InvalidRequestError
from conserve_serving.gateway.http_exchange import Exchange, Request

_BACKLOG: Final = 2048
_MAX_HEAD_BYTES: Final = 64 * 1024
_MAX_PIPELINED: Final = 4
_IDLE_S: Final = 75.0
_SWEEP_S: Final = 5.0
_LINGER_S: Final = 2.0


class Handler(Protocol):
    """Answers requests. Called on the event loop; must return at once."""

    def handle(self, request: Request, exchange: Exchange) -> None: ...


class Connection(asyncio.Protocol):
    """One client's connection: one exchange at a time, others wait in line."""

    __slots__ = (
        "_exchange",
        "_head_bytes",
        "_loop",
        "_parser",
        "_queue",
        "_refused",
        "_request",
        "_server",
        "_transport",
        "_url",
        "_waiter",
        "closing",
        "since_s",
        "write_paused",
    )

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._request: Request | None = None
        self._url = b""
        self._head_bytes = 0
        self._refused = False
        self._exchange: Exchange | None = None
        self._queue: deque[tuple[Request, Exchange]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.write_paused = False
        self.closing = False
        self.since_s = self._loop.time()

    # --- for the server and its exchanges ----------------------------------------------------
    @property
    def idle(self) -> bool:
        """Whether no response is due (a request may be half here)."""
        return self._exchange is None

    def send(self, data: bytes) -> None:
        if self._transport is not None and data:
            self._transport.write(data)

    def complete(self, data: bytes, *, keep_alive: bool) -> None:
        """The last bytes of the current response."""
        self.send(data)
        exchange, self._exchange = self._exchange, None
        self.since_s = self._loop.time()
        if exchange is not None:
            self._server.on_response(exchange.status)
        if self._refused and self._transport is not None:
            self._linger(self._transport)
        elif not keep_alive or self.closing:
            self.close()
        elif self._queue:
            self._loop.call_soon(self._next)

    async def drained(self) -> None:
        """Return when the transport can take more, or the connection is gone."""
        while self.write_paused and self._transport is not None:
            if self._waiter is None:
                self._waiter = self._loop.create_future()
            await asyncio.shield(self._waiter)

    def close(self) -> None:
        """Close once everything written has left."""
        if self._transport is not None:
            self._transport.close()

    def _linger(self, transport: asyncio.Transport) -> None:
        """Close our side and let the client finish sending: a reset could eat our answer."""
        if transport.can_write_eof():
            transport.write_eof()
        self._loop.call_later(_LINGER_S, self.abort)

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def drain(self) -> None:
        """Take no further request."""
        self.closing = True
        if self.idle and not self._queue:
            self.close()

    # --- asyncio.Protocol --------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport = None
        self._server.connections.discard(self)
        self._queue.clear()
        self._wake()
        exchange, self._exchange = self._exchange, None
        if exchange is not None and not exchange.finished:
            exchange.finished = True
            if exchange.on_gone is not None:
                exchange.on_gone()

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self.since_s = self._loop.time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refused = True  # answered as plain HTTP; what follows is not ours
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, ApiError) else _BAD)
        except httptools.HttpParserError:
            self._refuse(_BAD)

    # --- httptools callbacks -----------------------------------------------------------------
    def on_message_begin(self) -> None:
        self._request = Request()
        self._url = b""
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if self._request is not None:
            self._request.headers.append((name.lower(), value))

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > _MAX_HEAD_BYTES:
            raise InvalidRequestError(f"the request's head exceeds {_MAX_HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        request = self._request
        if request is None:
            return
        request.method = self._parser.get_method().decode("latin-1")
        request.raw_path, _, request.query = self._url.partition(b"?")
        for name, value in request.headers:
            if name == b"content-length" and int(value) > self._server.max_body_bytes:
                raise self._too_large()
            if name == b"expect" and value.lower() == b"100-continue" and self.idle:
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        request = self._request
        if request is not None:
            request.add(data)
            if request.size > self._server.max_body_bytes:
                raise self._too_large()

    def on_message_complete(self) -> None:
        request, self._request = self._request, None
        if request is None or self.closing:
            return
        request.seal()
        exchange = Exchange(
            self,
            keep_alive=self._parser.should_keep_alive() and not self._parser.should_upgrade(),
            version_1_0=self._parser.get_http_version() == "1.0",
            no_body=request.method == "HEAD",
        )
        if self._exchange is None and not self._queue:
            self._exchange = exchange
            self._server.handler.handle(request, exchange)
        else:
            self._queue.append((request, exchange))
            if len(self._queue) >= _MAX_PIPELINED and self._transport is not None:
                self._transport.pause_reading()

    def _next(self) -> None:
        if self._transport is None or not self._queue or self._exchange is not None:
            return
        if len(self._queue) == _MAX_PIPELINED:
            self._transport.resume_reading()
        request, exchange = self._queue.popleft()
        self._exchange = exchange
        self._server.handler.handle(request, exchange)

    def _too_large(self) -> BodyTooLargeError:
        limit = self._server.max_body_bytes
        return BodyTooLargeError(f"the request body is larger than {limit} bytes: shorten it")

    def _refuse(self, error: ApiError) -> None:
        """Answer what is not a request we take, and close. Answers still due come first."""
        self._refused = True
        self._request = None
        if self._exchange is None:
            exchange = self._exchange = Exchange(
                self, keep_alive=False, version_1_0=False, no_body=False
            )
            exchange.respond(error.status, error.headers(), error.body())
        else:
            self.closing = True


_BAD: Final = InvalidRequestError("this is not a valid HTTP/1.1 request", code="bad_request")


class HttpServer:
    """Listens, and closes connections that have been idle for too long.

    Args:
        handler: answers requests.
        max_body_bytes: larger bodies are refused with 413.
        on_response: told the status of every response.
    """

    def __init__(
        self, handler: Handler, *, max_body_bytes: int, on_response: Callable[[int], None]
    ) -> None:
        self.handler = handler
        self.max_body_bytes = max_body_bytes
        self.on_response = on_response
        self.connections: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self, listener: socket.socket) -> None:
        """Accept connections on a bound socket."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self), sock=listener, backlog=_BACKLOG
        )
        self._sweeper = loop.call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        oldest_s = loop.time() - _IDLE_S
        for connection in [c for c in self.connections if c.idle and c.since_s < oldest_s]:
            connection.close()
        self._sweeper = loop.call_later(_SWEEP_S, self._sweep)

    async def stop(self) -> None:
        """Close the port and every connection; responses still due are cut off."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.drain()
        await asyncio.sleep(0)  # lets what was written leave
        for connection in list(self.connections):
            connection.close() if connection.idle else connection.abort()
