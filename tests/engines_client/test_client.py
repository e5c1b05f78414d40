"""The driver against an engine that answers in SGLang's words."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.core.events import StepTimes
from conserve_serving.core.types import EngineSpeeds, Link
from conserve_serving.engines.client import EngineClient, pool_for
from conserve_serving.engines.client_types import Loads, Occupancy, Prefilled, step_delta
from conserve_serving.engines.http_errors import (
    BadReply,
    ConnectFailed,
    EngineRefused,
    ResponseTimeout,
)

if TYPE_CHECKING:
    from conftest import Peer, ScriptedServer

SERVER_INFO: dict[str, Any] = {
    "model_path": "/models/tiny",
    "page_size": 64,
    "context_length": None,
    "dp_size": 1,
    "tp_size": 2,
    "dtype": "bfloat16",
    "kv_cache_dtype": "auto",
    "hicache_mem_layout": "page_first",
    "enable_session_radix_cache": True,
    "enable_priority_scheduling": True,
    "schedule_low_priority_values_first": False,
    "max_total_num_tokens": 20_000,
    "internal_states": [{}],
    "version": "0.5.23",
}
MODEL_INFO = {
    "served_model_name": "tiny",
    "is_generation": True,
    "disaggregation_mode": "null",
}
MODELS = {
    "object": "list",
    "data": [
        {"id": "tiny", "object": "model", "max_model_len": 32_768},
        {"id": "adapter", "object": "model", "parent": "tiny", "max_model_len": None},
    ],
}
RANK = {
    "num_running_reqs": 3,
    "num_waiting_reqs": 2,
    "num_waiting_uncached_tokens": 700,
    "total_prefill_uncached_tokens": 12_000,
    "total_prefill_busy_us": 1_500_000,
    "decode_moments": [100.0, 250.0, 2_000_000.0, 700.0, 5_100_000.0, 260.0],
    "cache_hit_rate": 0.5,
}
METRICS = b"""# HELP sglang:kv_used_tokens Number of actively used token slots in the KV cache pool.
# TYPE sglang:kv_used_tokens gauge
sglang:kv_used_tokens{engine_type="unified",model_name="odd } 7",tp_rank="0"} 1024.0
sglang:kv_used_tokens{engine_type="unified",model_name="odd } 7",tp_rank="1"} 1088.0
sglang:kv_used_tokens_total{model_name="tiny"} 9.0
sglang:kv_evictable_tokens{engine_type="unified",model_name="tiny",tp_rank="0"} 3264.0
sglang:hicache_host_used_tokens{model_name="tiny"} 1.2e+04
sglang:token_usage{model_name="tiny"} 0.0
"""


class FakeEngine:
    """Answers from a table, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.replies: dict[str, tuple[bytes, Any]] = {
            "/server_info": (b"200 OK", SERVER_INFO),
            "/model_info": (b"200 OK", MODEL_INFO),
            "/v1/models": (b"200 OK", MODELS),
            "/v1/loads?include=core": (b"200 OK", {"version": "0.5.23", "loads": [RANK]}),
            "/metrics": (b"200 OK", METRICS),
            "/health": (b"200 OK", b""),
            "/v1/tokenize": (
                b"200 OK",
                {"tokens": [5, 6, 7], "count": 3, "max_model_len": 32_768},
            ),
            "/generate": (
                b"200 OK",
                {
                    "text": "",
                    "meta_info": {
                        "id": "r1",
                        "prompt_tokens": 3,
                        "cached_tokens": 2,
                        "finish_reason": {"type": "length", "length": 0},
                    },
                },
            ),
            "/open_session": (b"200 OK", "conv-1"),
            "/close_session": (b"200 OK", b""),
            "/abort_request": (b"200 OK", b""),
        }

    async def __call__(self, peer: Peer) -> None:
        while True:
            got = await peer.request()
            path = got.line.split(b" ")[1].decode()
            self.asked.append((path, json.loads(got.body) if got.body else None))
            self.headers.append(got.headers)
            status, reply = self.replies[path]
            peer.reply(reply if isinstance(reply, bytes) else json.dumps(reply).encode(), status)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def connect(server: ScriptedServer, engine: FakeEngine) -> Callable[..., Awaitable[EngineClient]]:
    async def make(**options: Any) -> EngineClient:
        return EngineClient(f"http://127.0.0.1:{await server.start(engine)}", **options)

    return make


# --- joining ------------------------------------------------------------------------------------


async def test_description_of_a_real_engine(connect: Any) -> None:
    client = await connect()
    description = await client.describe()
    assert description.model == "tiny"
    assert description.page_tokens == 64
    assert description.kv_capacity_tokens == 20_000
    assert description.max_context_tokens == 32_768
    assert description.kv_layout == "page=64 dtype=bfloat16 kv=auto layout=page_first tp=2"
    assert description.keeps_sessions
    assert description.emulated is None
    assert await client.extension() is None
    assert [card.id for card in await client.models()] == ["tiny", "adapter"]


async def test_description_of_an_emulated_engine(connect: Any, engine: FakeEngine) -> None:
    extension = {
        "emulated": True,
        "profile": "a40-qwen3-0.6b",
        "speed": 10.0,
        "host_capacity_tokens": 50_000,
        "link": {"setup_s": 0.01, "bytes_per_s": 1e9, "kv_bytes_per_token": 114_688},
        "speeds": {"prefill_tokens_per_s": 9000.0, "decode_step_s": 0.01, "mixed_slowdown": 1.1},
        "energy_j": 12.5,
        "energy_source": "modelled: a40",
        "model_time_s": 3.0,
    }
    engine.replies["/server_info"] = (b"200 OK", {**SERVER_INFO, "conserve": extension})
    client = await connect()
    emulated = (await client.describe()).emulated
    assert emulated is not None
    assert emulated == await client.extension()
    assert (emulated.profile, emulated.speed, emulated.energy_j) == ("a40-qwen3-0.6b", 10.0, 12.5)
    assert emulated.link == Link(setup_s=0.01, bytes_per_s=1e9, kv_bytes_per_token=114_688)
    assert emulated.speeds == EngineSpeeds(
        prefill_tokens_per_s=9000.0, decode_step_s=0.01, mixed_slowdown=1.1
    )


async def test_context_length_of_the_server_when_the_model_card_has_none(
    connect: Any, engine: FakeEngine
) -> None:
    engine.replies["/v1/models"] = (b"200 OK", {"data": [{"id": "tiny"}]})
    engine.replies["/server_info"] = (b"200 OK", {**SERVER_INFO, "context_length": 4096})
    assert (await (await connect()).describe()).max_context_tokens == 4096


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("/server_info", {"page_size": ...}, "/server_info.*page_size"),
        ("/server_info", {"max_total_num_tokens": ...}, "/server_info.*max_total_num_tokens"),
        ("/server_info", {"max_total_num_tokens": "many"}, "Expected `int`.*max_total_num_tokens"),
        ("/server_info", {"max_total_num_tokens": 0}, "no room for KV"),
        ("/server_info", {"page_size": 0}, "page_size is 0"),
        ("/server_info", {"dp_size": 2}, "one engine per data-parallel replica"),
        ("/server_info", {"conserve": {"profile": "x"}}, "speed.*conserve"),
        ("/model_info", {"served_model_name": ...}, "/model_info.*served_model_name"),
        ("/model_info", {"disaggregation_mode": "decode"}, "without --disaggregation-mode"),
        ("/model_info", {"is_generation": False}, "causal language model"),
        ("/v1/models", {"data": ...}, "/v1/models.*data"),
        ("/v1/models", {"data": []}, "--context-length"),
    ],
)
async def test_engine_that_cannot_be_used_says_which_field(
    connect: Any, engine: FakeEngine, path: str, change: dict[str, Any], message: str
) -> None:
    reply = {**engine.replies[path][1], **change}
    engine.replies[path] = (b"200 OK", {k: v for k, v in reply.items() if v is not ...})
    client = await connect()
    with pytest.raises(BadReply, match=message) as bad:
        await client.describe()
    assert client.pool.origin in str(bad.value)


async def test_reply_that_is_not_json(connect: Any, engine: FakeEngine) -> None:
    engine.replies["/server_info"] = (b"200 OK", b"<html>")
    with pytest.raises(BadReply, match=r"/server_info: .*malformed.*is this SGLang"):
        await (await connect()).describe()


@pytest.mark.parametrize(
    ("takes", "low_first", "field"), [(True, False, 3), (True, True, -3), (False, False, None)]
)
async def test_priority_is_sent_the_way_the_engine_orders(
    connect: Any, engine: FakeEngine, takes: bool, low_first: bool, field: int | None
) -> None:
    engine.replies["/server_info"] = (
        b"200 OK",
        {
            **SERVER_INFO,
            "enable_priority_scheduling": takes,
            "schedule_low_priority_values_first": low_first,
        },
    )
    assert (await (await connect()).describe()).priority_field(3) == field


# --- state --------------------------------------------------------------------------------------


async def test_health(connect: Any, engine: FakeEngine) -> None:
    client = await connect()
    await client.health()
    engine.replies["/health"] = (b"503 Service Unavailable", b"")
    with pytest.raises(EngineRefused, match="GET /health: 503: no message") as refused:
        await client.health()
    assert refused.value.status == 503


async def test_loads(connect: Any, engine: FakeEngine) -> None:
    client = await connect()
    reading = await client.loads()
    assert reading == Loads(
        running_requests=3,
        waiting_requests=2,
        waiting_uncached_tokens=700,
        prefill_tokens=12_000,
        prefill_busy_us=1_500_000,
        decode_steps=100,
        decode_batch_sum=250.0,
        decode_us=2_000_000.0,
        decode_generated_tokens=260.0,
    )
    idle = {**RANK, "decode_moments": None}
    engine.replies["/v1/loads?include=core"] = (b"200 OK", {"loads": [RANK, idle]})
    both = await client.loads()
    assert (both.running_requests, both.decode_steps, both.prefill_tokens) == (6, 100, 24_000)


async def test_occupancy_is_what_is_used_and_what_is_evictable(connect: Any) -> None:
    held = await (await connect()).occupancy()
    assert held == Occupancy(kv_used_tokens=1088, kv_evictable_tokens=3264, host_used_tokens=12_000)
    assert held.kv_held_tokens == 4352


async def test_occupancy_before_the_first_report(connect: Any, engine: FakeEngine) -> None:
    engine.replies["/metrics"] = (b"200 OK", b"# TYPE sglang:kv_used_tokens gauge\n")
    assert await (await connect()).occupancy() is None


async def test_occupancy_without_metrics(connect: Any, engine: FakeEngine) -> None:
    engine.replies["/metrics"] = (b"404 Not Found", {"detail": "Not Found"})
    with pytest.raises(EngineRefused, match="--enable-metrics"):
        await (await connect()).occupancy()


LOADS = st.builds(
    Loads,
    running_requests=st.just(0),
    waiting_requests=st.just(0),
    waiting_uncached_tokens=st.just(0),
    prefill_tokens=st.integers(0, 10**9),
    prefill_busy_us=st.integers(0, 10**12),
    decode_steps=st.integers(0, 10**9),
    decode_batch_sum=st.integers(0, 10**9).map(float),
    decode_us=st.integers(0, 10**12).map(float),
    decode_generated_tokens=st.integers(0, 10**9).map(float),
)
COUNTERS = [name for name in Loads.__slots__ if name.startswith(("prefill", "decode"))]


@given(LOADS, LOADS)
def test_steps_between_two_readings(before: Loads, more: Loads) -> None:
    after = Loads(**{name: getattr(before, name) + getattr(more, name) for name in Loads.__slots__})
    delta = step_delta(before, after)
    assert delta is not None
    assert delta.times == StepTimes(
        prefill_tokens=more.prefill_tokens,
        prefill_s=more.prefill_busy_us / 1e6,
        decode_steps=more.decode_steps,
        decode_s=more.decode_us / 1e6,
    )
    assert delta.decode_batch_sum == more.decode_batch_sum
    assert delta.decode_generated_tokens == more.decode_generated_tokens
    if any(getattr(more, name) for name in COUNTERS):
        assert step_delta(after, before) is None  # a counter that goes backwards: a restart


# --- prompts ------------------------------------------------------------------------------------


async def test_tokenize_sends_only_what_makes_the_prompt(connect: Any, engine: FakeEngine) -> None:
    client = await connect()
    body = {
        "model": "tiny",
        "messages": msgspec.Raw(b'[{"role":"user","content":"hi"}]'),
        "tools": msgspec.Raw(b"[]"),
        "chat_template_kwargs": {"enable_thinking": False},
        "stream": True,
        "max_tokens": 5,
    }
    tokenized = await client.tokenize_chat(body)
    assert (tokenized.tokens, tokenized.max_model_len_tokens) == ([5, 6, 7], 32_768)
    await client.tokenize_prompt("hello")
    assert engine.asked == [
        (
            "/v1/tokenize",
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": "hi"}],
                "tools": [],
                "chat_template_kwargs": {"enable_thinking": False},
            },
        ),
        ("/v1/tokenize", {"prompt": "hello"}),
    ]


async def test_unknown_model_length_is_none(connect: Any, engine: FakeEngine) -> None:
    engine.replies["/v1/tokenize"] = (b"200 OK", {"tokens": [1], "count": 1, "max_model_len": -1})
    assert (await (await connect()).tokenize_prompt("x")).max_model_len_tokens is None


@pytest.mark.parametrize(
    "reply",
    [
        {"error": {"message": "too long", "code": 400}},
        {"error": "too long"},
        {"object": "error", "message": "too long", "type": "BadRequestError", "code": 400},
        {"detail": "too long"},
        b"too long",
    ],
)
async def test_refusal_carries_the_engines_words(
    connect: Any, engine: FakeEngine, reply: Any
) -> None:
    engine.replies["/v1/tokenize"] = (b"400 Bad Request", reply)
    with pytest.raises(EngineRefused, match=r"POST /v1/tokenize: 400: too long$") as refused:
        await (await connect()).tokenize_prompt("x")
    assert refused.value.status == 400
    assert b"too long" in refused.value.body


async def test_prefill_generates_nothing(connect: Any, engine: FakeEngine) -> None:
    client = await connect()
    done = await client.prefill([5, 6, 7], rid="r1", priority=-2)
    await client.prefill([5], rid="r2")
    assert done == Prefilled(prompt_tokens=3, cached_tokens=2)
    assert engine.asked == [
        (
            "/generate",
            {
                "input_ids": [5, 6, 7],
                "sampling_params": {"max_new_tokens": 0},
                "rid": "r1",
                "priority": -2,
            },
        ),
        ("/generate", {"input_ids": [5], "sampling_params": {"max_new_tokens": 0}, "rid": "r2"}),
    ]


async def test_aborted_prefill_is_no_prefill(connect: Any, engine: FakeEngine) -> None:
    engine.replies["/generate"] = (
        b"200 OK",
        {"meta_info": {"prompt_tokens": 3, "finish_reason": {"type": "abort", "message": "x"}}},
    )
    with pytest.raises(BadReply, match="r9 was aborted"):
        await (await connect()).prefill([1, 2, 3], rid="r9")


async def test_sessions_and_abort(connect: Any, engine: FakeEngine) -> None:
    client = await connect(api_key="secret")
    await client.open_session("conv-1", capacity_tokens=4096, timeout_s=60.0)
    await client.close_session("conv-1")
    await client.abort("r1")
    assert engine.asked == [
        ("/open_session", {"session_id": "conv-1", "capacity_of_str_len": 4096, "timeout": 60.0}),
        ("/close_session", {"session_id": "conv-1"}),
        ("/abort_request", {"rid": "r1"}),
    ]
    assert {headers[b"authorization"] for headers in engine.headers} == {b"Bearer secret"}
    engine.replies["/open_session"] = (
        b"400 Bad Request",
        {"error": {"message": "Failed to open the session."}},
    )
    with pytest.raises(EngineRefused, match="Failed to open the session"):
        await client.open_session("conv-1", capacity_tokens=4096, timeout_s=60.0)


# --- the turn, and engines that do not answer ---------------------------------------------------


async def test_stream_hands_over_events_and_error_statuses_alike(server: ScriptedServer) -> None:
    taken = asyncio.Event()

    async def script(peer: Peer) -> None:
        got = await peer.request()
        assert got.line == b"POST /v1/chat/completions HTTP/1.1"
        assert got.headers[b"x-request-id"] == b"q"
        assert got.headers[b"content-type"] == b"application/json"
        assert got.body == b'{"stream":true,"rid":"r"}'
        peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        await taken.wait()
        peer.send(b"3\r\ntwo\r\n0\r\n\r\n")
        await peer.request()
        peer.reply(b"busy", status=b"503 Service Unavailable")

    client = EngineClient(f"http://127.0.0.1:{await server.start(script)}")
    body = [b'{"stream":true', b',"rid":"r"}']
    path = "/v1/chat/completions"
    async with await client.stream(path, body, [(b"X-Request-ID", b"q")]) as response:
        got = []
        async for data in response:
            got.append(data)
            taken.set()
    assert got == [b"one", b"two"]
    async with await client.stream(path, body) as response:
        assert (response.status, await response.read()) == (503, b"busy")


async def test_call_that_stalls_in_its_body_times_out(server: ScriptedServer) -> None:
    gone = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{")
        await peer.gone()
        gone.set()

    client = EngineClient(f"http://127.0.0.1:{await server.start(script)}", timeout_s=0.02)
    with pytest.raises(ResponseTimeout, match=r"GET /v1/models within 0\.02 s"):
        await client.models()
    await gone.wait()


async def test_prefill_may_be_cancelled(server: ScriptedServer) -> None:
    started, gone = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        started.set()
        await peer.gone()
        gone.set()

    client = EngineClient(f"http://127.0.0.1:{await server.start(script)}")
    task = asyncio.create_task(client.prefill([1], rid="r"))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone.wait()


async def test_engine_that_is_not_there(connect: Any) -> None:
    client = await connect()
    client.close()
    absent = EngineClient("http://127.0.0.1:1")
    with pytest.raises(ConnectFailed):
        await absent.health()


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://engine-1:30000", "engine-1:30000"),
        ("http://10.0.0.7:30000/", "10.0.0.7:30000"),
        ("http://[::1]:30000", "[::1]:30000"),
    ],
)
def test_addresses(url: str, origin: str) -> None:
    assert pool_for(url).origin == origin


@pytest.mark.parametrize(
    "url",
    [
        "",
        "engine:30000",
        "https://engine:30000",
        "http://engine",
        "http://:30000",
        "http://engine:port",
        "http://engine:99999",
        "http://engine:30000/v1",
        "http://engine:30000?x=1",
        "http://user@engine:30000",
    ],
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"write it as http://host:port"):
        pool_for(url)
