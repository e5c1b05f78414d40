"""Anthropic's own SDK against the gateway: streams, tools, counting, errors, one conversation."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from conserve_agents import Gateway

anthropic = pytest.importorskip(
    "anthropic", reason="the development environment has Anthropic's SDK, this one does not"
)

WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


@pytest.fixture
def client(cluster: str) -> Iterator[Any]:
    with anthropic.Anthropic(
        base_url=cluster.removesuffix("/v1"), api_key="conserve", max_retries=0
    ) as made:
        yield made


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_reply_at_once(client: Any, model_name: str) -> None:
    raw = client.messages.with_raw_response.create(
        model=model_name, max_tokens=40, system="Be brief.", messages=[user("hello there")]
    )
    message = raw.parse()
    assert message.stop_reason == "max_tokens"
    assert "hello there" in message.content[0].text
    assert message.usage.output_tokens == 40
    assert message.usage.input_tokens > 10
    assert raw.headers["request-id"] == message.id
    assert raw.headers["x-conserve-turn-index"] == "1"
    assert message.model == model_name


def test_events_of_a_stream_in_order(client: Any, model_name: str) -> None:
    ask = {"model": model_name, "max_tokens": 30, "messages": [user("stream this, please")]}
    whole = client.messages.create(**ask)
    with client.messages.stream(**ask) as stream:
        events = list(stream)
        final = stream.get_final_message()
        assert stream.response.headers["x-conserve-relation"] == "replay"
    kinds = [event.type for event in events if event.type != "text"]  # that one is the SDK's own
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    start = events[0].message
    assert (start.content, start.stop_reason) == ([], None)
    assert start.usage.input_tokens + start.usage.cache_read_input_tokens > 10
    assert [block.text for block in final.content] == [block.text for block in whole.content]
    assert final.stop_reason == whole.stop_reason == "max_tokens"
    total = final.usage.input_tokens + final.usage.cache_read_input_tokens
    assert total == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


@pytest.mark.parametrize("streamed", [False, True])
def test_tool_flow(client: Any, gateway: Gateway, model_name: str, streamed: bool) -> None:
    messages: list[Any] = [user(f"use get_weather for Paris ({streamed})")]

    def ask() -> tuple[Any, Any]:
        call = {"model": model_name, "max_tokens": 200, "tools": [WEATHER], "messages": messages}
        if not streamed:
            raw = client.messages.with_raw_response.create(**call)
            return raw.parse(), raw.headers
        with client.messages.stream(**call) as stream:
            return stream.get_final_message(), stream.response.headers

    first, seen = ask()
    assert first.stop_reason == "tool_use"
    (use,) = [block for block in first.content if block.type == "tool_use"]
    assert (use.name, use.input) == ("get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "21 degrees, sunny"}
    messages += [
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        user([result]),
    ]
    second, again = ask()
    assert second.stop_reason == "end_turn"
    assert "21 degrees" in second.content[0].text
    assert second.usage.cache_read_input_tokens > 0  # the history was there
    assert again["x-conserve-conversation-id"] == seen["x-conserve-conversation-id"]
    assert again["x-conserve-decode-engine"] == seen["x-conserve-decode-engine"]
    assert again["x-conserve-turn-index"] == "2"
    known = gateway.conversation(seen["x-conserve-conversation-id"])
    assert known["turns"] == 2


def test_stop_sequence_is_told(client: Any, model_name: str) -> None:
    message = client.messages.create(
        model=model_name,
        max_tokens=100,
        stop_sequences=["emulated engine"],
        messages=[user("hi")],
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "emulated engine")
    assert message.content[0].text.endswith("ConServe's ")


def test_count_tokens_agrees_with_usage(client: Any, model_name: str, english: str) -> None:
    ask: Any = {
        "model": model_name,
        "system": [{"type": "text", "text": "Count.", "cache_control": {"type": "ephemeral"}}],
        "tools": [WEATHER],
        "messages": [user(english)],
    }
    counted = client.messages.count_tokens(**ask)
    usage = client.messages.create(max_tokens=5, **ask).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert counted.input_tokens > 1000


def test_images_system_prefill_and_what_is_ignored(client: Any, model_name: str) -> None:
    picture = {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}
    message = client.messages.create(
        model=model_name,
        max_tokens=10,
        extra_body={"temperature": 0.5, "top_k": 5, "prompt_of_tomorrow": {"x": 1}},
        thinking={"type": "disabled"},
        metadata={"user_id": "someone"},
        service_tier="auto",
        messages=[
            user(
                [
                    {"type": "text", "text": "what is it?", "cache_control": {"type": "ephemeral"}},
                    {"type": "image", "source": picture},
                ]
            ),
            {"role": "assistant", "content": "It is"},
        ],
    )
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens > 256  # the picture's tokens
    assert message.content[0].type == "text"


def test_structured_output(client: Any, model_name: str) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "string"}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    message = client.messages.create(
        model=model_name,
        max_tokens=200,
        output_config={"format": {"type": "json_schema", "schema": schema}},
        messages=[user("answer in JSON")],
    )
    assert '"answer"' in message.content[0].text


def test_models_are_listed_for_this_sdk_too(client: Any, model_name: str) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.type) == (model_name, "model")
    assert client.models.retrieve(model_name).display_name == model_name


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": "other"}, "NotFoundError", "is not served here"),
        ({"max_tokens": 0}, "BadRequestError", "max_tokens"),
        ({"messages": []}, "BadRequestError", "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "BadRequestError", "messages[0].role"),
        (
            {"messages": [user([{"type": "server_tool_use", "id": "a", "name": "b"}])]},
            "BadRequestError",
            "messages[0].content[0].type 'server_tool_use' is not supported here",
        ),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "BadRequestError",
            "tools[0].type 'web_search_20250305'",
        ),
        ({"tool_choice": {"type": "tool", "name": "none"}}, "BadRequestError", "Tool"),
    ],
)
def test_errors_have_the_apis_own_form(
    client: Any, model_name: str, change: dict[str, Any], error: str, says: str
) -> None:
    call = {"model": model_name, "max_tokens": 5, "messages": [user("hi")], **change}
    with pytest.raises(getattr(anthropic, error)) as raised:
        client.messages.create(**call)
    assert raised.value.body["type"] == "error"
    assert says in raised.value.body["error"]["message"]


async def test_async_client_in_parallel(cluster: str, model_name: str) -> None:
    async with anthropic.AsyncAnthropic(
        base_url=cluster.removesuffix("/v1"), api_key="conserve", max_retries=0
    ) as client:

        async def one(number: int) -> str:
            async with client.messages.stream(
                model=model_name, max_tokens=40, messages=[user(f"number {number}")]
            ) as stream:
                return "".join([text async for text in stream.text_stream])

        texts = await asyncio.gather(*map(one, range(8)))
    assert all(f"number {number}" in text for number, text in enumerate(texts))
