"""The pool on real sockets: reuse, death in every phase, back-pressure, cancellation."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from conserve_serving.engines.http import HttpPool, Response
from conserve_serving.engines.http_connection import MAX_HEAD_BYTES, SLICE_BYTES
from conserve_serving.engines.http_errors import (
    ConnectFailed,
    ConnectionLost,
    ProtocolError,
    ResponseTimeout,
)
from conserve_serving.engines.http_response import PAUSE_ABOVE_BYTES

if TYPE_CHECKING:
    from conftest import Peer, ScriptedServer

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def answer_all(peer: Peer) -> None:
    while True:
        got = await peer.request()
        peer.reply(b"%d:%s" % (peer.number, got.body))


async def get(pool: HttpPool, path: str = "/", **options: object) -> bytes:
    async with await pool.request("GET", path, **options) as response:  # type: ignore[arg-type] # options of one test
        return await response.read()


# --- reuse ------------------------------------------------------------------------------------


async def test_requests_one_after_another_share_a_connection(server: ScriptedServer) -> None:
    pool = await server.pool(answer_all)
    for n in range(5):
        body = b"hello %d" % n
        async with await pool.request("POST", "/x", [(b"A", b"b")], body) as response:
            assert response.status == 200
            assert await response.read() == b"1:" + body
    assert (server.accepted, pool.opened, pool.idle, pool.active) == (1, 1, 1, 0)


async def test_concurrent_requests_have_connections_of_their_own(server: ScriptedServer) -> None:
    pool = await server.pool(answer_all, max_idle=2)
    bodies = await asyncio.gather(*(get(pool) for _ in range(5)))
    assert sorted(bodies) == [b"%d:" % n for n in range(1, 6)]
    assert pool.idle == 2  # the others were closed
    assert pool.active == 0 or pool.opened == 5


async def test_what_is_sent_is_what_was_asked(server: ScriptedServer) -> None:
    seen = []

    async def script(peer: Peer) -> None:
        while True:
            seen.append(await peer.request())
            peer.reply()

    pool = await server.pool(script)
    response = await pool.request(
        "POST", "/v1/x?y=1", [(b"X-One", b"1"), (b"X-Two", b"2")], [b"ab", memoryview(b"cd")]
    )
    assert await response.read() == b"ok"
    await get(pool, "/bare")
    assert seen[0].line == b"POST /v1/x?y=1 HTTP/1.1"
    assert seen[0].body == b"abcd"
    assert seen[0].headers == {
        b"host": pool.origin.encode(),
        b"x-one": b"1",
        b"x-two": b"2",
        b"content-length": b"4",
    }
    assert seen[1].line == b"GET /bare HTTP/1.1"
    assert seen[1].headers == {b"host": pool.origin.encode()}


async def test_idle_connections_expire_by_the_clock(server: ScriptedServer) -> None:
    gone = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.reply()
        await peer.gone()
        gone.set()

    now_s = 100.0
    pool = await server.pool(script, idle_expire_s=4.0, clock=lambda: now_s)
    await get(pool)
    now_s += 3.9
    pool.expire_idle()
    assert pool.idle == 1
    now_s += 0.2
    pool.expire_idle()
    assert pool.idle == 0
    await gone.wait()
    await get(pool)
    now_s += 4.1  # not swept yet, and yet not used
    await get(pool)
    assert pool.opened == 3
    assert pool.retried == 0


async def test_connection_closed_while_idle_is_not_used(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.reply(b"%d" % peer.number)
        peer.close()

    pool = await server.pool(script)
    assert await get(pool) == b"1"
    await _until(lambda: not pool.idle)  # the close has been seen
    assert await get(pool) == b"2"
    assert pool.retried == 0


async def test_reused_connection_that_dies_before_the_response_is_replaced_once(
    server: ScriptedServer,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.reply(b"first")
        got = await peer.request()
        if peer.number == 1:
            peer.reset()  # closed on us just as the request was on its way
        else:
            peer.reply(got.body)

    pool = await server.pool(script)
    assert await get(pool) == b"first"
    async with await pool.request("POST", "/", (), [b"re", b"play"]) as response:
        assert await response.read() == b"first"  # the second connection's first answer
    assert (pool.opened, pool.retried) == (2, 1)


async def test_retry_goes_to_a_fresh_connection_though_others_are_idle(
    server: ScriptedServer,
) -> None:
    both = asyncio.Barrier(2)

    async def script(peer: Peer) -> None:
        await peer.request()
        if peer.number <= 2:
            await both.wait()
        peer.reply(b"%d" % peer.number)
        await peer.request()
        peer.reset()

    pool = await server.pool(script)
    await asyncio.gather(get(pool), get(pool))
    assert pool.idle == 2
    assert await get(pool) == b"3"
    assert pool.retried == 1


async def test_fresh_connection_that_dies_is_not_retried(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.close()

    pool = await server.pool(script)
    with pytest.raises(ConnectionLost) as lost:
        await get(pool)
    assert lost.value.before_first_byte
    assert pool.origin in str(lost.value)
    assert (server.accepted, pool.retried) == (1, 0)


async def test_no_retry_once_a_byte_of_the_response_came(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.reply()
        await peer.request()
        peer.send(b"HTTP/1.1 2")
        peer.close()

    pool = await server.pool(script)
    await get(pool)
    with pytest.raises(ConnectionLost) as lost:
        await get(pool)
    assert not lost.value.before_first_byte
    assert server.accepted == 1


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok and more",
    ],
    ids=["connection-close", "http-1.0", "second-response", "surplus"],
)
async def test_connection_is_not_reused_after(server: ScriptedServer, reply: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(reply)
        await peer.gone()

    pool = await server.pool(script)
    assert await get(pool) == b"ok"
    assert await get(pool) == b"ok"
    assert pool.opened == 2


async def test_bytes_nobody_asked_for_close_an_idle_connection(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.reply(b"%d" % peer.number)
        if peer.number == 1:
            await say.wait()
            peer.reply(b"unasked")
            await peer.gone()
            gone.set()

    say, gone = asyncio.Event(), asyncio.Event()
    pool = await server.pool(script)
    assert await get(pool) == b"1"
    say.set()
    await gone.wait()
    assert await get(pool) == b"2"


# --- responses ----------------------------------------------------------------------------------


async def test_each_event_is_handed_over_when_it_arrives(server: ScriptedServer) -> None:
    taken = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(CHUNKED)
        for n in range(5):
            peer.send(chunk(b"data: %d\n\n" % n))
            await taken.wait()  # the next one is sent only when this one has reached the consumer
            taken.clear()
        peer.send(b"0\r\n\r\n")

    pool = await server.pool(script)
    got = []
    async with await pool.request("POST", "/", (), b"{}") as response:
        async for data in response:
            got.append(data)
            taken.set()
    assert got == [b"data: %d\n\n" % n for n in range(5)]
    assert response.ended
    assert pool.idle == 1


async def test_events_that_arrive_together_stay_together(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(CHUNKED + chunk(b"a") + chunk(b"b") + b"0\r\nTrailer: dropped\r\n\r\n")

    pool = await server.pool(script)
    async with await pool.request("GET", "/") as response:
        assert [data async for data in response] == [b"ab"]
        assert response.header(b"trailer") is None


async def test_forward_waits_for_a_consumer_that_is_behind(server: ScriptedServer) -> None:
    taken: list[bytes] = []
    go, behind = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(CHUNKED)
        for n in range(3):
            peer.send(chunk(b"%d" % n))
            await asyncio.sleep(0.02)
        peer.send(b"0\r\n\r\n")

    def take(data: bytes) -> bool:
        taken.append(data)
        return data != b"1"

    async def drained() -> None:
        behind.set()
        await go.wait()

    pool = await server.pool(script)
    async with await pool.request("GET", "/") as response, asyncio.timeout(5):
        forwarding = asyncio.create_task(response.forward(take, drained))
        await behind.wait()
        await asyncio.sleep(0.1)
        assert taken == [b"0", b"1"]
        go.set()
        await forwarding
        assert taken == [b"0", b"1", b"2"]
        assert response.exhausted


async def test_forward_raises_what_its_consumer_raised(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(CHUNKED)
        await asyncio.sleep(0.02)
        peer.send(chunk(b"one"))
        await peer.gone()

    def take(data: bytes) -> bool:
        raise ValueError(data.decode())

    async def drained() -> None: ...

    pool = await server.pool(script)
    async with await pool.request("GET", "/") as response:
        with pytest.raises(ValueError, match="one"):
            await response.forward(take, drained)
    await _until(lambda: pool.active == 0)


async def test_body_that_ends_with_the_connection(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\n\r\nuntil ")
        peer.send(b"the end")
        peer.close()

    pool = await server.pool(script)
    assert await get(pool) == b"until the end"
    assert pool.idle == 0


async def test_responses_without_body_leave_the_connection_usable(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        for status in (b"204 No Content", b"304 Not Modified"):
            await peer.request()
            peer.send(b"HTTP/1.1 " + status + b"\r\nContent-Length: 7\r\n\r\n")
        await peer.request()
        peer.reply(b"body", extra=b"Link: </x>\r\n")

    pool = await server.pool(script)
    for status in (204, 304):
        async with await pool.request("GET", "/") as response:
            assert (response.status, await response.read()) == (status, b"")
    async with await pool.request("GET", "/") as response:
        assert await response.read() == b"body"
        assert response.header(b"link") == b"</x>"
    assert server.accepted == 1


async def test_head_request_has_no_body(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        got = await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n")
        if got.line.startswith(b"GET"):
            peer.send(b"1234567")
        await peer.gone()

    pool = await server.pool(script)
    async with await pool.request("HEAD", "/") as response:
        assert (response.status, await response.read()) == (200, b"")
    assert await get(pool) == b"1234567"


async def test_interim_responses_are_skipped(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
        peer.reply(b"final")
        await peer.gone()

    pool = await server.pool(script)
    async with await pool.request("POST", "/", (), b"{}") as response:
        assert (response.status, await response.read()) == (200, b"final")
        assert response.header(b"link") is None
    assert pool.idle == 1


@pytest.mark.parametrize(
    "truncated",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        CHUNKED + chunk(b"half"),
        CHUNKED + b"a\r\nhalf",
    ],
    ids=["content-length", "no-last-chunk", "inside-chunk"],
)
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_response_cut_short(server: ScriptedServer, truncated: bytes, how: str) -> None:
    taken = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(truncated)
        await taken.wait()
        getattr(peer, how)()

    pool = await server.pool(script)
    async with await pool.request("GET", "/") as response:
        assert await anext(response) == b"half"
        taken.set()
        with pytest.raises(ConnectionLost) as lost:
            await anext(response)
    assert not lost.value.before_first_byte
    assert pool.idle == 0


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "invalid response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "Content-Length"),
        (b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", "invalid"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * (MAX_HEAD_BYTES + 1), "head exceeds"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 4000, "head exceeds"),
    ],
    ids=["not-http", "two-lengths", "upgrade", "huge-head", "endless-interim"],
)
async def test_nonsense_is_refused(server: ScriptedServer, reply: bytes, message: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(reply)
        await peer.gone()

    pool = await server.pool(script)
    with pytest.raises(ProtocolError, match=message):
        await get(pool)
    assert pool.idle == 0


async def test_invalid_chunk_after_a_good_one(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(CHUNKED + chunk(b"good"))
        await taken.wait()
        peer.send(b"zz\r\n")
        await peer.gone()

    taken = asyncio.Event()
    pool = await server.pool(script)
    async with await pool.request("GET", "/") as response:
        assert await anext(response) == b"good"
        taken.set()
        with pytest.raises(ProtocolError):
            await anext(response)


async def test_read_refuses_a_body_beyond_its_limit(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.reply(b"x" * 1000)
        await peer.gone()

    pool = await server.pool(script)
    async with await pool.request("GET", "/") as response:
        with pytest.raises(ProtocolError, match="exceeds 999 bytes"):
            await response.read(max_bytes=999)


# --- large bodies and back-pressure -------------------------------------------------------------


async def test_two_megabytes_each_way(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        while True:
            got = await peer.request()
            peer.reply(got.body[::-1])

    pool = await server.pool(script)
    body = os.urandom(2_000_003)
    parts = [body[:100], memoryview(body)[100 : SLICE_BYTES + 7], body[SLICE_BYTES + 7 :], b""]
    for _ in range(2):
        async with await pool.request("POST", "/", (), parts) as response:
            assert await response.read() == body[::-1]
    assert server.accepted == 1


async def test_slow_consumer_stalls_the_engine(server: ScriptedServer) -> None:
    block, blocks = os.urandom(256 * 1024), 160  # 40 MB, far above what sockets can hold
    stalled = asyncio.Event()
    written = hashlib.sha256()

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(block) * blocks))
        for _ in range(blocks):
            peer.send(block)
            written.update(block)
            # The socket takes no more while the client does not read; once it reads, every
            # turn of the loop moves at least as much as is written here.
            if peer.writer.transport.get_write_buffer_size() > 4_000_000:
                stalled.set()
                await peer.writer.drain()
            await asyncio.sleep(0)
        await peer.gone()

    pool = await server.pool(script)
    async with await pool.request("GET", "/") as response:
        first = await anext(response)
        await stalled.wait()
        # What waits here is at most what made the reading stop, and one read more.
        waiting = response._buffered_bytes
        assert PAUSE_ABOVE_BYTES < waiting <= PAUSE_ABOVE_BYTES + 256 * 1024
        got = hashlib.sha256(first)
        async for data in response:
            got.update(data)
    assert got.digest() == written.digest()
    assert pool.idle == 1  # reading goes on for the connection's next request


async def test_slow_engine_stalls_the_sender(server: ScriptedServer) -> None:
    size = 32 * 1024 * 1024

    async def script(peer: Peer) -> None:
        got = await peer.head()
        await release.wait()
        received = await peer.reader.readexactly(int(got.headers[b"content-length"]))
        peer.reply(b"%d" % len(received))

    release = asyncio.Event()
    pool = await server.pool(script)
    request = asyncio.create_task(pool.request("POST", "/", (), bytes(size)))
    await _until(lambda: pool._open)
    (connection,) = pool._open
    await _until(lambda: connection._drained is not None)
    transport = connection._transport
    assert transport is not None
    assert transport.get_write_buffer_size() <= 2 * SLICE_BYTES
    release.set()
    async with await request as response:
        assert await response.read() == b"%d" % size


async def _until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0)


async def test_early_response_ends_the_sending(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        got = await peer.head()
        if b"/big" in got.line:
            await stalled.wait()
            peer.send(CHUNKED.replace(b"200 OK", b"413 Too Large") + chunk(b"too large"))
            await taken.wait()  # the body stays unread, the response unfinished
            peer.send(b"0\r\n\r\n")
            await peer.gone()
        else:
            peer.reply(b"fine")

    stalled, taken = asyncio.Event(), asyncio.Event()
    pool = await server.pool(script)
    request = asyncio.create_task(pool.request("POST", "/big", (), bytes(64 * 1024 * 1024)))
    await _until(lambda: pool._open)
    (connection,) = pool._open
    await _until(lambda: connection._drained is not None)
    stalled.set()
    async with await request as response:
        assert (response.status, await anext(response)) == (413, b"too large")
        taken.set()
        assert await response.read() == b""
    assert pool.idle == 0  # half a request is on that connection
    assert await get(pool) == b"fine"


async def test_engine_that_dies_while_a_body_is_sent(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        peer.reset()

    pool = await server.pool(script)
    with pytest.raises(ConnectionLost) as lost:
        await pool.request("POST", "/", (), bytes(64 * 1024 * 1024))
    assert lost.value.before_first_byte


# --- leaving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["sending", "head", "body"])
async def test_cancelling_closes_the_connection(server: ScriptedServer, phase: str) -> None:
    reached, gone = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        if phase == "sending":
            await peer.head()
        else:
            await peer.request()
        if phase == "body":
            peer.send(CHUNKED + chunk(b"data"))
        else:
            reached.set()
        if phase != "sending":
            await peer.gone()
            gone.set()
        else:
            await resume.wait()
            await peer.gone()
            gone.set()

    async def consume() -> None:
        response = await pool.request("POST", "/", (), body)
        async with aclosing(_chunks(response)) as chunks:
            async for _ in chunks:
                reached.set()

    resume = asyncio.Event()
    body = bytes(64 * 1024 * 1024) if phase == "sending" else b"{}"
    pool = await server.pool(script)
    task = asyncio.create_task(consume())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    resume.set()
    await gone.wait()
    assert (pool.idle, pool.active) == (0, 0)


async def _chunks(response: Response) -> AsyncGenerator[bytes, None]:
    async for data in response:
        yield data


async def test_leaving_the_context_closes_an_unfinished_response(server: ScriptedServer) -> None:
    gone = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(CHUNKED + chunk(b"data"))
        await peer.gone()
        gone.set()

    pool = await server.pool(script)
    async with await pool.request("GET", "/") as response:
        assert await anext(response) == b"data"
    await gone.wait()
    with pytest.raises(ConnectionLost, match="our side"):
        await anext(response)


async def test_closing_wakes_a_waiting_consumer(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(CHUNKED)
        await peer.gone()

    pool = await server.pool(script)
    response = await pool.request("GET", "/")
    waiting = asyncio.create_task(response.read())
    await asyncio.sleep(0)
    response.close()
    with pytest.raises(ConnectionLost):
        await waiting


async def test_closing_the_pool_ends_what_is_in_flight(server: ScriptedServer) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        if peer.number == 1:
            peer.send(CHUNKED)
        await peer.gone()

    pool = await server.pool(script)
    response = await pool.request("GET", "/")
    body = asyncio.create_task(response.read())
    head = asyncio.create_task(pool.request("GET", "/"))
    await _until(lambda: server.accepted == 2)
    pool.close()
    for task in (body, head):
        with pytest.raises(ConnectionLost):
            await task
    assert (pool.idle, pool.active) == (0, 0)


# --- no connection, no answer -------------------------------------------------------------------


async def test_connection_refused() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    pool = HttpPool("127.0.0.1", port)
    with pytest.raises(ConnectFailed, match=f"127.0.0.1:{port}: cannot connect"):
        await get(pool)


async def test_connecting_takes_too_long() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        # A full backlog: the kernel drops further SYNs, as an overloaded host does.
        with socket.create_connection(address), socket.socket() as second:
            second.setblocking(False)
            second.connect_ex(address)
            pool = HttpPool(*address, connect_timeout_s=0.05)
            with pytest.raises(ConnectFailed, match=r"within 0\.05 s"):
                await get(pool)


async def test_no_answer_in_time(server: ScriptedServer) -> None:
    gone = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.gone()
        gone.set()

    pool = await server.pool(script)
    with pytest.raises(ResponseTimeout, match=r"GET /slow within 0\.02 s"):
        await get(pool, "/slow", head_timeout_s=0.02)
    await gone.wait()
    assert pool.active == 0


# --- what may not be sent -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "headers", "message"),
    [
        ("/a b", [], "percent-encode"),
        ("/a\r\nX: y", [], "CR, LF or NUL"),
        ("/ü", [], "ascii"),
        ("/", [(b"X", b"1\r\nY: 2")], "CR, LF or NUL"),
        ("/", [(b"X", b"1\nY: 2")], "CR, LF or NUL"),
        ("/", [(b"X", b"\0")], "CR, LF or NUL"),
        ("/", [(b"Content-Length", b"1")], "set by the pool"),
        ("/", [(b"transfer-encoding", b"chunked")], "set by the pool"),
    ],
)
async def test_what_would_split_a_request_is_refused(
    path: str, headers: list[tuple[bytes, bytes]], message: str
) -> None:
    pool = HttpPool("127.0.0.1", 1)
    with pytest.raises(ValueError, match=message):
        await pool.request("POST", path, headers, b"{}")
    assert pool.opened == 0
