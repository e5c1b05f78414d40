"""The HTTP server by itself, byte by byte, on both event loops."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
import uvloop
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
        exchange.start(200, [(b"x-a", b"b")], b"x-c: d\r\n")
        exchange.send(b"one")
        exchange.send(b"")
        exchange.finish(b"two")
        exchange.finish(b"three")  # too late: ignored


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


@asynccontextmanager
async def serving(max_body_bytes: int) -> AsyncIterator[Served]:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    echo = Echo()
    statuses: list[int] = []
    server = HttpServer(echo, max_body_bytes=max_body_bytes, on_response=statuses.append)
    await server.start(listener)
    result = Served(server, echo, listener.getsockname()[1])
    result.statuses = statuses
    yield result
    await server.stop()


@pytest_asyncio.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(max_body_bytes=1000) as result:
        yield result


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0)


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


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_large_bodies_are_read_into_one_buffer(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def main() -> None:
        async with serving(max_body_bytes=4_000_000) as served:
            bodies = [b"%d" % number * size for number, size in enumerate((300_000, 5, 2_000_000))]
            reader, writer = await served.open()
            for body in bodies:
                head = b"POST /a HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body)
                writer.write(head + body[: len(body) // 3])
                await writer.drain()
                await asyncio.sleep(0.01)
                writer.write(body[len(body) // 3 :])
                await writer.drain()
                await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(len(body) + 3) == b"/a " + body
            # One more, with the next request right behind it, and one that never ends.
            body = b"x" * 200_000
            last = b"GET /last HTTP/1.1\r\n\r\n"
            writer.write(b"POST /b HTTP/1.1\r\ncontent-length: 200000\r\n\r\n" + body + last)
            async with asyncio.timeout(5):
                await reader.readuntil(b"/b " + body)
                await reader.readuntil(b"/last ")
            writer.write(b"POST /c HTTP/1.1\r\ncontent-length: 200000\r\n\r\n" + body[:150_000])
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            await asyncio.sleep(0.1)
            assert not served.server.connections
            assert [bytes(r.body) for r in served.echo.seen] == [*bodies, body, b""]

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


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
    answer = await served.say(asked, b"GET /b HTTP/1.1\r\n" + CLOSE + b"\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert b"/a " in answer


@pytest.mark.parametrize("pieces", [1, 2])
async def test_body_of_an_upgrade_request_is_read(served: Served, pieces: int) -> None:
    asked = b"POST /a?b HTTP/1.1\r\nhost: a\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    asked += b"Upgrade: h2c\r\nHTTP2-Settings: x\r\n"
    sized = asked + b"content-length: 5\r\n\r\nhello"
    chunked = asked + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    last = b"GET /last HTTP/1.1\r\n" + CLOSE + b"\r\n"
    whole = sized + chunked + last
    cut = len(whole) // pieces
    answer = await served.say(*[whole[at : at + cut] for at in range(0, len(whole), cut)])
    assert answer.count(b"HTTP/1.1 200 ") == 3
    assert b"/a hello" in answer
    assert b"/a abc" in answer
    assert answer.endswith(b"/last ")


async def test_slow_large_body_is_408_and_a_quick_one_is_not(served: Served) -> None:
    served.server.max_body_bytes = size = 300_000
    reader, writer = await served.open()
    writer.write(b"POST /a HTTP/1.1\r\ncontent-length: %d\r\n\r\nx" % size)
    async with asyncio.timeout(5):
        await _until(lambda: any(c._request is not None for c in served.server.connections))
        (connection,) = served.server.connections
        for sent in (1000, 100_000):
            writer.write(b"x" * sent)
            at_least = sent
            await _until(lambda: (connection._request or Request()).size > at_least)  # noqa: B023
        since_s = connection.since_s
        connection.check_pace(since_s + 15.0 + 100.0, 15.0)  # 1 kB/s: 101 s are well
        assert not connection._refused
        connection.check_pace(since_s + 15.0 + 110.0, 15.0)
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
    writer.close()


@pytest.mark.parametrize("size", [200_000, 999])
async def test_large_body_of_an_upgrade_request(served: Served, size: int) -> None:
    served.server.max_body_bytes = 300_000
    head = b"POST /a HTTP/1.1\r\nhost: a\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n"
    answer = await served.say(head + b"content-length: %d\r\n\r\n" % size, b"x" * size)
    assert answer.endswith(b"/a " + b"x" * size)


async def test_connect_is_refused(served: Served) -> None:
    answer = await served.say(b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")


async def test_bad_request_behind_good_ones_drops_none_of_them(served: Served) -> None:
    asked = b"GET /hold HTTP/1.1\r\nhost: a\r\n\r\n"
    asked += b"GET /1 HTTP/1.1\r\nhost: a\r\n\r\nGET /2 HTTP/1.1\r\nhost: a\r\n\r\n"
    reader, writer = await served.open()
    writer.write(asked + b"nonsense\r\n\r\n")
    async with asyncio.timeout(5):
        await _until(lambda: bool(served.echo.seen))
        served.echo.go.set()
        answer = await reader.read()
    writer.close()
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"200", b"200", b"400"]
    assert answer.index(b"held") < answer.index(b"/1 ") < answer.index(b"/2 ")


async def test_client_that_only_stops_sending_gets_its_answer(served: Served) -> None:
    reader, writer = await served.open()
    writer.write(b"GET /hold HTTP/1.1\r\nhost: a\r\n\r\nGET /b HTTP/1.1\r\nhost: a\r\n\r\n")
    writer.write_eof()
    async with asyncio.timeout(5):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 102 ")
        assert not served.echo.gone.is_set()
        served.echo.go.set()
        answer = await reader.read()
    writer.close()
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert answer.endswith(b"/b ")


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"http://a:1/b/c?d=e", "/b/c", b"d=e"),
        (b"http://a:1", "/", b""),
        (b"http://a?b", "/", b"b"),
        (b"/x?http://y/z", "/x", b"http://y/z"),
    ],
)
async def test_absolute_targets(served: Served, target: bytes, path: str, query: bytes) -> None:
    answer = await served.say(b"GET %b HTTP/1.1\r\n" % target + CLOSE + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    (request,) = served.echo.seen
    assert (request.path, request.query) == (path, query)


@pytest.mark.parametrize(
    "sent",
    [b"GET /a HTTP/1.1\r\nx: ", b"POST /a HTTP/1.1\r\ncontent-length: 99\r\n\r\nx", b"G"],
)
async def test_request_that_comes_too_slowly_is_408(served: Served, sent: bytes) -> None:
    served.server._head_timeout_s = -1.0
    reader, writer = await served.open()
    writer.write(sent)
    async with asyncio.timeout(5):
        await _until(lambda: any(c._request is not None for c in served.server.connections))
        served.server.check_pace()
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 408 ")
    writer.close()


async def test_drip_of_bytes_gains_no_time(served: Served) -> None:
    _, writer = await served.open()
    writer.write(b"GET /a HTTP/1.1\r\n")
    async with asyncio.timeout(5):
        await _until(lambda: any(c._request is not None for c in served.server.connections))
        (connection,) = served.server.connections
        since_s = connection.since_s
        writer.write(b"x: y\r\nz")
        await _until(lambda: bool(connection._request and connection._request.headers))
    assert connection.since_s == since_s
    writer.close()


async def test_large_body_that_comes_too_slowly_is_408() -> None:
    async with serving(max_body_bytes=1_000_000) as served:
        reader, writer = await served.open()
        writer.write(b"POST /a HTTP/1.1\r\ncontent-length: 500000\r\n\r\n" + b"x" * 1000)
        async with asyncio.timeout(5):
            for size in (1000, 3000):
                while not any(
                    c._request is not None and c._request.size == size
                    for c in served.server.connections
                ):
                    await asyncio.sleep(0)
                if size == 1000:
                    writer.write(b"x" * 2000)
            (connection,) = served.server.connections
            connection.check_pace(connection.since_s + 4.5, head_timeout_s=2.0)
            assert not connection._refused  # 3000 bytes have 3 s more than the head
            connection.check_pace(connection.since_s + 5.5, head_timeout_s=2.0)
            assert b" 408 " in await reader.readline()
        writer.close()


async def test_running_requests_and_quick_ones_are_left_alone(served: Served) -> None:
    reader, writer = await served.open()
    writer.write(b"GET /hold HTTP/1.1\r\n" + CLOSE + b"\r\n")
    async with asyncio.timeout(5):
        await _until(lambda: bool(served.echo.seen))
        served.server._head_timeout_s = -1.0
        served.server.check_pace()
        served.echo.go.set()
        assert (await reader.read()).endswith(b"held")
    writer.close()


async def test_too_many_connections_are_503(served: Served) -> None:
    served.server.max_connections = 1
    reader, writer = await served.open()
    writer.write(b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n")
    await reader.readuntil(b"/a ")
    refused = await served.say(b"")
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in refused
    assert b"max_connections" in refused
    writer.close()
    async with asyncio.timeout(5):
        await _until(lambda: not served.server.connections)
    answer = await served.say(b"GET /b HTTP/1.1\r\n" + CLOSE + b"\r\n")
    assert answer.endswith(b"/b ")


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
