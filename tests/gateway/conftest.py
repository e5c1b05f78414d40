"""A scripted engine on a real socket, and a gateway over some of them.

The fake answers the part of SGLang's API that the gateway uses, and fails exactly as a test says.
Nothing here sleeps: tests wait for events.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvloop

from conserve_serving.core.types import Tier
from conserve_serving.engines.http import HttpPool, Response
from conserve_serving.engines.pages import last_page_key
from conserve_serving.gateway.config import Config, parse_config
from conserve_serving.gateway.gateway import Gateway
from conserve_serving.gateway.server import GatewayServer

PAGE = 16


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop the product runs on; the server itself on the standard one as well."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop}
    if item.path.stem == "test_http_server":
        loops["asyncio"] = asyncio.new_event_loop
    return loops


MODEL = "qwen"


@dataclass
class Reply:
    """How the fake answers one completion.

    Attributes:
        status, body: an error answer instead of a completion.
        words: tokens streamed.
        pad: bytes added to each.
        before: waited for before anything is sent.
        after_first: waited for after the first token.
        die_before: close the connection instead of answering.
        die_after: close it after so many tokens.
        usage: whether counts are given at all.
        cached: cached tokens claimed; None: whatever the fake's cache holds.
        error_event: end the stream with an error event.
        counts: the usage object claimed, instead of an honest one.
        raw: the whole response, byte for byte, instead of anything else.
        done: whether a stream ends with ``data: [DONE]``.
    """

    status: int = 200
    body: bytes = b""
    words: int = 3
    pad: int = 0
    before: asyncio.Event | None = None
    after_first: asyncio.Event | None = None
    die_before: bool = False
    die_after: int | None = None
    usage: bool = True
    cached: int | None = None
    error_event: bool = False
    counts: dict[str, Any] | None = None
    raw: bytes | None = None
    done: bool = True


@dataclass
class FakeEngine:
    """One scripted engine. ``replies`` are used up in order; then everything is answered well."""

    replies: list[Reply] = field(default_factory=list)
    model: str = MODEL
    kv_capacity_tokens: int = 100_000
    max_context_tokens: int = 50_000
    page_tokens: int = PAGE
    dtype: str = "bfloat16"
    held_tokens: int = 0
    host_total_tokens: int | None = None
    store_role: str | None = None
    version: str = ""
    acknowledge: Callable[[dict[str, Any]], Awaitable[None]] | None = None
    ack_tokens: int | None = None
    prefill_gate: asyncio.Event | None = None
    close_gate: asyncio.Event | None = None
    prefill_status: int = 200
    tokenize_status: int = 200
    healthy: bool = True
    running: int = 0
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    prefill_tokens: int = 0
    port: int = 0

    def __post_init__(self) -> None:
        self.arrived: asyncio.Queue[str] = asyncio.Queue()
        self.gone = asyncio.Event()
        self.sent = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._stored: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """Bodies of the requests to ``path``, in order."""
        return [body for where, body in self.requests if where == path]

    async def start(self) -> FakeEngine:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def kill(self) -> None:
        """Die: no listener, every connection reset."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def until(self, path: str) -> None:
        """Return when a request to ``path`` has arrived (since the last call of this)."""
        async with asyncio.timeout(5):
            while await self.arrived.get() != path:
                pass

    # --- inside ------------------------------------------------------------------------------
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        path = head[0].split(" ")[1].partition("?")[0]
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(raw) if raw else {}
        self.requests.append((path, body))
        self.headers.append(headers)
        self.arrived.put_nowait(path)
        if path in ("/v1/chat/completions", "/v1/completions"):
            return await self._complete(reader, writer, path, body)
        if path == "/generate":
            return await self._generate(reader, writer, body)
        if path == "/close_session" and self.close_gate is not None:
            await self.close_gate.wait()
        status, answer = self._control(path, body)
        _respond(writer, status, answer)
        await writer.drain()
        return True

    def _control(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if not self.healthy:
            return 503, {"error": {"message": "not healthy"}}
        match path:
            case "/server_info":
                info: dict[str, Any] = {
                    "max_total_num_tokens": self.kv_capacity_tokens,
                    "page_size": self.page_tokens,
                    "dtype": self.dtype,
                    "enable_session_radix_cache": True,
                    "enable_priority_scheduling": True,
                }
                if self.version:
                    info["version"] = self.version
                if self.store_role is not None:
                    extra = {"module_path": "conserve_serving.x", "role": self.store_role}
                    info["hicache_storage_backend_extra_config"] = json.dumps(extra)
                return 200, info
            case "/model_info":
                return 200, {"served_model_name": self.model}
            case "/v1/models":
                card = {"id": self.model, "max_model_len": self.max_context_tokens}
                return 200, {"data": [card]}
            case "/v1/loads":
                load = {
                    "num_running_reqs": self.running,
                    "num_waiting_reqs": 0,
                    "total_prefill_uncached_tokens": self.prefill_tokens,
                    "total_prefill_busy_us": self.prefill_tokens,
                }
                return 200, {"loads": [load]}
            case "/metrics":
                text = f"sglang:kv_used_tokens 0\nsglang:kv_evictable_tokens {self.held_tokens}\n"
                if self.host_total_tokens is not None:
                    text += f"sglang:hicache_host_total_tokens {self.host_total_tokens}\n"
                return 200, text.encode()
            case "/v1/tokenize":
                if self.tokenize_status != 200:
                    return self.tokenize_status, {"message": "no tokenizer"}
                return 200, {"tokens": _ids(body), "max_model_len": self.max_context_tokens}
            case "/open_session":
                return 200, body["session_id"]
            case "/close_session" | "/abort_request" | "/health":
                return 200, b""
        return 404, {"detail": "Not Found"}

    async def _generate(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]
    ) -> bool:
        if self.prefill_gate is not None and not await self._wait(reader, self.prefill_gate):
            return False
        if self.prefill_status != 200:
            _respond(writer, self.prefill_status, {"message": "out of memory"})
            return True
        ids = body["input_ids"]
        self.prefill_tokens += len(ids)
        meta = {"prompt_tokens": len(ids), "cached_tokens": 0, "finish_reason": {"type": "length"}}
        _respond(writer, 200, {"meta_info": meta})
        await writer.drain()
        key = last_page_key(ids, self.page_tokens)
        if self.acknowledge is not None and key is not None:
            tokens = len(ids) // self.page_tokens * self.page_tokens
            tokens = tokens if self.ack_tokens is None else self.ack_tokens
            await self.acknowledge({"engine": "p0", "key": key, "tokens": tokens})
        return True

    async def _complete(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        path: str,
        body: dict[str, Any],
    ) -> bool:
        reply = self.replies.pop(0) if self.replies else Reply()
        if reply.before is not None and not await self._wait(reader, reply.before):
            return False
        if reply.die_before:
            writer.transport.abort()
            return False
        if reply.raw is not None:
            writer.write(reply.raw)
            await writer.drain()
            return False
        if reply.status != 200:
            _respond(writer, reply.status, reply.body)
            return True
        prompt = len(body.get("input_ids") or _ids(body))
        cached = prompt // PAGE * PAGE if reply.cached is None else reply.cached
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": reply.words,
            "total_tokens": prompt + reply.words,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if reply.counts is not None:
            usage = reply.counts
        if not body.get("stream"):
            answer = {"id": "x", "model": body["model"], "choices": [_CHOICE]}
            _respond(writer, 200, {**answer, **({"usage": usage} if reply.usage else {})})
            return True
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"x-engine: fake\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for number in range(reply.words):
            text = f"w{number} " + "x" * reply.pad
            choice = {"index": 0, "text": text, "delta": {"content": text}}
            _event(writer, {"choices": [choice], "usage": None})
            await writer.drain()
            self.sent = number + 1
            if reply.die_after is not None and number + 1 >= reply.die_after:
                writer.transport.abort()
                return False
            pause = reply.after_first if number == 0 else None
            if pause is not None and not await self._wait(reader, pause):
                return False
        if reply.error_event:
            _event(writer, {"error": {"message": "aborted on the engine", "code": 500}})
        elif reply.usage and (body.get("stream_options") or {}).get("include_usage"):
            _event(writer, {"choices": [], "usage": usage})
        if reply.done:
            _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _wait(self, reader: asyncio.StreamReader, event: asyncio.Event) -> bool:
        """Wait for ``event``; False when the caller's connection closed first."""
        waiting = asyncio.ensure_future(event.wait())
        closing = asyncio.ensure_future(reader.read(1))
        done, left = await asyncio.wait({waiting, closing}, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        if waiting in done:
            return True
        self.gone.set()
        return False


_CHOICE = {"index": 0, "text": "a", "message": {"role": "assistant", "content": "a"}}


def _ids(body: dict[str, Any]) -> list[int]:
    """A tokenizer: four bytes of JSON a token, prefix-stable over appended messages."""
    content = body.get("messages", body.get("prompt"))
    if isinstance(content, list) and content and isinstance(content[0], int):
        return content
    text = content if isinstance(content, str) else json.dumps(content)[:-1]
    data = text.encode()
    return [int.from_bytes(data[at : at + 3], "big") for at in range(0, len(data), 4)]


def _respond(writer: asyncio.StreamWriter, status: int, answer: Any) -> None:
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    writer.write(
        b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        % (status, len(data))
        + data
    )


def _event(writer: asyncio.StreamWriter, value: Any) -> None:
    _chunk(writer, b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


@dataclass
class Answer:
    """A whole response."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """``error.code``, of an OpenAI error."""
        return self.json()["error"]["code"]


class Cluster:
    """A running gateway and its fake engines: prefillers ``p0…``, decoders ``d0…``."""

    def __init__(
        self, server: GatewayServer, prefillers: list[FakeEngine], decoders: list[FakeEngine]
    ):
        self.server = server
        self.prefillers = prefillers
        self.decoders = decoders
        self.pool = HttpPool("127.0.0.1", server.port)

    @property
    def gateway(self) -> Gateway:
        assert self.server.gateway is not None
        return self.server.gateway

    @property
    def engines(self) -> dict[str, FakeEngine]:
        named = {f"p{n}": e for n, e in enumerate(self.prefillers)}
        return named | {f"d{n}": e for n, e in enumerate(self.decoders)}

    async def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = [(k.encode(), v.encode("latin-1")) for k, v in (headers or {}).items()]
        return await self.pool.request(method, path, sent, data if body is not None else b"")

    async def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        async with asyncio.timeout(10):
            response = await self.send(method, path, body, headers)
            data = await response.read()
        named = {k.decode().lower(): v.decode() for k, v in response.headers}
        return Answer(response.status, named, data)

    async def chat(
        self,
        conversation: str | None,
        *texts: str,
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> Answer:
        """One turn whose messages are ``texts``, user and assistant in turn."""
        named = {"x-conserve-conversation-id": conversation} if conversation else {}
        return await self.ask(
            "POST",
            "/v1/chat/completions",
            chat_body(*texts, **fields),
            {**named, **(headers or {})},
        )

    async def state(self, engine: str, *states: str) -> None:
        """Return when an engine is in one of ``states``."""
        async with asyncio.timeout(10):
            while True:
                known = self.gateway.fleet.get(engine)
                if known is not None and known.state in states:
                    return
                await self.gateway.fleet.wait_change()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return when ``holds`` does; it is asked again whenever the event loop has turned."""
        async with asyncio.timeout(10):
            while not holds():
                await asyncio.sleep(0)

    def settled(self) -> None:
        """Nothing may be left behind: no live turn, no reservation, no waiter."""
        scheduler = self.gateway.runtime.scheduler
        scheduler.check_invariants(recount=True)
        assert self.gateway.runtime.live_turns == 0
        assert scheduler.live_turns == 0
        assert self.gateway.handoffs.waiting == 0
        for state in scheduler.engines.values():
            assert state.reserved_tokens == 0
            assert state.active_turns == 0
        for engine in self.gateway.fleet:
            assert engine.running == 0
            assert engine.active_tokens == 0


def chat_body(*texts: str, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"model": MODEL, "messages": messages, **fields}


#: Long enough to be worth a hand-off with ``handoff_min_tokens = 64``.
LONG = "tell me about the history of " + "x" * 1200

MakeCluster = Callable[..., Awaitable[Cluster]]


@pytest.fixture
async def make_cluster() -> AsyncIterator[MakeCluster]:
    """Makes clusters; everything is stopped at the end of the test.

    Arguments of the maker: ``prefillers``, ``decoders`` (counts or lists of `FakeEngine`),
    ``gateway``, ``scheduler``, ``identity``, ``tiers`` (settings), ``wait`` (for all engines to
    be ready).
    """
    async with contextlib.AsyncExitStack() as stack:

        async def make(
            prefillers: int | list[FakeEngine] = 1,
            decoders: int | list[FakeEngine] = 2,
            *,
            gateway: dict[str, Any] | None = None,
            scheduler: dict[str, Any] | None = None,
            identity: dict[str, Any] | None = None,
            tiers: dict[str, Any] | None = None,
            wait: bool = True,
        ) -> Cluster:
            pres = _engines(prefillers)
            decs = _engines(decoders)
            for engine in [*pres, *decs]:
                if not engine.port:  # else it runs already, for an earlier gateway
                    await engine.start()
                    stack.push_async_callback(engine.kill)
            server = GatewayServer(
                _config(
                    pres, decs, gateway=gateway, scheduler=scheduler, identity=identity, tiers=tiers
                )
            )
            listening = asyncio.Event()
            task = asyncio.create_task(server.serve(on_listening=lambda _: listening.set()))
            await asyncio.wait(
                {task, asyncio.ensure_future(listening.wait())},
                return_when=asyncio.FIRST_COMPLETED,
            )
            cluster = Cluster(server, pres, decs)

            async def stop() -> None:
                cluster.pool.close()
                server.stop()
                server.stop()
                await task

            stack.push_async_callback(stop)
            for engine in pres:
                engine.acknowledge = _acknowledger(cluster)
            if wait:
                for name in cluster.engines:
                    await cluster.state(name, "ready")
            return cluster

        yield make


def _acknowledger(cluster: Cluster) -> Callable[[dict[str, Any]], Awaitable[None]]:
    async def acknowledge(ack: dict[str, Any]) -> None:
        await cluster.ask("POST", "/conserve/v1/handoffs", ack)

    return acknowledge


def _engines(engines: int | list[FakeEngine]) -> list[FakeEngine]:
    return [FakeEngine() for _ in range(engines)] if isinstance(engines, int) else engines


def _config(
    prefillers: list[FakeEngine],
    decoders: list[FakeEngine],
    *,
    gateway: dict[str, Any] | None,
    scheduler: dict[str, Any] | None,
    identity: dict[str, Any] | None,
    tiers: dict[str, Any] | None,
) -> Config:
    base = parse_config("")
    data = base.model_dump(exclude_unset=True)
    data["gateway"] = {
        "port": 0,
        "poll_interval_s": 0.05,
        "health_interval_s": 0.05,
        "drain_timeout_s": 5,
        **(gateway or {}),
    }
    data["scheduler"] = {"handoff_min_tokens": 64, **(scheduler or {})}
    data["identity"] = identity or {}
    data["tiers"] = [
        {
            "role": role,
            "engine": "attach",
            "urls": [engine.url for engine in engines],
            **(tiers or {}),
        }
        for role, engines in ((Tier.PREFILL, prefillers), (Tier.DECODE, decoders))
        if engines
    ]
    return Config.model_validate(data)


@pytest.fixture
def fake_engine() -> type[FakeEngine]:
    """The fake engine's class (test folders are no packages: nothing can be imported)."""
    return FakeEngine


@pytest.fixture
def reply() -> type[Reply]:
    """How a fake answers one completion."""
    return Reply


@pytest.fixture
def long_text() -> str:
    """A prompt long enough to be handed over."""
    return LONG


@pytest.fixture
def body() -> Callable[..., dict[str, Any]]:
    """Body of a chat request: ``body("hello", stream=True)``."""
    return chat_body
