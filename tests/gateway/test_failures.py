"""What goes wrong, over real sockets: never a hang, never a leak, always an honest answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest


async def _raw(port: int, data: bytes) -> bytes:
    """What the gateway answers to these very bytes, until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    return answer


# --- bad input -------------------------------------------------------------------------------
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (CHAT, b'{"model": "qwen", "messages": [', None, "invalid_json"),
        (CHAT, b"\xff\xfe", None, "invalid_json"),
        (CHAT, b"", None, "invalid_json"),
        (CHAT, b"[1]", None, None),
        (CHAT, {"model": 3, "messages": USER}, "model", None),
        (CHAT, {"messages": USER}, "model", None),
        (CHAT, {"model": "qwen"}, "messages", None),
        (CHAT, {"model": "qwen", "messages": "hi"}, "messages", None),
        (CHAT, {"model": "qwen", "messages": []}, "messages", None),
        (CHAT, {"model": "qwen", "messages": USER, "max_tokens": "9"}, "max_tokens", None),
        (CHAT, {"model": "qwen", "messages": USER, "max_tokens": -1}, "max_tokens", None),
        (CHAT, {"model": "qwen", "messages": USER, "stream": "yes"}, "stream", None),
        (CHAT, {"model": "qwen", "messages": USER, "stream_options": 1}, "stream_options", None),
        ("/v1/completions", {"model": "qwen"}, "prompt", None),
        ("/v1/completions", {"model": "qwen", "prompt": {"a": 1}}, "prompt", None),
        ("/v1/completions", {"model": "qwen", "prompt": ["a", "b"]}, "prompt", None),
        ("/v1/completions", {"model": "qwen", "prompt": [1, "b"]}, "prompt", None),
    ],
)
async def test_bad_body_is_400_and_names_the_field(
    make_cluster: Any, path: str, body: Any, param: str | None, code: str | None
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    answer = await cluster.ask("POST", path, body)
    error = answer.json()["error"]
    assert answer.status == 400
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"]
    assert cluster.decoders[0].bodies(path) == []
    assert len(cluster.gateway.conversations) == 0


async def test_unknown_model_is_404(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    answer = await cluster.ask("POST", CHAT, {"model": "gpt", "messages": USER})
    assert (answer.status, answer.code) == (404, "model_not_found")
    assert "'qwen'" in answer.json()["error"]["message"]


async def test_prompt_longer_than_any_decoder_is_400(make_cluster: Any, fake_engine: Any) -> None:
    cluster = await make_cluster(0, [fake_engine(max_context_tokens=50)])
    answer = await cluster.chat("c", "x" * 400)
    assert (answer.status, answer.code) == (400, "context_length_exceeded")
    assert answer.json()["error"]["param"] == "messages"
    cluster.settled()


@pytest.mark.parametrize("id", ["", "a b", "é", "x" * 201, "tab\t"])
async def test_illegal_own_id_is_400(make_cluster: Any, id: str) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    answer = await cluster.chat(None, "hi", headers={"x-conserve-conversation-id": id})
    if id == "tab\t":  # white space around a value is not part of it (RFC 9110)
        assert answer.status == 200
        return
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "X-ConServe-Conversation-ID"


async def test_illegal_foreign_id_is_hashed(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    for _ in range(2):
        answer = await cluster.chat(None, "hi", headers={"x-session-id": "my long name " * 40})
        assert answer.status == 200
        assert answer.headers["x-conserve-conversation-id"].startswith("sha256-")
        assert answer.headers["x-conserve-identity-source"] == "header:x-session-id"


async def test_too_large_body_is_413(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1, gateway={"max_body_bytes": 2000})
    answer = await cluster.chat("c", "x" * 3000)
    assert (answer.status, answer.code) == (413, "body_too_large")
    chunked = await _raw(
        cluster.server.port,
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
        b"transfer-encoding: chunked\r\n\r\nbb8\r\n" + b"x" * 3000 + b"\r\n0\r\n\r\n",
    )
    assert chunked.startswith(b"HTTP/1.1 413 ")


async def test_two_body_lengths_are_400(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    answer = await _raw(
        cluster.server.port,
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n"
        b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    )
    assert answer.startswith(b"HTTP/1.1 400 ")


async def test_unknown_paths_and_methods(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", CHAT, 405),
        ("POST", "/health", 405),
        ("GET", "/v1/tokenize", 405),
        ("PUT", "/conserve/v1/cluster", 405),
        ("GET", "/conserve/v1/nothing", 404),
        ("GET", "/conserve/v1/conversations/unknown", 404),
        ("GET", "/conserve/v1/conversations?limit=no", 400),
        ("GET", "/v1/models/gpt", 404),
        ("POST", "/conserve/v1/handoffs", 400),
    ):
        answer = await cluster.ask(method, path)
        assert answer.status == status, path
        assert answer.json()["error"]["message"]


# --- no room, no engine ----------------------------------------------------------------------
async def test_no_engine_is_503_with_retry_after(make_cluster: Any, fake_engine: Any) -> None:
    cluster = await make_cluster(0, [fake_engine(healthy=False)], wait=False)
    answer = await cluster.chat("c", "hi")
    assert (answer.status, answer.code) == (503, "no_engine")
    assert int(answer.headers["retry-after"]) >= 1
    assert (await cluster.ask("GET", "/ready")).status == 503
    assert (await cluster.ask("GET", "/health")).status == 200
    assert (await cluster.ask("GET", "/v1/models")).json()["data"] == []


async def _fill(cluster: Any, reply: Any) -> tuple[asyncio.Event, asyncio.Task[Any]]:
    """Have one running turn take nearly all of d0."""
    go = asyncio.Event()
    cluster.decoders[0].replies.append(reply(before=go))
    running = asyncio.create_task(cluster.chat("big", "x" * 3000, max_tokens=1))
    await cluster.decoders[0].until(CHAT)
    return go, running


async def test_queue_full_is_429_with_retry_after(
    make_cluster: Any, fake_engine: Any, reply: Any
) -> None:
    cluster = await make_cluster(
        0, [fake_engine(kv_capacity_tokens=1200)], scheduler={"max_waiting_turns": 0}
    )
    go, running = await _fill(cluster, reply)
    answer = await cluster.chat("second", "y" * 3000)
    assert (answer.status, answer.code) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    go.set()
    assert (await running).status == 200
    cluster.settled()


async def test_held_too_long_is_429(make_cluster: Any, fake_engine: Any, reply: Any) -> None:
    cluster = await make_cluster(
        0, [fake_engine(kv_capacity_tokens=1200)], scheduler={"max_hold_s": 0.05}
    )
    go, running = await _fill(cluster, reply)
    answer = await cluster.chat("second", "y" * 3000)
    assert (answer.status, answer.code) == (429, "held_too_long")
    assert "retry-after" in answer.headers
    go.set()
    assert (await running).status == 200
    cluster.settled()


async def test_held_turn_runs_when_room_appears(
    make_cluster: Any, fake_engine: Any, reply: Any
) -> None:
    cluster = await make_cluster(0, [fake_engine(kv_capacity_tokens=1200)])
    go, running = await _fill(cluster, reply)
    second = asyncio.create_task(cluster.chat("second", "y" * 3000))
    await cluster.until(lambda: cluster.gateway.runtime.scheduler.waiting_turns == 1)
    go.set()
    assert (await running).status == 200
    await cluster.ask("DELETE", "/conserve/v1/conversations/big")
    assert (await second).status == 200
    cluster.settled()


# --- engines that fail -----------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
async def test_engine_that_dies_before_the_first_byte_goes_unnoticed(
    make_cluster: Any, reply: Any, stream: bool
) -> None:
    cluster = await make_cluster(prefillers=0)
    for decoder in cluster.decoders:  # twice: the pool itself retries on a fresh connection once
        decoder.replies += [reply(die_before=True)] * 2
    answer = await cluster.chat("c", "hi", stream=stream)
    assert answer.status == 200
    assert all(d.bodies(CHAT) for d in cluster.decoders)
    assert cluster.gateway.runtime.scheduler.counters.outcomes == {"finished": 1}
    cluster.settled()


async def test_death_in_mid_stream_ends_with_an_error_event(make_cluster: Any, reply: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    cluster.decoders[0].replies.append(reply(die_after=2))
    answer = await cluster.chat("c", "hi", stream=True)
    assert answer.status == 200
    events = [e for e in answer.body.split(b"\n\n") if e]
    assert len(events) == 3
    error = json.loads(events[2].removeprefix(b"data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "upstream_failed")
    cluster.settled()
    # The client tries again with the same tag: the turn it had, not a new one.
    again = await cluster.chat("c", "hi")
    assert again.headers["x-conserve-turn-index"] == "1"


async def test_error_event_of_the_engine_is_passed_on_and_counted(
    make_cluster: Any, reply: Any
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    cluster.decoders[0].replies.append(reply(error_event=True))
    answer = await cluster.chat("c", "hi", stream=True)
    assert b"aborted on the engine" in answer.body
    assert answer.body.endswith(b"data: [DONE]\n\n")
    counters = (await cluster.ask("GET", "/conserve/v1/cluster")).json()["counters"]
    assert counters["turns_by_outcome"] == {"failed": 1}
    cluster.settled()


async def test_server_errors_are_tried_elsewhere_then_502(make_cluster: Any, reply: Any) -> None:
    cluster = await make_cluster(prefillers=0)
    for decoder in cluster.decoders:
        decoder.replies += [reply(status=500, body=b'{"message": "CUDA error"}')] * 3
    answer = await cluster.chat("c", "hi")
    assert (answer.status, answer.code) == (502, "upstream_failed")
    assert "CUDA error" in answer.json()["error"]["message"]
    assert sum(len(d.bodies(CHAT)) for d in cluster.decoders) == 3
    cluster.settled()


async def test_client_errors_of_the_engine_are_passed_on(make_cluster: Any, reply: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    refusal = {"object": "error", "message": "top_p must be in (0, 1]", "type": "BadRequestError"}
    cluster.decoders[0].replies.append(reply(status=400, body=json.dumps(refusal).encode()))
    answer = await cluster.chat("c", "hi", stream=True)
    assert answer.status == 400
    assert answer.json()["error"]["message"] == "top_p must be in (0, 1]"
    assert len(cluster.decoders[0].bodies(CHAT)) == 1  # the request's fault: not tried again
    cluster.settled()


async def test_lost_decoder_loses_no_conversation(
    make_cluster: Any, reply: Any, long_text: str
) -> None:
    cluster = await make_cluster()
    first = await cluster.chat("c", long_text)
    home = first.headers["x-conserve-decode-engine"]
    other = "d1" if home == "d0" else "d0"
    never = asyncio.Event()
    cluster.engines[home].replies.append(reply(before=never))
    tail = asyncio.create_task(cluster.chat("c", long_text, "a", "b"))
    await cluster.engines[home].until(CHAT)
    await cluster.engines[home].until(CHAT)
    await cluster.engines[home].kill()
    answer = await tail
    assert answer.status == 200
    assert answer.headers["x-conserve-decode-engine"] == other
    assert answer.headers["x-conserve-reason"] == "replaced_engine_lost"
    assert answer.headers["x-conserve-prefill-engine"] == "p0"  # the history, handed over again
    assert answer.headers["x-conserve-transfers"] == "2"
    counters = (await cluster.ask("GET", "/conserve/v1/cluster")).json()["counters"]
    assert counters["moves_by_reason"] == {"engine_lost": 1}
    assert counters["transfers_by_reason"] == {"first_turn": 1, "engine_lost": 1}
    cluster.settled()
    epoch = cluster.gateway.fleet.get(home).epoch
    await cluster.engines[home].start()
    await cluster.state(home, "ready")
    assert cluster.gateway.fleet.get(home).epoch == epoch + 1


async def test_restart_between_two_polls_is_noticed(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    decoder = cluster.decoders[0]
    decoder.prefill_tokens = 500
    await cluster.ask("GET", "/conserve/v1/cluster")  # reads the loads
    decoder.prefill_tokens = 3
    await cluster.state("d0", "lost")
    await cluster.state("d0", "ready")
    assert cluster.gateway.fleet.get("d0").epoch == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_silent_engine_is_given_up(make_cluster: Any, reply: Any, stream: bool) -> None:
    cluster = await make_cluster(prefillers=0, gateway={"stall_timeout_s": 0.1})
    never = asyncio.Event()
    for decoder in cluster.decoders:
        decoder.replies.append(reply(before=never))
    answer = await cluster.chat("c", "hi", stream=stream)
    assert answer.status == 200
    cluster.settled()


async def test_long_reply_of_an_engine_at_work_is_waited_for(make_cluster: Any, reply: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1, gateway={"stall_timeout_s": 0.05})
    decoder, go = cluster.decoders[0], asyncio.Event()
    decoder.running = 1
    decoder.replies.append(reply(before=go))
    turn = asyncio.create_task(cluster.chat("c", "hi"))
    await decoder.until(CHAT)
    started_s = cluster.gateway.wall()
    await cluster.until(lambda: _progress_s(cluster) > started_s + 0.2)
    go.set()
    assert (await turn).status == 200
    assert len(decoder.bodies(CHAT)) == 1
    cluster.settled()


def _progress_s(cluster: Any) -> float:
    (turn,) = cluster.gateway._turns.values()
    return turn._attempt.last_progress_s


async def test_unfit_engines_are_refused_by_name(make_cluster: Any, fake_engine: Any) -> None:
    cluster = await make_cluster(
        [fake_engine(dtype="float8")],
        [fake_engine(), fake_engine(model="llama")],
        wait=False,
    )
    # Whoever comes first sets the standard; the others say what is wrong with them.
    for name in cluster.engines:
        await cluster.state(name, "ready", "unfit")
    notes = [e.note for e in cluster.gateway.fleet if e.state == "unfit"]
    assert notes
    assert all("serves" in note or "lays out KV" in note for note in notes)


async def test_engines_come_and_go_at_run_time(make_cluster: Any, fake_engine: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1, gateway={"admin_token": "operator"})
    token = {"authorization": "Bearer operator"}
    extra = await fake_engine().start()
    try:
        new = {"id": "d7", "url": extra.url, "tier": "decode"}
        assert (await cluster.ask("POST", "/conserve/v1/engines", new)).status == 401
        bad = await cluster.ask("POST", "/conserve/v1/engines", {**new, "url": "ftp://x"}, token)
        assert bad.status == 400
        assert (await cluster.ask("POST", "/conserve/v1/engines", new, token)).status == 201
        await cluster.state("d7", "ready")
        drained = await cluster.ask("POST", "/conserve/v1/engines/d0/drain", None, token)
        assert drained.status == 200
        for number in range(3):
            answer = await cluster.chat(f"c{number}", "hi")
            assert answer.headers["x-conserve-decode-engine"] == "d7"
        assert (await cluster.ask("DELETE", "/conserve/v1/engines/d7", None, token)).status == 200
        assert (await cluster.ask("DELETE", "/conserve/v1/engines/d7", None, token)).status == 404
        names = [
            e["id"] for e in (await cluster.ask("GET", "/conserve/v1/engines")).json()["engines"]
        ]
        assert names == ["d0"]
    finally:
        await extra.kill()


async def test_cached_shortfall_is_counted_and_survived(
    make_cluster: Any, reply: Any, long_text: str
) -> None:
    cluster = await make_cluster(decoders=1)
    cluster.decoders[0].replies.append(reply(cached=16))
    answer = await cluster.chat("c", long_text)
    assert answer.status == 200
    counters = (await cluster.ask("GET", "/conserve/v1/cluster")).json()["counters"]
    assert counters["shortfall_turns"] == 1
    assert counters["cached_token_shortfall_tokens"] > 200
    seen = (await cluster.ask("GET", "/conserve/v1/conversations/c")).json()
    assert seen["cached_token_shortfall_tokens"] > 200


async def test_reply_without_counts_is_estimated_and_counted(make_cluster: Any, reply: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    cluster.decoders[0].replies.append(reply(usage=False, words=7))
    await cluster.chat("c", "x" * 400, stream=True)
    seen = (await cluster.ask("GET", "/conserve/v1/conversations/c")).json()
    assert seen["output_tokens"] in (7, 8)
    assert 80 < seen["prompt_tokens"] < 140
    assert cluster.gateway.metrics.usage_missing == 1


# --- hand-offs that fail ---------------------------------------------------------------------
async def _falls_back(cluster: Any, text: str, reason: str) -> None:
    answer = await cluster.chat("c", text)
    assert answer.status == 200
    assert answer.headers["x-conserve-transfers"] == "0"
    assert answer.headers["x-conserve-prefill-engine"] == answer.headers["x-conserve-decode-engine"]
    counters = (await cluster.ask("GET", "/conserve/v1/cluster")).json()["counters"]
    assert counters["fallbacks_by_reason"] == {reason: 1}
    cluster.settled()


async def test_late_acknowledgement(make_cluster: Any, long_text: str) -> None:
    cluster = await make_cluster(gateway={"handoff_ack_timeout_s": 0.05})
    cluster.prefillers[0].acknowledge = None
    await _falls_back(cluster, long_text, "ack_late")


async def test_incomplete_store(make_cluster: Any, long_text: str) -> None:
    cluster = await make_cluster()
    cluster.prefillers[0].ack_tokens = 32
    await _falls_back(cluster, long_text, "partial_pages")


@pytest.mark.parametrize("error", ["store_full", "partial_pages"])
async def test_a_store_that_kept_less(make_cluster: Any, long_text: str, error: str) -> None:
    cluster = await make_cluster()

    async def refuse(ack: dict[str, Any]) -> None:
        await cluster.ask("POST", "/conserve/v1/handoffs", {**ack, "tokens": 0, "error": error})

    cluster.prefillers[0].acknowledge = refuse
    await _falls_back(cluster, long_text, error)


async def test_prefiller_that_answers_badly(make_cluster: Any, long_text: str) -> None:
    cluster = await make_cluster()
    cluster.prefillers[0].prefill_status = 500
    await _falls_back(cluster, long_text, "prefiller_failed")


async def test_tokenizer_that_fails(make_cluster: Any, long_text: str) -> None:
    cluster = await make_cluster()
    for engine in cluster.engines.values():
        engine.tokenize_status = 500
    await _falls_back(cluster, long_text, "tokenize_failed")


async def test_prefiller_killed_in_prefill(make_cluster: Any, long_text: str) -> None:
    cluster = await make_cluster()
    cluster.prefillers[0].prefill_gate = asyncio.Event()
    turn = asyncio.create_task(cluster.chat("c", long_text))
    await cluster.prefillers[0].until("/generate")
    await cluster.prefillers[0].kill()
    answer = await turn
    assert answer.status == 200
    assert answer.headers["x-conserve-reason"] == "first_turn_no_prefiller"
    counters = (await cluster.ask("GET", "/conserve/v1/cluster")).json()["counters"]
    assert counters["fallbacks_by_reason"] == {"prefiller_lost": 1}
    cluster.settled()


# --- clients that leave ----------------------------------------------------------------------
async def _leave(cluster: Any, body: dict[str, Any], until: Any, path: str = CHAT) -> None:
    """Send a request and close the connection once ``until`` is done."""
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.server.port)
    data = json.dumps(body).encode()
    writer.write(
        b"POST %s HTTP/1.1\r\nhost: a\r\nx-conserve-conversation-id: gone\r\n"
        b"content-length: %d\r\n\r\n" % (path.encode(), len(data)) + data
    )
    await until
    writer.close()
    await writer.wait_closed()
    del reader


async def _all_turns_over(cluster: Any) -> None:
    async with asyncio.timeout(5):
        await cluster.gateway._idle.wait()


async def test_client_leaves_in_prefill(make_cluster: Any, body: Any, long_text: str) -> None:
    cluster = await make_cluster()
    prefiller = cluster.prefillers[0]
    prefiller.prefill_gate = asyncio.Event()
    await _leave(cluster, body(long_text), prefiller.until("/generate"))
    await prefiller.until("/abort_request")
    async with asyncio.timeout(5):
        await prefiller.gone.wait()  # the connection was closed as well
    await _all_turns_over(cluster)
    (asked,) = prefiller.bodies("/generate")
    assert prefiller.bodies("/abort_request") == [{"rid": asked["rid"]}]
    cluster.settled()


@pytest.mark.parametrize("stream", [False, True])
async def test_client_leaves_before_the_first_token(
    make_cluster: Any, reply: Any, body: Any, stream: bool
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    decoder = cluster.decoders[0]
    decoder.replies.append(reply(before=asyncio.Event()))
    await _leave(cluster, body("hi", stream=stream), decoder.until(CHAT))
    await decoder.until("/abort_request")
    await _all_turns_over(cluster)
    counters = (await cluster.ask("GET", "/conserve/v1/cluster")).json()["counters"]
    assert counters["turns_by_outcome"] == {"aborted": 1}
    assert counters["client_aborts"] == 1
    cluster.settled()


async def test_a_prompt_that_came_in_a_list_is_aborted(make_cluster: Any, reply: Any) -> None:
    """SGLang numbers the parts of such a request, and knows the whole by no name."""
    cluster = await make_cluster(prefillers=0, decoders=1)
    decoder = cluster.decoders[0]
    decoder.replies.append(reply(before=asyncio.Event()))
    path = "/v1/completions"
    asking = {"model": decoder.model, "prompt": ["a"]}
    await _leave(cluster, asking, decoder.until(path), path)
    await decoder.until("/abort_request")
    (asked,) = decoder.bodies(path)
    assert decoder.bodies("/abort_request") == [{"rid": f"{asked['rid']}_0"}]
    await _all_turns_over(cluster)
    cluster.settled()


async def test_client_leaves_in_mid_stream(make_cluster: Any, reply: Any, body: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    decoder = cluster.decoders[0]
    decoder.replies.append(reply(after_first=asyncio.Event()))
    response = await cluster.send("POST", CHAT, body("hi", stream=True))
    await anext(aiter(response))
    response.close()
    await decoder.until("/abort_request")
    await _all_turns_over(cluster)
    cluster.settled()


async def test_client_leaves_while_held(
    make_cluster: Any, fake_engine: Any, reply: Any, body: Any
) -> None:
    cluster = await make_cluster(0, [fake_engine(kv_capacity_tokens=1200)])
    go, running = await _fill(cluster, reply)
    scheduler = cluster.gateway.runtime.scheduler
    held = cluster.until(lambda: scheduler.waiting_turns == 1)
    await _leave(cluster, body("y" * 3000), held)
    await cluster.until(lambda: scheduler.waiting_turns == 0)
    go.set()
    assert (await running).status == 200
    await _all_turns_over(cluster)
    cluster.settled()


async def test_client_that_leaves_in_its_own_upload(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.server.port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await cluster.chat("c", "hi")).status == 200
    cluster.settled()
    del reader


async def test_slow_client_pushes_the_engine_back(make_cluster: Any, reply: Any, body: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    decoder = cluster.decoders[0]
    words = 200
    decoder.replies.append(reply(words=words, pad=100_000))  # 20 MB: more than all buffers hold
    response = await cluster.send("POST", CHAT, body("hi", stream=True))
    connection = response._connection
    assert connection is not None
    await anext(aiter(response))
    connection.pause_reading()
    sent, unchanged = -1, 0
    async with asyncio.timeout(10):
        while unchanged < 20:  # the stream stands still once every buffer on the way is full
            await cluster.ask("GET", "/health")
            unchanged = unchanged + 1 if decoder.sent == sent else 0
            sent = decoder.sent
    assert sent < words
    assert cluster.gateway.runtime.live_turns == 1
    connection.resume_reading()
    text = await response.read()
    assert text.endswith(b"data: [DONE]\n\n")
    await _all_turns_over(cluster)
    cluster.settled()
