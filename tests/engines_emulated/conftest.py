"""Engines in virtual time, on real sockets."""

from __future__ import annotations

import asyncio
import heapq
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from conserve_serving.engines.emulated import EmulatedEngine, EngineConfig
from conserve_serving.engines.http import HttpPool


class InstantClock:
    """Model time that jumps to whatever is waited for: everything happens at once, in order."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now_s(self) -> float:
        return self._now_s

    def call_at(self, at_s: float, callback: Callable[[], None]) -> asyncio.Handle:
        def fire() -> None:
            self._now_s = max(self._now_s, at_s)
            callback()

        return asyncio.get_running_loop().call_soon(fire)


class _Alarm:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """Model time that stands still until a test moves it."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._alarms: list[tuple[float, int, _Alarm]] = []
        self._count = 0
        self._armed = asyncio.Event()

    def now_s(self) -> float:
        return self._now_s

    def set_now_s(self, now_s: float) -> None:
        """Let time pass without waking anybody (a busy event loop)."""
        self._now_s = now_s

    def call_at(self, at_s: float, callback: Callable[[], None]) -> _Alarm:
        alarm = _Alarm(callback)
        self._count += 1
        heapq.heappush(self._alarms, (at_s, self._count, alarm))
        self._armed.set()
        return alarm

    async def armed(self) -> None:
        """Until somebody waits for a time."""
        while not self._live():
            self._armed.clear()
            await self._armed.wait()

    async def fire_next(self) -> float:
        """Move to the next time somebody waits for, and wake them; returns that time."""
        await self.armed()
        at_s, _, alarm = heapq.heappop(self._alarms)
        self._now_s = max(self._now_s, at_s)
        assert alarm.callback is not None
        alarm.callback()
        return at_s

    def next_s(self) -> float | None:
        """The next time somebody waits for."""
        return self._alarms[0][0] if self._live() else None

    def _live(self) -> bool:
        while self._alarms and self._alarms[0][2].callback is None:
            heapq.heappop(self._alarms)
        return bool(self._alarms)


@dataclass
class Answer:
    """A whole HTTP response."""

    status: int
    body: bytes
    events: list[Any] = field(default_factory=list)

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Talks to one engine over a real socket."""

    def __init__(self, engine: EmulatedEngine) -> None:
        self.engine = engine
        self.pool = HttpPool("127.0.0.1", engine.port)

    async def call(self, method: str, path: str, content: Any = None) -> Answer:
        body = content if isinstance(content, bytes) else b""
        if not body and content is not None:
            body = json.dumps(content).encode()
        headers = [(b"content-type", b"application/json")]
        response = await self.pool.request(method, path, headers, body)
        async with response:
            text = await response.read()
        answer = Answer(response.status, text)
        if text.startswith((b"data:", b"event:")):
            lines = [line for line in text.decode().split("\n") if line.startswith("data: ")]
            assert lines.pop() == "data: [DONE]"
            answer.events = [json.loads(line.removeprefix("data: ")) for line in lines]
        return answer

    async def get(self, path: str) -> Answer:
        return await self.call("GET", path)

    async def post(self, path: str, content: Any) -> Answer:
        return await self.call("POST", path, content)

    async def ok(self, path: str, content: Any) -> Any:
        answer = await self.post(path, content)
        assert answer.status == 200, answer.body
        return answer.json()


StartEngine = Callable[..., Awaitable[Client]]


@pytest.fixture
async def start_engine() -> AsyncIterator[StartEngine]:
    """Starts engines (settings of ``EngineConfig``, and ``clock``) that end with the test."""
    async with AsyncExitStack() as stack:

        async def start(*, clock: Any = None, **settings: Any) -> Client:
            config = EngineConfig(**settings)
            engine = EmulatedEngine(config, clock=clock or InstantClock())
            await stack.enter_async_context(engine)
            client = Client(engine)
            stack.callback(client.pool.close)
            return client

        yield start


@pytest.fixture
async def engine(start_engine: StartEngine) -> Client:
    """One engine with the defaults, in virtual time."""
    return await start_engine()


@pytest.fixture
def manual_clock() -> type[ManualClock]:
    """The class: a test makes its clock inside its own event loop."""
    return ManualClock


class AckServer:
    """Takes acknowledgements; answers each with the next of ``statuses``, then with 200."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.statuses: list[int] = []
        self.url = ""
        self._arrived = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/conserve/v1/handoffs"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def wait(self, count: int) -> None:
        """Until ``count`` acknowledgements have come."""
        while len(self.received) < count:
            self._arrived.clear()
            await self._arrived.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                line = next(text for text in head.split("\r\n") if "content-length" in text)
                self.received.append(json.loads(await reader.readexactly(int(line.split()[1]))))
                status = self.statuses.pop(0) if self.statuses else 200
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n".encode())
                self._arrived.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


@pytest.fixture
async def ack_server() -> AsyncIterator[AckServer]:
    """An address for acknowledgements."""
    server = AckServer()
    await server.start()
    yield server
    await server.stop()
