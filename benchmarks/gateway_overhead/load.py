"""The load: closed-loop connections that play agent conversations, on a protocol of their own.

A conversation is a history of a given size, opened by a first turn and grown by ``TURNS - 1`` tail
turns; then the next one begins. Every response is checked: status 200, all events, a proper end.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

TURNS = 32
_END = b"\r\n0\r\n\r\n"
_SENT = re.compile(rb'"t=(\d+) "')
_ids = itertools.count()


@dataclass(frozen=True)
class Spec:
    """What one connection asks for.

    Attributes:
        history_bytes: about the size of the body.
        events: content events of a reply.
        gap_us: between them.
        wait: the first one waits as well.
    """

    history_bytes: int
    events: int = 5
    gap_us: int = 0
    wait: bool = False


@dataclass
class Tally:
    """What happened between ``start_s`` and ``end_s`` (monotonic)."""

    start_s: float
    end_s: float
    latencies_s: list[float] = field(default_factory=list)
    event_delays_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


def bodies(spec: Spec) -> tuple[bytes, list[bytes]]:
    """A shared history, and for each turn what follows it."""
    size = max(400, min(10_000, spec.history_bytes // 5))
    text = 'def f(x):\n    return "ünï" + x  # tool output, as agents read it\n'
    text = text * (size // len(text) + 1)
    messages = [json.dumps({"role": "system", "content": "You are an agent."})]
    length = 0
    for role in itertools.cycle(("user", "assistant")):
        if length + size > spec.history_bytes and role == "user":
            break
        content = text[: max(50, min(size, spec.history_bytes - length))]
        messages.append(json.dumps({"role": role, "content": content}, ensure_ascii=False))
        length += len(messages[-1].encode())
    start = (
        f'{{"model":"bench","stream":true,"max_tokens":{spec.events},"seed":{spec.gap_us},'
        f'"temperature":{int(spec.wait)},"messages":[{",".join(messages)}'
    )
    turns, tail = [], ""
    for turn in range(TURNS):
        tail += f',{{"role":"user","content":"Now look at file {turn}."}}'
        turns.append((tail + "]}").encode())
        tail += ',{"role":"assistant","content":"I have read it and go on."}'
    return start.encode(), turns


def requests(spec: Spec, id_header: str) -> Iterator[list[bytes]]:
    """Buffers of one request after the other, conversation after conversation."""
    start, turns = bodies(spec)
    while True:
        name = f"{id_header}: bench-{next(_ids)}\r\n"
        for index, turn in enumerate(turns):
            final = "X-ConServe-Final: 1\r\n" if index == TURNS - 1 else ""
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\n"
                f"Content-Type: application/json\r\n{name}{final}"
                f"Content-Length: {len(start) + len(turn)}\r\n\r\n"
            )
            yield [head.encode(), start, turn]


class Connection(asyncio.Protocol):
    """One closed-loop client."""

    def __init__(self, spec: Spec, id_header: str, tally: Tally) -> None:
        self._spec = spec
        self._requests = requests(spec, id_header)
        self._tally = tally
        self._closing = False
        self.started = asyncio.Event()  # the first byte of a response is there
        self.failed: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._next()

    def _next(self) -> None:
        self._events = 0
        self._rest = b""  # since the last whole event
        self._first = True
        self._sent_s = time.monotonic()
        self._transport.writelines(next(self._requests))

    def data_received(self, data: bytes) -> None:
        if self._first:
            self._first = False
            self.started.set()
            if not data.startswith(b"HTTP/1.1 200"):
                self._fail(data[:300].decode("utf-8", "replace"))
                return
        self._rest += data
        whole = self._rest.rfind(b"\n\n") + 1
        times = _SENT.findall(self._rest, 0, whole)
        self._rest = self._rest[whole:]
        self._events += len(times)
        now_s = time.monotonic()
        counted = self._tally.start_s <= now_s <= self._tally.end_s
        if self._spec.gap_us and counted and times:
            now_ns = time.monotonic_ns()
            self._tally.event_delays_s.extend((now_ns - int(sent)) / 1e9 for sent in times)
        if not self._rest.endswith(_END):
            return
        if self._events != self._spec.events:
            self._fail(f"{self._events} of {self._spec.events} events")
            return
        if counted:
            self._tally.latencies_s.append(now_s - self._sent_s)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closing:
            self._fail(f"connection lost: {exc or 'closed'}")

    def _fail(self, what: str) -> None:
        self.failed = what
        self._tally.errors[what] += 1
        self.close()

    def close(self) -> None:
        """Leave, whatever is in flight."""
        self._closing = True
        self._transport.abort()


async def connect(port: int, spec: Spec, id_header: str, tally: Tally) -> Connection:
    """One more client of the server at ``port``."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(
        lambda: Connection(spec, id_header, tally), "127.0.0.1", port
    )
    return connection


@dataclass(frozen=True)
class Window:
    """A measurement: what the clients saw, and the server's CPU time meanwhile."""

    seconds: float
    cpu_s: float
    tally: Tally


async def run(
    clients: list[tuple[int, Spec]],
    *,
    id_header: str,
    warm_s: float,
    seconds: float,
    read_cpu_s: Callable[[], float],
) -> Window:
    """Run closed-loop clients, ``(port, spec)`` each, and measure after a warm-up.

    Raises:
        RuntimeError: a response was wrong, or none came: such a benchmark is worth nothing.
    """
    start_s = time.monotonic() + warm_s
    tally = Tally(start_s, start_s + seconds)
    connections = [await connect(port, spec, id_header, tally) for port, spec in clients]
    await asyncio.sleep(start_s - time.monotonic())
    # With large bodies this process may be late: the window begins when it is looked at.
    cpu_s, began_s = read_cpu_s(), time.monotonic()
    tally.start_s, tally.end_s = began_s, began_s + seconds
    await asyncio.sleep(tally.end_s - time.monotonic())
    cpu_s, took_s = read_cpu_s() - cpu_s, time.monotonic() - began_s
    for connection in connections:
        connection.close()
    if tally.errors:
        raise RuntimeError(f"responses went wrong: {tally.errors.most_common(3)}")
    if not tally.latencies_s:
        raise RuntimeError("no request finished within the window: raise --seconds")
    await asyncio.sleep(0.05)  # the server sees the clients leave before the next run
    return Window(seconds=took_s, cpu_s=cpu_s, tally=tally)
