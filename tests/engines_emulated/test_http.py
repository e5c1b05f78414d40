"""Endpoints, field names and error shapes, over real sockets."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from conserve_serving.engines.client import EngineClient
from conserve_serving.engines.emulated import tokenizer as tk

USER = {"role": "user", "content": "hi"}


async def test_what_the_driver_reads_when_an_engine_joins(engine: Any) -> None:
    driver = EngineClient(engine.engine.url)
    try:
        await driver.health()
        described = await driver.describe()
        assert described.model == "emulated"
        assert described.page_tokens == 64
        assert described.kv_capacity_tokens == 308_416
        assert described.keeps_sessions
        assert described.priority_field(3) == 3
        assert described.emulated is not None
        assert described.emulated.profile == "a40-qwen3-0.6b"
        assert described.emulated.energy_source.startswith("modelled: ")
        await engine.ok("/generate", {"text": "x" * 4000, "sampling_params": {"max_new_tokens": 8}})
        loads = await driver.loads()
        assert loads.prefill_tokens == 1000
        assert loads.decode_steps == 6  # the first of the seven follows none
        occupancy = await driver.occupancy()
        assert occupancy is not None
        assert (occupancy.kv_used_tokens, occupancy.kv_evictable_tokens) == (0, 960)
        extension = await driver.extension()
        assert extension is not None
        assert extension.energy_j > 0
        assert extension.model_time_s > 0
    finally:
        driver.close()


async def test_reports(engine: Any) -> None:
    for path in ("/health", "/health_generate", "/ready"):
        assert (await engine.get(path)).status == 200
    card = (await engine.get("/v1/models")).json()["data"][0]
    assert card["id"] == "emulated"
    assert card["max_model_len"] == 131_072
    assert (await engine.get("/v1/models/emulated")).json() == card
    info = (await engine.get("/server_info")).json()
    assert info["version"] == "0.5.23"
    assert info["conserve"]["vocab_size"] == tk.VOCAB_SIZE
    assert info["conserve"]["emulated"] is True
    load = (await engine.get("/v1/loads?include=core")).json()["loads"][0]
    assert load["decode_moments"] is None
    assert "queues" not in load
    assert "queues" in (await engine.get("/v1/loads")).json()["loads"][0]
    lines = (await engine.get("/metrics")).body.decode().splitlines()
    sample = next(line for line in lines if line.startswith("sglang:kv_available_tokens{"))
    assert 'model_name="emulated"' in sample
    assert float(sample.split()[-1]) == 308_416


async def test_tokens_there_and_back(engine: Any) -> None:
    text = "Zwölf Boxkämpfer\n\n你好 😀"
    told = await engine.ok("/v1/tokenize", {"prompt": text})
    assert told["count"] == len(told["tokens"])
    assert told["max_model_len"] == 131_072
    assert (await engine.ok("/v1/detokenize", {"tokens": told["tokens"]})) == {"text": text}
    many = await engine.ok("/tokenize", {"prompt": ["a", "bcdefgh"]})
    assert many["count"] == [1, 2]
    assert (await engine.ok("/detokenize", {"tokens": many["tokens"]})) == {
        "text": ["a", "bcdefgh"]
    }
    body = {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}
    ids = (await engine.ok("/v1/tokenize", body))["tokens"]
    chat = await engine.ok("/v1/chat/completions", {**body, "return_prompt_token_ids": True})
    assert chat["choices"][0]["prompt_token_ids"] == ids
    assert chat["usage"]["prompt_tokens"] == len(ids)


async def test_generate_from_text_and_from_ids(engine: Any) -> None:
    params = {"max_new_tokens": 5, "ignore_eos": True}
    told = await engine.ok("/generate", {"text": "hello", "sampling_params": params, "rid": "r1"})
    meta = told["meta_info"]
    assert meta["id"] == "r1"
    assert meta["finish_reason"] == {"type": "length", "length": 5}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (2, 5, 0)
    assert meta["cached_tokens_details"] is None  # nothing was cached
    assert tk.decode(told["output_ids"]) == told["text"]
    batch = {"input_ids": [[1, 2, 3], [4, 5]], "sampling_params": params, "rid": "b"}
    both = await engine.ok("/generate", batch)
    assert [one["meta_info"]["id"] for one in both] == ["b_0", "b_1"]
    assert [one["meta_info"]["prompt_tokens"] for one in both] == [3, 2]
    natural = await engine.ok("/generate", {"text": "hello"})
    assert natural["meta_info"]["finish_reason"] == {"type": "stop", "matched": tk.IM_END}


async def test_generate_streams_the_whole_text_so_far(engine: Any) -> None:
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 6}, "stream": True}
    events = (await engine.post("/generate", body)).events
    texts = [event["text"] for event in events]
    assert all(later.startswith(former) for former, later in pairwise(texts))
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
    assert all(event["meta_info"]["finish_reason"] is None for event in events[:-1])


async def test_prefill_only(engine: Any) -> None:
    body = {"input_ids": [7] * 640, "sampling_params": {"max_new_tokens": 0}, "rid": "p"}
    told = await engine.ok("/generate", body)
    assert told["text"] == ""
    assert told["output_ids"] == []
    assert told["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    again = await engine.ok("/generate", body)
    assert again["meta_info"]["cached_tokens"] == 576  # all but the page of the last token


async def test_completions(engine: Any) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 7, "ignore_eos": True, "echo": True}
    told = await engine.ok("/v1/completions", {**body, "model": "any", "return_token_ids": True})
    choice = told["choices"][0]
    assert told["model"] == "any"
    assert choice["text"] == "Once upon a time" + tk.decode(choice["token_ids"])
    assert choice["finish_reason"] == "length"
    assert tk.decode(choice["prompt_token_ids"]) == "Once upon a time"
    assert told["usage"] == {
        "prompt_tokens": 4,
        "total_tokens": 11,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
        "reasoning_tokens": 0,
        "completion_tokens_details": None,
    }
    many = await engine.ok("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2})
    assert [choice["index"] for choice in many["choices"]] == [0, 1]
    assert many["usage"]["completion_tokens"] == 4


async def test_streamed_completions_add_up_to_whole_ones(engine: Any) -> None:
    body = {"prompt": [[1, 2], [3, 4]], "max_tokens": 9, "return_token_ids": True, "min_tokens": 9}
    whole = await engine.ok("/v1/completions", body)
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = {**body, "stream": True, "stream_options": options}
    events = (await engine.post("/v1/completions", streamed)).events
    usage = events.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 18
    for index in (0, 1):
        chunks = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        ids = [token for chunk in chunks for token in chunk["token_ids"]]
        assert ids == whole["choices"][index]["token_ids"]
        assert "".join(c["text"] for c in chunks) == whole["choices"][index]["text"]
        assert [c["finish_reason"] for c in chunks if c["finish_reason"]] == ["length"]
    assert all(event["usage"]["total_tokens"] > 0 for event in events)


async def test_chat_takes_token_ids_in_place_of_its_template(engine: Any) -> None:
    ids = (await engine.ok("/v1/tokenize", {"messages": [USER]}))["tokens"]
    plain = await engine.ok("/v1/chat/completions", {"messages": [USER]})
    given = await engine.ok(
        "/v1/chat/completions",
        {"messages": [USER], "input_ids": ids, "return_output_ids_in_sglext": True},
    )
    assert given["choices"][0]["message"] == plain["choices"][0]["message"]
    assert given["usage"]["prompt_tokens"] == len(ids)
    (output_ids,) = given["sglext"]["output_ids"]
    assert tk.decode(output_ids) == given["choices"][0]["message"]["content"]


async def test_a_stream_tells_its_ids_and_cached_tokens_on_demand(engine: Any) -> None:
    body = {
        "messages": [USER],
        "stream": True,
        "return_output_ids_in_sglext": True,
        "return_cached_tokens_details": True,
        "max_tokens": 4,
    }
    events = (await engine.post("/v1/chat/completions", body)).events
    sglext = events[-1]["sglext"]
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events[:-1])
    assert tk.decode(sglext["output_ids"][0]) == text
    assert "cached_tokens_details" not in sglext  # nothing was cached


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/chat/completions", b"{", 400, "not valid JSON"),
        ("/v1/chat/completions", b"[]", 400, "Expected `object`"),
        ("/v1/chat/completions", {"messages": []}, 400, "Messages cannot be empty."),
        ("/v1/chat/completions", {"messages": [USER], "max_tokens": "many"}, 400, "$.max_tokens"),
        ("/v1/chat/completions", {"messages": [USER], "n": 2}, 400, "send n=1"),
        ("/v1/chat/completions", {"messages": [USER], "logprobs": True}, 400, "not emulated"),
        ("/v1/chat/completions", {"messages": [USER], "regex": "a"}, 400, "regex is not emulated"),
        ("/v1/chat/completions", {"messages": [USER], "max_tokens": 999_999}, 400, "too large"),
        ("/v1/chat/completions", {"messages": [{"role": "x"}]}, 400, "'role' must be one of"),
        ("/v1/chat/completions", {"messages": [USER], "input_ids": [-1]}, 400, "input_ids"),
        ("/v1/chat/completions", {"messages": [USER], "input_ids": [2**31]}, 400, "out of range"),
        ("/v1/completions", {"prompt": ""}, 400, "Prompt cannot be empty"),
        ("/v1/completions", {"prompt": []}, 400, "Prompt cannot be empty"),
        ("/v1/completions", {"prompt": ["a", [1]]}, 400, "prompt must be a list of token ids"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens must be positive"),
        ("/v1/completions", {"prompt": [1] * 131_072}, 400, "longer than the model's context"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 131_072}, 400, "Requested token count"),
        ("/v1/completions", {"prompt": "a", "min_tokens": 17}, 400, "min_new_tokens must be in"),
        ("/v1/tokenize", {}, 400, "Exactly one of"),
        ("/v1/detokenize", {"tokens": ["a"]}, 400, "list of integers"),
        ("/v1/detokenize", {"tokens": [2**40]}, 400, "out of range"),
    ],
)
async def test_refusals_have_the_error_shape_of_openai_endpoints(
    engine: Any, path: str, body: Any, status: int, message: str
) -> None:
    answer = await engine.post(path, body)
    assert answer.status == status
    error = answer.json()
    assert message in error["message"]
    assert error["object"] == "error"
    assert error["code"] == status
    assert {"type", "param"} <= set(error)
    assert engine.engine.service.runtime.rids() == []


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/generate", {}, "At least one of text, input_ids"),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": -1}}, "at least 0"),
        ("/generate", {"text": "a", "sampling_params": {"stop": 5}}, "sampling_params: "),
        ("/generate", {"text": ["a", "b"], "rid": ["x"]}, "1 ids for 2 prompts"),
        ("/generate", {"text": ["a", "b"], "sampling_params": [{}]}, "1 entries for 2 prompts"),
        ("/generate", {"text": ["a", "b"], "rid": ["x", "x"]}, "Duplicate request ID"),
        ("/generate", {"text": "a", "session_params": {"id": "s"}}, "s does not exist"),
    ],
)
async def test_refusals_have_the_error_shape_of_native_endpoints(
    engine: Any, path: str, body: Any, message: str
) -> None:
    answer = await engine.post(path, body)
    assert answer.status == 400
    assert message in answer.json()["error"]["message"]
    assert engine.engine.service.runtime.rids() == []


async def test_a_prompt_beyond_the_kv_pool_is_refused(start_engine: Any) -> None:
    small = await start_engine(kv_capacity_tokens=640)
    answer = await small.post("/v1/completions", {"prompt": [1] * 640})
    assert answer.status == 400
    assert "exceeds the maximum allowed length (634 tokens)" in answer.json()["message"]
    # What fits is cut to the room there is, as SGLang does.
    told = await small.ok(
        "/v1/completions", {"prompt": [1] * 600, "max_tokens": 500, "ignore_eos": True}
    )
    assert told["usage"]["completion_tokens"] == 38
    assert told["choices"][0]["finish_reason"] == "length"


async def test_routes_and_methods(engine: Any) -> None:
    assert (await engine.get("/nope")).status == 404
    assert (await engine.get("/v1/chat/completions")).status == 405
    missing = await engine.get("/v1/models/other")
    assert missing.status == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert (await engine.get("/v1/loads?include=nonsense")).status == 400
    response = await engine.pool.request(
        "POST", "/v1/completions", [(b"content-type", b"text/plain")], b"{}"
    )
    assert response.status == 400
    assert "application/json" in json.loads(await response.read())["message"]


async def test_sessions(engine: Any) -> None:
    service = engine.engine.service
    opened = {"session_id": "s", "capacity_of_str_len": 1000}
    assert await engine.ok("/open_session", opened) == "s"
    again = await engine.post("/open_session", opened)
    assert again.status == 400
    assert "still open" in again.json()["error"]["message"]
    assert (await engine.post("/open_session", {"session_id": "s"})).status == 400
    # An id nobody opened is opened by the request that names it, as SGLang's radix cache does.
    body = {"prompt": [5] * 200, "max_tokens": 2}
    await engine.ok("/v1/completions", {**body, "session_id": "unheard-of"})
    assert service.runtime.stats().open_sessions == 2
    await engine.ok("/generate", {"text": "x", "session_params": {"id": "s"}})
    for session_id in ("s", "unheard-of", "never"):
        assert (await engine.post("/close_session", {"session_id": session_id})).status == 200
    assert service.runtime.stats().open_sessions == 0


async def test_flushing_the_cache(engine: Any) -> None:
    body = {"prompt": [5] * 200, "max_tokens": 2}
    await engine.ok("/v1/completions", body)
    assert (await engine.ok("/v1/completions", body))["usage"]["prompt_tokens_details"][
        "cached_tokens"
    ]
    flushed = await engine.get("/flush_cache")
    assert flushed.status == 200
    assert flushed.body.startswith(b"Cache flushed.")
    assert (await engine.ok("/v1/completions", body))["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 0
    }
