"""The turn itself: chat and text completions, whole and streamed, and what they count."""

from __future__ import annotations

from typing import Any

import pytest

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}
USAGE = {
    *("prompt_tokens", "completion_tokens", "total_tokens"),
    *("prompt_tokens_details", "reasoning_tokens"),
}


def chat(engine: Any, **fields: Any) -> dict[str, Any]:
    """A chat completion of exactly eight tokens, over a prompt nobody has sent."""
    messages = [{"role": "user", "content": engine.text(60)}]
    base = {"model": "tiny", "messages": messages, "max_tokens": 8}
    return {**base, "ignore_eos": True, "temperature": 0, **fields}


def check_usage(usage: dict[str, Any], completion_tokens: int) -> None:
    assert usage.keys() - {"completion_tokens_details"} == USAGE
    assert usage["completion_tokens"] == completion_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + completion_tokens
    assert isinstance(usage["prompt_tokens_details"]["cached_tokens"], int)


async def test_a_whole_chat_completion(engine: Any) -> None:
    reply = await engine.ok(CHAT, chat(engine, rid="my-own-id"))
    assert reply.keys() == {"id", "object", "created", "model", "choices", "usage", "metadata"}
    assert reply["id"] == "my-own-id"
    assert reply["object"] == "chat.completion"
    (choice,) = reply["choices"]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason", "matched_stop"}
    assert choice["finish_reason"] == "length"
    assert choice["message"].keys() >= {"role", "content"}
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    check_usage(reply["usage"], 8)
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    spans = [{"version": "default", "start": 0, "end": 8}]
    assert reply["metadata"] == {"weight_version": "default", "weight_versions": spans}


async def test_a_streamed_chat_completion_is_the_same_text(engine: Any) -> None:
    body = chat(engine)
    whole = await engine.ok(CHAT, body)
    answer = await engine.ask("POST", CHAT, {**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    first, *middle, last = answer.events
    assert {event["object"] for event in answer.events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in answer.events}) == 1
    assert all(event["model"] == "tiny" for event in answer.events)
    choices = [event["choices"][0] for event in answer.events]
    keys = {"index", "delta", "logprobs", "finish_reason", "matched_stop"}
    assert all(choice.keys() == keys for choice in choices)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert first["choices"][0]["delta"]["content"] == ""
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert last["choices"][0]["finish_reason"] == "length"
    assert not last["choices"][0]["delta"].get("content")
    text = "".join(event["choices"][0]["delta"]["content"] for event in middle)
    assert text == whole["choices"][0]["message"]["content"]
    assert all(event.get("usage") is None for event in answer.events)


async def test_usage_comes_as_a_chunk_of_its_own(engine: Any) -> None:
    body = chat(engine, stream=True, stream_options={"include_usage": True})
    cold = (await engine.ask("POST", CHAT, body)).events
    assert cold[-1]["choices"] == []
    check_usage(cold[-1]["usage"], 8)
    assert cold[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert all(event.get("usage") is None for event in cold[:-1])
    warm = (await engine.ask("POST", CHAT, body)).events[-1]["usage"]
    prompt = warm["prompt_tokens"]
    assert warm["prompt_tokens_details"]["cached_tokens"] == (prompt - 1) // 16 * 16


async def test_usage_in_every_chunk_on_demand(engine: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = (
        await engine.ask("POST", CHAT, chat(engine, stream=True, stream_options=options))
    ).events
    counted = [e["usage"]["completion_tokens"] for e in events if e.get("usage") is not None]
    assert counted == sorted(counted)
    assert counted[-1] == 8
    assert len(counted) >= 2


async def test_a_stop_string_ends_it(engine: Any) -> None:
    body = chat(engine, max_tokens=30)
    text = (await engine.ok(CHAT, body))["choices"][0]["message"]["content"]
    stop = text[9]
    for streamed in (False, True):
        asked = {**body, "stop": [stop], "stream": streamed}
        answer = await engine.ask("POST", CHAT, asked)
        if streamed:
            choices = [event["choices"][0] for event in answer.events]
            said = "".join(choice["delta"].get("content") or "" for choice in choices)
            ended = choices[-1]
        else:
            (ended,) = answer.json()["choices"]
            said = ended["message"]["content"]
        assert said == text[: text.index(stop)]
        assert (ended["finish_reason"], ended["matched_stop"]) == ("stop", stop)


async def test_no_tokens_at_all(engine: Any) -> None:
    reply = await engine.ok(CHAT, chat(engine, max_tokens=0))
    (choice,) = reply["choices"]
    assert choice["message"]["content"] in ("", None)
    assert choice["finish_reason"] == "length"
    check_usage(reply["usage"], 0)


async def test_max_completion_tokens_is_the_newer_name(engine: Any) -> None:
    body = chat(engine, max_completion_tokens=3)
    del body["max_tokens"]
    assert (await engine.ok(CHAT, body))["usage"]["completion_tokens"] == 3


async def test_chat_takes_the_ids_of_its_prompt(engine: Any) -> None:
    body = chat(engine, tools=[TOOL])
    ids = (await engine.driver.tokenize_chat(body)).tokens
    plain = await engine.ok(CHAT, body)
    given = await engine.ok(CHAT, {**body, "input_ids": ids})
    assert given["choices"][0]["message"] == plain["choices"][0]["message"]
    assert given["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] == len(ids)
    cached = given["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == (len(ids) - 1) // 16 * 16


async def test_history_with_tools_renders_and_is_found_again(engine: Any) -> None:
    body = chat(engine, tools=[TOOL], max_tokens=24)
    first = await engine.ok(CHAT, body)
    call = {"name": "look", "arguments": '{"path": "a.txt"}'}
    calls = [{"id": "call_1", "type": "function", "function": call}]
    body["messages"] += [
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "forty-two"},
    ]
    second = await engine.ok(CHAT, body)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"] // 16 * 16
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]


async def test_an_answer_that_comes_back_as_history_is_cached(engine: Any) -> None:
    body = chat(engine, max_tokens=40)
    first = await engine.ok(CHAT, body)
    body["messages"] += [first["choices"][0]["message"], {"role": "user", "content": "go on"}]
    second = await engine.ok(CHAT, body)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    # The last token that was generated has no KV, and the last page of all need not be full.
    assert first["usage"]["total_tokens"] - 1 - 16 < cached <= first["usage"]["total_tokens"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_cached_tokens_by_where_they_were(engine: Any, streamed: bool) -> None:
    body = chat(engine, return_cached_tokens_details=True, stream=streamed)
    cold = await engine.ask("POST", CHAT, body)
    assert not any("sglext" in reply for reply in (cold.events if streamed else [cold.json()]))
    answer = await engine.ask("POST", CHAT, body)
    reply = answer.events[-1] if streamed else answer.json()
    details = reply["sglext"]["cached_tokens_details"]
    assert details.pop("device") > 0
    assert details == {"host": 0, "storage": 0, "storage_backend": "HandoffStore"}


async def test_a_text_completion(engine: Any) -> None:
    body = {"model": "tiny", "prompt": engine.text(40), "max_tokens": 6, "ignore_eos": True}
    reply = await engine.ok(COMPLETE, {**body, "temperature": 0})
    assert reply.keys() == {"id", "object", "created", "model", "choices", "usage", "metadata"}
    assert reply["object"] == "text_completion"
    (choice,) = reply["choices"]
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason", "matched_stop"}
    assert choice["finish_reason"] == "length"
    check_usage(reply["usage"], 6)
    ids = (await engine.driver.tokenize_prompt(body["prompt"])).tokens
    assert reply["usage"]["prompt_tokens"] == len(ids)
    same = await engine.ok(COMPLETE, {**body, "temperature": 0, "prompt": ids})
    assert same["choices"][0]["text"] == choice["text"]


async def test_a_streamed_text_completion(engine: Any) -> None:
    body = {"model": "tiny", "prompt": engine.text(40), "max_tokens": 6, "ignore_eos": True}
    body |= {"temperature": 0, "stream_options": {"include_usage": True}}
    whole = await engine.ok(COMPLETE, body)
    events = (await engine.ask("POST", COMPLETE, {**body, "stream": True})).events
    usage = events.pop()
    assert usage["choices"] == []
    check_usage(usage["usage"], 6)
    assert {event["object"] for event in events} == {"text_completion"}
    assert "".join(e["choices"][0]["text"] for e in events) == whole["choices"][0]["text"]
    reasons = [e["choices"][0]["finish_reason"] for e in events]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) <= {None}


async def test_several_prompts_in_one_completion(engine: Any) -> None:
    prompts = [engine.ids(20), engine.ids(30)]
    body = {"model": "tiny", "prompt": prompts, "max_tokens": 3, "ignore_eos": True}
    reply = await engine.ok(COMPLETE, body)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert reply["usage"]["prompt_tokens"] == 50
    assert reply["usage"]["completion_tokens"] == 6


async def test_a_default_of_sixteen_tokens(engine: Any) -> None:
    reply = await engine.ok(COMPLETE, {"prompt": engine.ids(20), "ignore_eos": True})
    assert reply["usage"]["completion_tokens"] == 16


async def test_tokenize_says_what_the_prompt_will_be(engine: Any) -> None:
    for extra in ({}, {"tools": [TOOL]}, {"chat_template_kwargs": {"unheard_of": True}}):
        body = chat(engine, **extra)
        told = await engine.driver.tokenize_chat(body)
        assert told.max_model_len_tokens == engine.max_context_tokens
        reply = await engine.ok(CHAT, body)
        assert reply["usage"]["prompt_tokens"] == len(told.tokens)
    raw = await engine.ok("/v1/tokenize", {"prompt": ["one two", "three"]})
    assert raw["count"] == [len(ids) for ids in raw["tokens"]]
    texts = (await engine.ok("/v1/detokenize", {"tokens": raw["tokens"]}))["text"]
    assert texts == ["one two", "three"]


async def test_tools_that_may_not_be_used_are_not_rendered(engine: Any) -> None:
    body = chat(engine, tools=[TOOL])
    offered = await engine.driver.tokenize_chat(body)
    silent = await engine.driver.tokenize_chat({**body, "tool_choice": "none"})
    assert len(silent.tokens) < len(offered.tokens)
    reply = await engine.ok(CHAT, {**body, "tool_choice": "none"})
    assert reply["usage"]["prompt_tokens"] == len(silent.tokens)


async def test_priority_is_accepted(engine: Any) -> None:
    for priority in (-5, 0, 7):
        await engine.ok(CHAT, chat(engine, priority=priority))
