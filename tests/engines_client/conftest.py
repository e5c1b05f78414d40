"""A server that does on a socket exactly what a test scripts, byte by byte."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
import uvloop

from conserve_serving.engines.http import HttpPool


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every test of sockets runs on both loops: they differ in how they close and pause."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@dataclass(frozen=True)
class Received:
    """One request as the server read it."""

    line: bytes
    headers: dict[bytes, bytes]
    body: bytes


class Peer:
    """The server's end of one connection."""

    def __init__(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.number = number
        self.reader = reader
        self.writer = writer

    async def head(self) -> Received:
        """The next request's head only; the body stays unread."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines[1:-2])
        return Received(lines[0], {k.lower(): v for k, v in headers.items()}, b"")

    async def request(self) -> Received:
        """The next request, body included."""
        head = await self.head()
        size = int(head.headers.get(b"content-length", b"0"))
        return Received(head.line, head.headers, await self.reader.readexactly(size))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def reply(self, body: bytes = b"ok", status: bytes = b"200 OK", extra: bytes = b"") -> None:
        self.send(
            b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n%s" % (status, len(body), extra, body)
        )

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """Close with RST, as a process that is killed with unread data does."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Wait until the client has closed its end."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            pass


Script = Callable[[Peer], Awaitable[None]]


class ScriptedServer:
    """Runs a script for each connection it accepts; a script's error fails the test."""

    def __init__(self) -> None:
        self.accepted = 0
        self.errors: list[BaseException] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []

    async def start(self, script: Script) -> int:
        """Listen; returns the port."""

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.accepted += 1
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                await script(Peer(self.accepted, reader, writer))
            except (asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError):
                pass  # the client left between requests, or the test is over
            except BaseException as error:  # noqa: BLE001 -- handed to the test by the fixture
                self.errors.append(error)
            finally:
                self._tasks.discard(task)
                writer.transport.abort()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def pool(self, script: Script, **options: object) -> HttpPool:
        """A pool of connections to a server running ``script``."""
        return HttpPool("127.0.0.1", await self.start(script), **options)  # type: ignore[arg-type] # options of one test

    async def stop(self) -> None:
        for server in self._servers:
            server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A lost wake-up fails its test within 30 s instead of hanging the suite."""

    def late(*_: object) -> None:
        pytest.fail("still waiting after 30 s: something was never woken")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest_asyncio.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer()
    yield scripted
    await scripted.stop()
    assert scripted.errors == []
