"""The official SDK against an engine: what it parses is what it would parse from SGLang."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather at a location.",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}},
            "required": ["location"],
        },
    },
}


@pytest.fixture
async def sdk(engine: Any) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{engine.engine.url}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


async def test_chat(sdk: AsyncOpenAI) -> None:
    reply = await sdk.chat.completions.create(
        model="whatever", messages=[{"role": "user", "content": "hi", "name": "ada"}]
    )
    assert reply.model == "whatever"
    assert reply.choices[0].finish_reason == "stop"
    assert "emulated" in (reply.choices[0].message.content or "")
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


async def test_a_stream_adds_up_to_the_reply(sdk: AsyncOpenAI) -> None:
    question: Any = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    whole = await sdk.chat.completions.create(**question)
    stream = await sdk.chat.completions.create(
        **question, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [reason for reason in reasons if reason] == ["stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("choice", ["auto", "required", "named"])
async def test_tool_calls_whole_and_streamed(sdk: AsyncOpenAI, choice: str) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    question: Any = {
        "model": "m",
        "messages": [{"role": "user", "content": "What is the weather in Paris and London?"}],
        "tools": [WEATHER],
        "tool_choice": named if choice == "named" else choice,
    }
    reply = await sdk.chat.completions.create(**question)
    assert reply.choices[0].finish_reason == "tool_calls"
    assert reply.choices[0].message.content == ""
    calls = reply.choices[0].message.tool_calls or []
    places = [json.loads(call.function.arguments)["location"] for call in calls]
    assert places == (["Paris and London"] if choice == "named" else ["Paris", "London"]) or (
        choice == "named" and len(places) == 1
    )
    assert len({call.id for call in calls}) == len(calls)
    streamed: dict[int, list[str]] = {}
    async for chunk in await sdk.chat.completions.create(**question, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            if call.id:
                assert call.index not in streamed
                streamed[call.index] = [call.id, call.function.name, ""]
            streamed[call.index][2] += call.function.arguments or ""
    assert [tuple(streamed[index]) for index in sorted(streamed)] == [
        (call.id, call.function.name, call.function.arguments) for call in calls
    ]


class Joke(BaseModel):
    setup: str
    punchline: str
    rating: int | None = None


async def test_structured_output(sdk: AsyncOpenAI) -> None:
    reply = await sdk.chat.completions.parse(
        model="m",
        messages=[{"role": "user", "content": "Tell me a joke about cats."}],
        response_format=Joke,
    )
    assert isinstance(reply.choices[0].message.parsed, Joke)
    loose = await sdk.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "Say it as JSON with 'a' and 'b' keys."}],
        response_format={"type": "json_object"},
    )
    assert set(json.loads(loose.choices[0].message.content or "")) == {"a", "b"}


async def test_stop_and_limits(sdk: AsyncOpenAI) -> None:
    question: Any = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    stopped = await sdk.chat.completions.create(**question, stop=["engine"])
    assert (stopped.choices[0].message.content or "").endswith("emulated ")
    assert stopped.choices[0].finish_reason == "stop"
    for limit in ({"max_tokens": 5}, {"max_completion_tokens": 5}):
        cut = await sdk.chat.completions.create(**question, **limit)
        assert cut.choices[0].finish_reason == "length"
        assert cut.usage is not None
        assert cut.usage.completion_tokens == 5
    long = await sdk.chat.completions.create(
        **question, max_tokens=3000, extra_body={"ignore_eos": True}
    )
    assert long.usage is not None
    assert long.usage.completion_tokens == 3000


async def test_images_and_list_content_are_accepted(sdk: AsyncOpenAI) -> None:
    parts: Any = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
    ]
    reply = await sdk.chat.completions.create(
        model="m", messages=[{"role": "user", "content": parts}]
    )
    assert "What is this?" in (reply.choices[0].message.content or "")
    assert reply.usage is not None
    assert reply.usage.prompt_tokens > 256


async def test_errors_are_the_sdks_own(sdk: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Messages cannot be empty"):
        await sdk.chat.completions.create(model="m", messages=[])
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("other")
    assert [model.id async for model in sdk.models.list()] == ["emulated"]
