"""One engine under test, emulated or real: the same tests hold for both.

The emulated engine runs in the test's own process (``make test``); SGLang's are the test bed's
(``make test-sglang``). Both have the same page size and KV pool, and both are asked over HTTP.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from conserve_serving.engines.client import EngineClient
from conserve_serving.engines.emulated import EmulatedEngine, EngineConfig, Role
from conserve_serving.engines.http import HttpPool, Response

PAGE_TOKENS = 16
KV_CAPACITY_TOKENS = 20_000
MODEL = "tiny"
#: Model seconds per second of the emulated engine: fast, and slow enough to be interrupted.
SPEED = 20.0

KINDS = ["emulated", pytest.param("sglang", marks=pytest.mark.sglang)]


@dataclass
class Answer:
    """A whole response.

    Attributes:
        events: of a stream, each event's JSON; ``[DONE]`` must have been the last and is left out.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    events: list[Any] = field(default_factory=list)

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Target:
    """An engine, and what the tests need to know of it."""

    name: str
    url: str
    prompts: random.Random
    max_context_tokens: int
    pool: HttpPool = field(init=False)
    driver: EngineClient = field(init=False)
    opened: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.driver = EngineClient(self.url, timeout_s=60.0)
        self.pool = self.driver.pool

    def ids(self, count: int) -> list[int]:
        """A prompt no other test has sent: ids of both vocabularies, none of them special."""
        return [self.prompts.randrange(300, 2000) for _ in range(count)]

    def text(self, words: int) -> str:
        """Plain text no other test has sent."""
        return " ".join(
            "".join(self.prompts.choice("abcdefghij") for _ in range(3)) for _ in range(words)
        )

    async def send(
        self, method: str, path: str, body: object = None, content_type: str = "application/json"
    ) -> Response:
        """The response's head; the caller reads the rest, or does not."""
        data = body if isinstance(body, bytes) else b""
        if body is not None and not isinstance(body, bytes):
            data = json.dumps(body).encode()
        headers = [(b"Content-Type", content_type.encode())]
        return await self.pool.request(method, path, headers, data)

    async def ask(
        self, method: str, path: str, body: object = None, content_type: str = "application/json"
    ) -> Answer:
        """A whole response, whatever its status."""
        async with asyncio.timeout(120):
            response = await self.send(method, path, body, content_type)
            async with response:
                text = await response.read()
        headers = {name.decode().lower(): value.decode() for name, value in response.headers}
        answer = Answer(response.status, headers, text)
        if headers.get("content-type", "").startswith("text/event-stream"):
            answer.events = events(text)
        return answer

    async def ok(self, path: str, body: object) -> Any:
        """The JSON of an answer that must be a 200."""
        answer = await self.ask("POST", path, body)
        assert answer.status == 200, answer.body[:2000]
        return answer.json()

    async def until(self, holds: Callable[[], Awaitable[bool]], what: str) -> None:
        """Until something is so: engines report some things a moment after they happen."""
        try:
            async with asyncio.timeout(30):
                while not await holds():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{self.name}: never {what}") from None

    async def open(self, session: str) -> None:
        """Open a session that is closed, and its KV freed, when the test is over."""
        await self.driver.open_session(session, capacity_tokens=20_000, timeout_s=100)
        self.opened.add(session)

    async def close(self) -> None:
        """Leave nothing behind."""
        for session in self.opened:
            await self.driver.close_session(session)
            await self.driver.free_session(session)
        self.driver.close()

    async def held_tokens(self) -> int:
        """KV on the device, in use or not, as the driver reads it."""
        occupancy = await self.driver.occupancy()
        assert occupancy is not None
        return occupancy.kv_held_tokens


def events(text: bytes) -> list[Any]:
    """The JSON of each event of a stream, whose framing is checked on the way."""
    blocks = text.decode().split("\n\n")
    assert blocks.pop() == "", "the stream must end with an empty line"
    assert blocks.pop() == "data: [DONE]"
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks), blocks
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


@dataclass
class Pair:
    """A prefiller and a decoder with one hand-off store, and its acknowledgements.

    Attributes:
        store: the store's folder.
        acks: the test bed's ``AckDesk``.
    """

    prefiller: Target
    decoder: Target
    store: Path
    acks: Any

    async def acknowledged(self, key: str, count: int = 1) -> dict[str, Any]:
        """The ``count``-th acknowledgement of the prompt that ``key`` names."""
        await asyncio.to_thread(self.acks.wait, count, key=key)
        found: dict[str, Any] = [ack for ack in self.acks.received if ack["key"] == key][count - 1]
        return found


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """``emulated`` or ``sglang``."""
    return str(request.param)


@pytest.fixture
async def pair(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    """A prefiller and a decoder, at rest and empty."""
    prompts = random.Random(request.node.nodeid)
    async with AsyncExitStack() as stack:
        if kind == "sglang":
            bed = request.getfixturevalue("bed")
            store, acks = bed.store, bed.acks
            urls = [bed.prefiller.url, bed.decoders[0].url]
        else:
            store, acks = tmp_path, load_ack_desk()()
            stack.callback(acks.close)
            urls = []
            for name, role in (("p0", Role.PREFILL), ("d0", Role.DECODE)):
                config = EngineConfig(
                    engine_id=name,
                    model_name=MODEL,
                    role=role,
                    speed=SPEED,
                    page_tokens=PAGE_TOKENS,
                    kv_capacity_tokens=KV_CAPACITY_TOKENS,
                    store_dir=store,
                    ack_url=acks.url,
                )
                urls.append((await stack.enter_async_context(EmulatedEngine(config))).url)
        targets = []
        for name, url in zip(("p0", "d0"), urls, strict=True):
            longest = 32_768 if kind == "sglang" else 131_072
            targets.append(Target(f"{kind} {name}", url, prompts, longest))
            stack.push_async_callback(targets[-1].close)
        yield Pair(*targets, store, acks)


@pytest.fixture
async def engine(pair: Pair) -> Target:
    """One engine; a decoder, as most calls go there."""
    return pair.decoder


def load_ack_desk() -> Any:
    """The test bed's class that takes acknowledgements (loaded by ``tests/conftest.py``)."""
    return sys.modules["sglang_testbed"].AckDesk
