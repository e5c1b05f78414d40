"""The HTTP server by itself, byte by byte, on both event loops."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conserve_serving.gateway.http_exchange import Exchange, Request
from conserve_serving.gateway.http_server import HttpServer


class Echo:
    """Answers with what was asked; ``/hold`` waits for `go`, ``/stream`` sends two parts."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.seen: list[Request] = []
        self.gone = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    def handle(self, request: Request, exchange: Exchange) -> None:
        self.seen.append(request)
        exchange.on_gone = self.gone.set
        if request.path in ("/hold", "/stream"):
            self.tasks.append(asyncio.create_task(self._later(request, exchange)))
        else:
            body = b"%b %b" % (request.raw_path, request.body)
            exchange.respond(200, [(b"x-a", b"b")], body)

    async def _later(self, request: Request, exchange: Exchange) -> None:
        if request.path == "/hold":
            await self.go.wait()
            exchange.respond(200, [], b"held")
            return
        await exchange.start(200, [(b"x-a", b"b")], b"x-c: d\r\n")
        await exchange.write(b"one")
        await exchange.write(b"")
        await exchange.finish(b"two")
        await exchange.finish(b"three")  # too late: ignored


class Served:
    def __init__(self, server: HttpServer, echo: Echo, port: int) -> None:
        self.server, self.echo, self.port = server, echo, port
        self.statuses: list[int] = []

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def say(self, *pieces: bytes) -> bytes:
        """Everything the server answers to these bytes, until it closes."""
        reader, writer = await self.open()
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        async with asyncio.timeout(5):
            answer = await reader.read()
        writer.close()
        return answer


@pytest_asyncio.fixture
async def served() -> AsyncIterator[Served]:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    echo = Echo()
    statuses: list[int] = []
    server = HttpServer(echo, max_body_bytes=1000, on_response=statuses.append)
    await server.start(listener)
    result = Served(server, echo, listener.getsockname()[1])
    result.statuses = statuses
    yield result
    await server.stop()


CLOSE = b"host: a\r\nconnection: close\r\n"


async def test_answers_and_keeps_the_connection(served: Served) -> None:
    reader, writer = await served.open()
    for number in range(3):
        writer.write(b"POST /a?b=%d HTTP/1.1\r\nHost: a\r\ncontent-length: 2\r\n\r\nhi" % number)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head == b"HTTP/1.1 200 OK\r\nx-a: b\r\ncontent-length: 5\r\n\r\n"
        assert await reader.readexactly(5) == b"/a hi"
    writer.close()
    assert [request.query for request in served.echo.seen] == [b"b=0", b"b=1", b"b=2"]
    assert served.echo.seen[0].headers[0] == (b"host", b"a")
    assert served.statuses == [200] * 3


async def test_stream_is_chunked_and_for_http_1_0_it_is_not(served: Served) -> None:
    new = await served.say(b"GET /stream HTTP/1.1\r\n" + CLOSE + b"\r\n")
    head, _, body = new.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    assert b"x-c: d" in head
    assert body == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
    old = await served.say(b"GET /stream HTTP/1.0\r\n\r\n")
    assert old.endswith(b"\r\n\r\nonetwo")
    assert b"transfer-encoding" not in old


async def test_head_has_no_body(served: Served) -> None:
    answer = await served.say(b"HEAD /a HTTP/1.1\r\n" + CLOSE + b"\r\n")
    assert answer.endswith(b"content-length: 3\r\nconnection: close\r\n\r\n")


async def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    asked = b"GET /hold HTTP/1.1\r\nhost: a\r\n\r\n"
    asked += b"".join(b"GET /%d HTTP/1.1\r\nhost: a\r\n\r\n" % number for number in range(9))
    reader, writer = await served.open()
    writer.write(asked + b"GET /last HTTP/1.1\r\n" + CLOSE + b"\r\n")
    await writer.drain()
    served.echo.go.set()
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    bodies = [part.partition(b"\r\n\r\n")[2].strip() for part in answer.split(b"HTTP/1.1 200")[1:]]
    assert bodies == [b"held", *(b"/%d" % number for number in range(9)), b"/last"]


async def test_expect_continue_and_chunked_bodies(served: Served) -> None:
    reader, writer = await served.open()
    writer.write(b"POST /a HTTP/1.1\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    assert await reader.readexactly(8) == b"/a abcde"
    writer.close()


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /a HTTP/1.1\r\nbad header\r\n\r\n", 400),
        (b"POST /a HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", 400),
        (b"POST /a HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"POST /a HTTP/1.1\r\ncontent-length: 1001\r\n\r\n", 413),
        (b"GET /a HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", 400),
    ],
)
async def test_what_is_refused(served: Served, asked: bytes, status: int) -> None:
    reader, writer = await served.open()
    writer.write(asked)
    async with asyncio.timeout(5):
        answer = await reader.read()  # our side closes after the answer
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b'"error"' in answer
    writer.close()
    assert served.echo.seen == []


async def test_upgrade_is_answered_as_plain_http(served: Served) -> None:
    asked = b"GET /a HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    answer = await served.say(asked)
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_handler_hears_of_a_client_that_left(served: Served) -> None:
    _, writer = await served.open()
    writer.write(b"GET /hold HTTP/1.1\r\nhost: a\r\n\r\n")
    await writer.drain()
    writer.close()
    async with asyncio.timeout(5):
        await served.echo.gone.wait()
    served.echo.go.set()
    await asyncio.gather(*served.echo.tasks)  # answering nobody does no harm


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(1, 160), max_size=6))
def test_requests_may_come_in_any_pieces(cuts: list[int]) -> None:
    asked = (
        b"POST /first?x=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
        b"POST /second HTTP/1.1\r\n"
        + CLOSE
        + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    )
    places = sorted({cut for cut in cuts if cut < len(asked)})
    pieces = [asked[a:b] for a, b in zip([0, *places], [*places, len(asked)], strict=True)]

    async def run() -> bytes:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        server = HttpServer(Echo(), max_body_bytes=1000, on_response=lambda status: None)
        await server.start(listener)
        try:
            return await Served(server, Echo(), listener.getsockname()[1]).say(*pieces)
        finally:
            await server.stop()

    answer = asyncio.run(run())
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert b"/first hello" in answer
    assert answer.endswith(b"/second abc")
