"""Responses and Messages over scripted engines: what goes wrong, and what reaches the engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
PATHS = pytest.mark.parametrize("path", [MESSAGES, RESPONSES])


def ask(path: str, text: str = "hi", **fields: Any) -> dict[str, Any]:
    """A small request of either API."""
    if path == MESSAGES:
        messages = [{"role": "user", "content": text}]
        return {"model": "qwen", "max_tokens": 50, "messages": messages, **fields}
    return {"model": "qwen", "input": text, **fields}


def events(body: bytes) -> list[Any]:
    """The data of a stream's events, each checked to be named as its type."""
    found = []
    for event in body.split(b"\n\n")[:-1]:
        name, data = event.split(b"\n")
        value = json.loads(data.removeprefix(b"data: "))
        assert name == b"event: " + value["type"].encode()
        found.append(value)
    return found


def failure(path: str, body: bytes) -> tuple[str, str]:
    """Kind and message of the error that ends a stream or is a body."""
    value = events(body)[-1] if body.startswith(b"event:") else json.loads(body)
    if path == MESSAGES:
        assert value["type"] == "error"
        return value["error"]["type"], value["error"]["message"]
    if "error" in value:
        return value["error"]["type"], value["error"]["message"]
    assert (value["type"], value["response"]["status"]) == ("response.failed", "failed")
    error = value["response"]["error"]
    return error["code"], error["message"]


# --- what reaches the engine -----------------------------------------------------------------
@PATHS
async def test_first_turn_is_handed_over_like_any_other(
    make_cluster: Any, long_text: str, path: str
) -> None:
    cluster = await make_cluster()
    answer = await cluster.ask("POST", path, ask(path, long_text), {"x-session-id": "s"})
    assert answer.status == 200
    assert answer.headers["x-conserve-prefill-engine"] == "p0"
    assert answer.headers["x-conserve-transfers"] == "1"
    home = cluster.engines[answer.headers["x-conserve-decode-engine"]]
    (prefilled,) = cluster.prefillers[0].bodies("/generate")
    (sent,) = home.bodies("/v1/chat/completions")
    assert sent["input_ids"] == prefilled["input_ids"]
    assert sent["messages"] == [{"role": "user", "content": long_text}]
    assert "session_id" in sent and "rid" in sent
    cluster.settled()


async def test_a_messages_request_as_a_chat_completion(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    asked = {
        "model": "qwen",
        "max_tokens": 9,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cch=1;"},
            {"type": "text", "text": "Be good.", "cache_control": {"type": "ephemeral"}},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "text", "text": "let me"},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": [1]}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "r", "is_error": True},
                    {"type": "text", "text": "go on"},
                ],
            },
        ],
        "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "stop_sequences": ["END"],
        "temperature": 0.1,
        "top_k": 3,
    }
    answer = await cluster.ask("POST", MESSAGES, asked)
    assert answer.status == 200
    (sent,) = cluster.decoders[0].bodies("/v1/chat/completions")
    assert sent["messages"] == [
        {"role": "system", "content": "Be good."},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "let me",
            "reasoning_content": "hm",
            "tool_calls": [
                {
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"a": [1]}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "[tool error] r"},
        {"role": "user", "content": "go on"},
    ]
    assert sent["tools"] == [
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
        }
    ]
    assert sent["tool_choice"] == "required"
    assert sent["parallel_tool_calls"] is False
    assert sent["stop"] == ["END"]
    assert (sent["temperature"], sent["top_k"], sent["max_completion_tokens"]) == (0.1, 3, 9)
    assert sent["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}


async def test_a_responses_request_as_a_chat_completion(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    asked = {
        "model": "qwen",
        "instructions": "Be good.",
        "input": [
            {"role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
            {"role": "user", "content": "q"},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "let me", "annotations": []}],
            },
            {"type": "function_call", "call_id": "t1", "name": "f", "arguments": '{"a": 1}'},
            {"type": "function_call", "call_id": "t2", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "t1", "output": "r1"},
            {
                "type": "function_call_output",
                "call_id": "t2",
                "output": [{"type": "input_text", "text": "r2"}],
            },
            {"role": "assistant", "content": "so"},
            {"role": "assistant", "content": "then"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_object"}},
        "reasoning": {"effort": "xhigh"},
        "max_output_tokens": 9,
    }
    answer = await cluster.ask("POST", RESPONSES, asked)
    assert answer.status == 200
    (sent,) = cluster.decoders[0].bodies("/v1/chat/completions")

    def call(id: str, arguments: str) -> dict[str, Any]:
        function = {"name": "f", "arguments": arguments}
        return {"id": id, "type": "function", "function": function}

    assert sent["messages"] == [
        {"role": "system", "content": "Be good."},
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "let me",
            "reasoning_content": "hm",
            "tool_calls": [call("t1", '{"a": 1}'), call("t2", "{}")],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "r1"},
        {"role": "tool", "tool_call_id": "t2", "content": "r2"},
        {"role": "assistant", "content": "so"},
        {"role": "assistant", "content": "then"},
    ]
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert sent["response_format"] == {"type": "json_object"}
    assert (sent["reasoning_effort"], sent["max_completion_tokens"]) == ("xhigh", 9)


async def test_a_response_continued_twice_at_once_is_a_branch(
    make_cluster: Any, reply: Any
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    first = await cluster.ask("POST", RESPONSES, ask(RESPONSES))
    go = asyncio.Event()
    cluster.decoders[0].replies += [reply(status=400, body=b"{}"), reply(before=go)]
    on = ask(RESPONSES, "on", previous_response_id=first.json()["id"])
    refused = await cluster.ask("POST", RESPONSES, on)
    waiting = asyncio.ensure_future(cluster.ask("POST", RESPONSES, on))
    for _ in range(3):
        await cluster.decoders[0].until("/v1/chat/completions")
    branch = await cluster.ask("POST", RESPONSES, {**on, "input": "another way"})
    go.set()
    trunk = await waiting
    ids = [a.headers["x-conserve-conversation-id"] for a in (first, refused, trunk, branch)]
    assert ids[0] == ids[1] == ids[2] != ids[3]  # to try again is not to branch
    relations = [a.headers["x-conserve-relation"] for a in (trunk, branch)]
    assert relations == ["extend", "fork"]
    seen = (await cluster.ask("GET", f"/conserve/v1/conversations/{ids[3]}")).json()
    assert seen["parent"] == ids[0]


# --- streams ---------------------------------------------------------------------------------
@PATHS
async def test_first_token_is_passed_on_before_the_second_exists(
    make_cluster: Any, reply: Any, path: str
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    go = asyncio.Event()
    cluster.decoders[0].replies.append(reply(after_first=go, words=2))
    response = await cluster.send("POST", path, ask(path, stream=True))
    got = b""
    async with asyncio.timeout(5):
        async for chunk in response:
            got += chunk
            if b"w0" in got and not go.is_set():
                assert cluster.decoders[0].sent == 1
                assert b"w1" not in got
                go.set()
    kinds = [event["type"] for event in events(got)]
    assert kinds[-1] in ("message_stop", "response.completed")
    cluster.settled()


@PATHS
async def test_engine_that_dies_before_the_first_byte_goes_unnoticed(
    make_cluster: Any, reply: Any, path: str
) -> None:
    cluster = await make_cluster(prefillers=0)
    for engine in cluster.decoders:
        engine.replies.append(reply(die_before=True))
    cluster.decoders[1].replies.clear()
    cluster.decoders[0].replies.append(reply(die_before=True))
    answer = await cluster.ask("POST", path, ask(path, stream=True))
    assert answer.status == 200
    assert events(answer.body)[-1]["type"] in ("message_stop", "response.completed")
    cluster.settled()


@PATHS
@pytest.mark.parametrize("how", ["dies", "says so", "just ends"])
async def test_failure_in_mid_stream_has_the_apis_own_form(
    make_cluster: Any, reply: Any, path: str, how: str
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    replies = {
        "dies": reply(die_after=1),
        "says so": reply(error_event=True),
        "just ends": reply(done=False),
    }
    cluster.decoders[0].replies.append(replies[how])
    answer = await cluster.ask("POST", path, ask(path, stream=True))
    assert answer.status == 200
    kind, message = failure(path, answer.body)
    assert kind in ("api_error", "server_error")
    assert message
    kinds = [event["type"] for event in events(answer.body)]
    assert "message_stop" not in kinds and "response.completed" not in kinds
    cluster.settled()


@PATHS
async def test_client_leaves_in_mid_stream(make_cluster: Any, reply: Any, path: str) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    engine = cluster.decoders[0]
    engine.replies.append(reply(after_first=asyncio.Event()))
    response = await cluster.send("POST", path, ask(path, stream=True))
    async for chunk in response:
        if b"w0" in chunk:
            break
    response.close()
    await asyncio.wait_for(engine.gone.wait(), 5)
    await engine.until("/abort_request")
    await cluster.until(lambda: cluster.gateway.runtime.live_turns == 0)
    cluster.settled()
    assert cluster.gateway.metrics.aborts == 1


# --- errors ----------------------------------------------------------------------------------
@PATHS
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"object":"error","message":"bad top_p","code":400}', "invalid_request_error"),
        (500, b"boom", None),
    ],
)
async def test_errors_of_the_engine(
    make_cluster: Any, reply: Any, path: str, *, stream: bool, status: int, body: bytes, kind: Any
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    cluster.decoders[0].replies += [reply(status=status, body=body)] * 3
    answer = await cluster.ask("POST", path, ask(path, stream=stream))
    assert answer.status == (status if status == 400 else 502)
    found, message = failure(path, answer.body)
    if kind:
        assert (found, message) in ((kind, "bad top_p"), ("BadRequestError", "bad top_p"))
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-conserve-conversation-id"]
    cluster.settled()


@PATHS
async def test_reply_that_is_no_completion_is_502(make_cluster: Any, reply: Any, path: str) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    body = b'{"choices": []}'
    raw = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    cluster.decoders[0].replies.append(reply(raw=raw))
    answer = await cluster.ask("POST", path, ask(path))
    assert answer.status == 502
    assert "no message" in failure(path, answer.body)[1]
    assert cluster.gateway.metrics.internal_errors == 0
    cluster.settled()


@PATHS
async def test_no_engine_draining_and_unknown_model(make_cluster: Any, path: str) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    other = await cluster.ask("POST", path, {**ask(path), "model": "other"})
    assert (other.status, failure(path, other.body)[0]) in (
        (404, "not_found_error"),
        (404, "invalid_request_error"),
    )
    await cluster.decoders[0].kill()
    await cluster.state("d0", "lost")
    gone = await cluster.ask("POST", path, ask(path))
    assert gone.status == 503
    assert gone.headers["retry-after"]
    if path == MESSAGES:
        assert failure(path, gone.body)[0] == "overloaded_error"


@PATHS
async def test_prompt_longer_than_any_decoder(
    make_cluster: Any, fake_engine: Any, path: str
) -> None:
    small = fake_engine(kv_capacity_tokens=1000, max_context_tokens=1000)
    cluster = await make_cluster(prefillers=0, decoders=[small])
    answer = await cluster.ask("POST", path, ask(path, "x" * 40_000))
    assert answer.status == 400
    if path == RESPONSES:
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("input", "context_length_exceeded")


async def test_paths_and_methods(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    for method, path, status in (
        ("GET", MESSAGES, 405),
        ("GET", MESSAGES + "/count_tokens", 405),
        ("POST", MESSAGES + "/batches", 404),
        ("GET", RESPONSES, 405),
        ("PUT", RESPONSES + "/x", 405),
        ("GET", RESPONSES + "/x", 404),
        ("GET", RESPONSES + "/x/input_items", 404),
        ("GET", "/v1/conversations", 405),
        ("GET", "/v1/conversations/x/items", 404),
        ("DELETE", "/v1/conversations/x", 404),
        ("POST", RESPONSES + "/x/cancel", 404),
    ):
        answer = await cluster.ask(method, path, {} if method in ("POST", "PUT") else None)
        assert answer.status == status, (method, path, answer.body)
        assert answer.json()["error"]["message"]
        assert (answer.json().get("type") == "error") is path.startswith(MESSAGES)


async def test_count_tokens_survives_one_tokenizer(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0)
    path = MESSAGES + "/count_tokens"
    cluster.decoders[0].tokenize_status = 500
    answer = await cluster.ask(
        "POST", path, {"model": "qwen", "messages": ask(MESSAGES)["messages"]}
    )
    assert answer.json()["input_tokens"] > 0
    cluster.decoders[1].tokenize_status = 500
    failed = await cluster.ask("POST", path, ask(MESSAGES))
    assert (failed.status, failure(MESSAGES, failed.body)[0]) == (502, "api_error")
    for engine in cluster.decoders:
        engine.tokenize_status = 400
    refused = await cluster.ask("POST", path, ask(MESSAGES))
    assert (refused.status, failure(MESSAGES, refused.body)[1]) == (400, "no tokenizer")


# --- bodies no honest client sends -----------------------------------------------------------
def _nest(depth: int, start: bytes = b"[", end: bytes = b"]") -> bytes:
    return start * depth + b"1" + end * depth


@PATHS
@pytest.mark.parametrize("depth", [*range(100, 1000, 150), 2000, 100_000])
async def test_nesting_of_any_depth_is_taken_or_refused(
    make_cluster: Any, path: str, depth: int
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    places = {
        MESSAGES: (
            b'"metadata": %b',
            b'"tools": [{"name": "f", "input_schema": %b}]',
            b'"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", '
            b'"name": "b", "input": %b}]}]',
            b'"messages": [{"role": "user", "content": %b}]',
            b'"unknown": %b',
        ),
        RESPONSES: (
            b'"metadata": %b',
            b'"tools": [{"type": "function", "name": "f", "parameters": %b}]',
            b'"input": %b',
            b'"input": [{"role": "user", "content": %b}]',
            b'"conversation": %b',
            b'"tool_choice": %b',
            b'"unknown": %b',
        ),
    }
    base = b'{"model": "qwen", "max_tokens": 5, "input": "x", '
    base += b'"messages": [{"role": "user", "content": "x"}], '
    for place in places[path]:
        for nested in (_nest(depth), _nest(depth, b'{"a":', b"}")):
            answer = await cluster.ask("POST", path, base + place % nested + b"}")
            assert answer.status in (200, 400), (place, answer.body)
    assert cluster.gateway.metrics.internal_errors == 0
    cluster.settled()


@PATHS
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"nonsense",
        b'{"model": "qwen"}',
        b'{"model": 7, "input": "x", "messages": [], "max_tokens": 1}',
        b'{"model": "qwen", "max_tokens": "many", "max_output_tokens": "many", "input": "x"}',
        b'{"model": "qwen", "max_tokens": 5, "input": 7, "messages": 7}',
        b'{"model": "qwen", "max_tokens": 5, "input": [7], "messages": [7]}',
        b'{"model": "qwen", "max_tokens": 5, "input": [{}], "messages": [{}]}',
        b'{"model": "qwen", "max_tokens": 5, "input": [{"role": "user", "content": 7}], '
        b'"messages": [{"role": "user", "content": 7}]}',
        b'{"model": "qwen", "max_tokens": 5, "input": [{"role": "user", "content": [7]}], '
        b'"messages": [{"role": "user", "content": [7]}]}',
        b'{"model": "qwen", "max_tokens": 5, '
        b'"input": [{"role": "user", "content": [{"type": "input_text"}]}], '
        b'"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        b'{"model": "qwen", "max_tokens": 5, '
        b'"input": [{"role": "user", "content": [{"type": "input_text", "text": 7}]}], '
        b'"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}',
        b'{"model": "qwen", "max_tokens": 5, "input": [{"type": "function_call"}], '
        b'"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}',
        b'{"model": "qwen", "max_tokens": 5, "input": [{"type": "function_call_output"}], '
        b'"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}',
        b'{"model": "qwen", "max_tokens": 5, "input": "x", "tools": 7, '
        b'"messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "qwen", "max_tokens": 5, "input": "x", "tool_choice": {"type": "x"}, '
        b'"messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "qwen", "max_tokens": 5, "input": "\xff", '
        b'"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "qwen", "max_tokens": 5, '
        b'"input": [{"role": "user", "content": [{"type": "input_text", "text": "\xff"}]}], '
        b'"messages": [{"role": "user", "content": [{"type": "text", "text": "\xff"}]}]}',
        b'{"model": "qwen", "max_tokens": -1, "max_output_tokens": -1, "input": "x", '
        b'"messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "qwen", "max_tokens": 5, "system": 7, "instructions": 7, "input": "x", '
        b'"messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "qwen", "max_tokens": 5, "input": [{"role": "user", "content": '
        b'[{"type": "input_image"}]}], "messages": [{"role": "user", "content": '
        b'[{"type": "image", "source": {"type": "file"}}]}]}',
    ],
)
async def test_faults_are_named(make_cluster: Any, path: str, body: bytes) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    answer = await cluster.ask("POST", path, body)
    assert answer.status == 400, answer.body
    kind, message = failure(path, answer.body)
    assert kind == "invalid_request_error"
    assert len(message) > 10
    assert cluster.gateway.metrics.internal_errors == 0
    assert cluster.decoders[0].bodies("/v1/chat/completions") == []
    assert len(cluster.gateway.conversations) == 0


@pytest.mark.parametrize("half", [b"\\ud800", b"\\udc00 and more"])
async def test_half_a_surrogate_pair_is_no_defect(make_cluster: Any, half: bytes) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    for path, place in (
        (MESSAGES, b'"system": [{"type": "text", "text": "%b"}]'),
        (MESSAGES, b'"system": "%b"'),
        (MESSAGES, b'"stop_sequences": ["%b"]'),
        (MESSAGES, b'"metadata": {"user_id": "%b"}'),
        (MESSAGES, b'"tools": [{"name": "%b"}]'),
        (MESSAGES, b'"model": "%b"'),
        (RESPONSES, b'"instructions": "%b"'),
        (RESPONSES, b'"previous_response_id": "%b"'),
        (RESPONSES, b'"conversation": "%b"'),
        (RESPONSES, b'"prompt_cache_key": "%b"'),
        (RESPONSES, b'"input": [{"type": "function_call_output", "call_id": "%b", "output": "x"}]'),
        (RESPONSES, b'"tool_choice": "%b"'),
        (RESPONSES, b'"model": "%b"'),
    ):
        base = b'{"model": "qwen", "max_tokens": 5, "input": "x", '
        base += b'"messages": [{"role": "user", "content": "x"}], '
        answer = await cluster.ask("POST", path, base + place % half + b"}")
        assert answer.status in (200, 400, 404), (place, answer.body)
    assert cluster.gateway.metrics.internal_errors == 0


@pytest.mark.parametrize("field", ["previous_response_id", "conversation"])
async def test_huge_ids_are_quoted_in_part(make_cluster: Any, field: str) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    answer = await cluster.ask("POST", RESPONSES, ask(RESPONSES, **{field: "x" * 100_000}))
    assert answer.status in (400, 404)
    assert len(answer.body) < 1000
    odd = await cluster.ask("GET", RESPONSES + "/%00%ff%2F..%2F")
    assert odd.status == 404


@PATHS
async def test_huge_values_are_quoted_in_part(make_cluster: Any, path: str) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    huge = "x" * 100_000
    content = [{"type": huge, "text": "x"}]
    for change in (
        {"messages": [{"role": "user", "content": content}], "input": [{"type": huge}]},
        {"tools": [{"type": huge, "name": "x"}]},
        {"tool_choice": {"type": huge}},
        {"output_config": {"effort": huge}, "reasoning": {"effort": huge}},
        {"model": huge},
    ):
        answer = await cluster.ask("POST", path, {**ask(path), **change})
        assert answer.status in (400, 404)
        assert len(answer.body) < 1000, answer.body[:300]
