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

from conserve_serving.gateway import http_body
from conserve_serving.gateway.errors import (
    ApiError,
    BodyTooLargeError,
    InvalidRequestError,
    RequestTimeoutError,
    UnavailableError,
)
from conserve_serving.gateway.http_body import LargeBody
from conserve_serving.gateway.http_exchange import Exchange, Request

_BACKLOG: Final = 2048
_MAX_HEAD_BYTES: Final = 64 * 1024
_MAX_PIPELINED: Final = 4
_IDLE_S: Final = 75.0
_SWEEP_S: Final = 5.0
_LINGER_S: Final = 2.0
#: Slower bodies are given up, once they have had the time of a head.
_MIN_BODY_BYTES_PER_S: Final = 1000
#: The second probe finds what the first one provoked; later ones only need to find it some time.
_PROBE_S: Final = 0.001
_MAX_PROBE_S: Final = 5.0


class Handler(Protocol):
    """Answers requests. Called on the event loop; must return at once."""

    def handle(self, request: Request, exchange: Exchange) -> None: ...


class Connection(asyncio.Protocol):
    """One client's connection: one exchange at a time, others wait in line."""

    __slots__ = (
        "_eof",
        "_error",
        "_exchange",
        "_head_bytes",
        "_large_bytes",
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
        self._large_bytes = 0
        self._refused = False
        self._error: ApiError | None = None
        self._eof = False
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
        if self._queue and keep_alive and not self.closing:
            self._loop.call_soon(self._next)
        elif self._error is not None and keep_alive and not self.closing:
            self._loop.call_soon(self._answer_error)
        elif self._refused and self._transport is not None:
            self._linger(self._transport)
        elif not keep_alive or self.closing or self._eof:
            self.close()

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
        if len(self._server.connections) >= self._server.max_connections:
            self._refuse(_FULL)
            return
        self._server.connections.add(self)

    def eof_received(self) -> bool:
        """The client will send no more: it may still read, or it may have left.

        Returns:
            Whether to keep our side open.
        """
        exchange = self._exchange
        if exchange is None or exchange.version_1_0 or exchange.sent:
            return False  # in mid-response nobody just stops sending: the client has left
        self._eof = True
        self._probe(_PROBE_S)
        return True

    def _probe(self, again_s: float) -> None:
        """Find out whether the client reads: to interim answers, one that has left says reset."""
        exchange = self._exchange
        if self._transport is None or exchange is None or exchange.sent:
            return  # what is sent of the response tells as well
        self.send(b"HTTP/1.1 102 Processing\r\n\r\n")
        self._loop.call_later(again_s, self._probe, min(2 * again_s, _MAX_PROBE_S))

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
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, ApiError) else _BAD)
        except httptools.HttpParserError:
            self._refuse(_BAD)
        if self._large_bytes:
            self._read_large()

    def _read_large(self) -> None:
        """A large body has begun: have the rest of it read into one buffer."""
        size, self._large_bytes = self._large_bytes, 0
        request, transport = self._request, self._transport
        if request is None or transport is None or request.size >= size:
            return

        def complete() -> None:
            request.fill(large.body)
            self._read_with(transport, self)
            self.on_message_complete()
            self._parser = httptools.HttpRequestParser(self)  # the old one is still in the body

        large = LargeBody(self, request, size, complete)
        self._read_with(transport, large)

    def _read_with(self, transport: asyncio.Transport, protocol: asyncio.BaseProtocol) -> None:
        transport.pause_reading()  # the loop takes the protocol's kind in when reading starts
        transport.set_protocol(protocol)
        transport.resume_reading()

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Read the request again as if it did not ask for another protocol (RFC 9110, 7.8).

        The parser takes everything after such a head for the other protocol, the body included.
        """
        request, self._request = self._request, None
        if request is None or request.method == "CONNECT":
            self._refuse(_BAD)
            return
        lines = [b"%b %b HTTP/1.1" % (request.method.encode(), self._url)]
        lines += [b"%b: %b" % header for header in request.headers if header[0] != b"upgrade"]
        self._parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    # --- httptools callbacks -----------------------------------------------------------------
    def on_message_begin(self) -> None:
        self.since_s = self._loop.time()
        self._request = Request()
        self._url = b""
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._head_bytes += len(url)
        if self._head_bytes > _MAX_HEAD_BYTES:
            raise _head_too_large()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > _MAX_HEAD_BYTES:
            raise _head_too_large()
        if self._request is not None:
            self._request.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        request = self._request
        if request is None:
            return
        self.since_s = self._loop.time()
        request.method = self._parser.get_method().decode("latin-1")
        target = self._url if self._url.startswith(b"/") else _origin_form(self._url)
        request.raw_path, _, request.query = target.partition(b"?")
        if self._parser.should_upgrade():
            return
        for name, value in request.headers:
            if name == b"content-length":
                size = int(value)
                if size > self._server.max_body_bytes:
                    raise self._too_large()
                if http_body.LEAST_BYTES <= size <= http_body.MOST_BYTES and not self._queue:
                    self._large_bytes = size
            elif name == b"expect" and value.lower() == b"100-continue" and self.idle:
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        request = self._request
        if request is not None:
            request.add(data)
            if request.size > self._server.max_body_bytes:
                raise self._too_large()

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            return  # see _ignore_upgrade
        request, self._request = self._request, None
        if request is None or self.closing:
            return
        request.seal()
        exchange = Exchange(
            self,
            keep_alive=self._parser.should_keep_alive(),
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
        self._error = error
        if self._exchange is None and not self._queue:
            self._answer_error()

    def _answer_error(self) -> None:
        error, self._error = self._error, None
        if error is None or self._transport is None:
            return
        exchange = self._exchange = Exchange(
            self, keep_alive=False, version_1_0=False, no_body=False
        )
        exchange.respond(error.status, error.headers(), error.body())

    def check_pace(self, now_s: float, head_timeout_s: float) -> None:
        """Close when idle for too long; refuse a request that takes too long to come."""
        if not self.idle or self._refused:
            return
        late_s, request = now_s - self.since_s, self._request
        if request is None:
            if late_s > _IDLE_S:
                self.close()
            return
        late_s -= head_timeout_s + request.size / _MIN_BODY_BYTES_PER_S
        if late_s > 0:
            self._refuse(_SLOW)


def _origin_form(target: bytes) -> bytes:
    """The path and query of a target that names the server as well, as proxies are sent it."""
    _, mark, rest = target.partition(b"://")
    if not mark:
        return target
    at = min((i for i in (rest.find(b"/"), rest.find(b"?")) if i >= 0), default=len(rest))
    path = rest[at:]
    return path if path.startswith(b"/") else b"/" + path


_SLOW: Final = RequestTimeoutError("the request came too slowly: send it again, faster")
_FULL: Final = UnavailableError(
    "too many connections: close idle ones, or raise gateway.max_connections",
    code="too_many_connections",
    retry_after_s=1.0,
)


def _head_too_large() -> InvalidRequestError:
    return InvalidRequestError(f"the request's head exceeds {_MAX_HEAD_BYTES} bytes")


_BAD: Final = InvalidRequestError("this is not a valid HTTP/1.1 request", code="bad_request")


class HttpServer:
    """Listens, and closes connections that have been idle for too long.

    Args:
        handler: answers requests.
        max_body_bytes: larger bodies are refused with 413.
        on_response: told the status of every response.
        max_connections: further ones are answered 503 and closed.
        head_timeout_s: time from the first byte of a head to its last; also what a body has
            before its pace is looked at.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        max_body_bytes: int,
        on_response: Callable[[int], None],
        max_connections: int = 4096,
        head_timeout_s: float = 15.0,
    ) -> None:
        self.max_connections = max_connections
        self._head_timeout_s = head_timeout_s
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
        self.check_pace()
        self._sweeper = loop.call_later(_SWEEP_S, self._sweep)

    def check_pace(self) -> None:
        """End connections that are idle, or bring their request, too slowly."""
        now_s = asyncio.get_running_loop().time()
        for connection in list(self.connections):
            connection.check_pace(now_s, self._head_timeout_s)

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
