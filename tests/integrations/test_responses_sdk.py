"""OpenAI's own SDK against the gateway's Responses API: streams, tools, what is stored."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from conserve_agents import Gateway

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
    "strict": False,
}
IDENTITY = "x-conserve-identity-source"
CONVERSATION = "x-conserve-conversation-id"


@pytest.fixture
def client(cluster: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster, api_key="conserve", max_retries=0) as made:
        yield made


def test_reply_at_once(client: openai.OpenAI, model_name: str) -> None:
    raw = client.responses.with_raw_response.create(
        model=model_name,
        input="hello there",
        instructions="Be brief.",
        max_output_tokens=40,
        metadata={"topic": "greetings"},
    )
    response = raw.parse()
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert "hello there" in response.output_text
    assert response.usage is not None
    assert response.usage.output_tokens == 40
    assert response.usage.total_tokens == response.usage.input_tokens + 40
    assert response.instructions == "Be brief."
    assert response.metadata == {"topic": "greetings"}
    assert raw.headers["x-request-id"] == response.id
    assert raw.headers["x-conserve-turn-index"] == "1"


def test_events_of_a_stream_in_order(client: openai.OpenAI, model_name: str) -> None:
    ask: Any = {"model": model_name, "input": "stream this, please"}
    whole = client.responses.create(**ask)
    events = list(client.responses.create(**ask, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final: Any = events[-1]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == final.response.output_text == whole.output_text
    assert final.response.usage.output_tokens == whole.usage.output_tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("streamed", [False, True])
def test_tool_flow_by_previous_response(
    client: openai.OpenAI, gateway: Gateway, model_name: str, streamed: bool
) -> None:
    ask: Any = {"model": model_name, "tools": [WEATHER]}

    def call(**more: Any) -> Any:
        if not streamed:
            return client.responses.create(**ask, **more)
        with client.responses.stream(**ask, **more) as stream:
            for event in stream:
                assert event.type != "response.failed"
            return stream.get_final_response()

    first = call(input=f"use get_weather for Paris ({streamed})")
    (item,) = [item for item in first.output if item.type == "function_call"]
    assert (item.name, item.arguments) == ("get_weather", '{"city": "Paris"}')
    output = {"type": "function_call_output", "call_id": item.call_id, "output": "21 degrees"}
    second = call(previous_response_id=first.id, input=[output])
    assert "21 degrees" in second.output_text
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens_details.cached_tokens > 0  # the history was there
    assert second.usage.input_tokens > first.usage.total_tokens
    stored = client.responses.retrieve(second.id)
    assert stored.output_text == second.output_text


def test_previous_response_names_the_conversation(client: openai.OpenAI, model_name: str) -> None:
    create: Any = client.responses.with_raw_response.create
    first = create(model=model_name, input="one")
    second = create(model=model_name, input="two", previous_response_id=first.parse().id)
    third = create(model=model_name, input="three", previous_response_id=second.parse().id)
    assert second.headers[IDENTITY] == third.headers[IDENTITY] == "previous_response"
    assert {r.headers[CONVERSATION] for r in (second, third)} == {first.headers[CONVERSATION]}
    assert third.headers["x-conserve-relation"] == "extend"
    assert third.headers["x-conserve-turn-index"] == "3"
    # Going back to an earlier response and on from there is a branch.
    branch = create(model=model_name, input="other", previous_response_id=first.parse().id)
    assert branch.headers[CONVERSATION] != first.headers[CONVERSATION]
    assert branch.headers["x-conserve-relation"] == "fork"


def test_resending_everything_is_the_same_conversation(
    client: openai.OpenAI, model_name: str
) -> None:
    """Stateless, as Codex works: ``store: false`` and the whole input each time."""
    items: list[Any] = [{"role": "user", "content": "use get_weather for the city Rome, unstored"}]
    homes, ids = set(), set()
    for turn in range(3):
        raw = client.responses.with_raw_response.create(
            model=model_name, input=items, tools=[WEATHER], store=False
        )
        response = raw.parse()
        homes.add(raw.headers["x-conserve-decode-engine"])
        ids.add(raw.headers[CONVERSATION])
        assert raw.headers[IDENTITY] == "lineage"
        assert raw.headers["x-conserve-turn-index"] == str(turn + 1)
        items += [item.model_dump(exclude_none=True) for item in response.output]
        calls = [item for item in response.output if item.type == "function_call"]
        items += [
            {"type": "function_call_output", "call_id": item.call_id, "output": "warm"}
            for item in calls
        ] or [{"role": "user", "content": [{"type": "input_text", "text": f"and {turn}?"}]}]
    assert len(homes) == len(ids) == 1
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_conversation_object(client: openai.OpenAI, gateway: Gateway, model_name: str) -> None:
    made = client.conversations.create(
        items=[{"role": "user", "content": "remember: my name is Ada"}], metadata={"a": "b"}
    )
    assert client.conversations.retrieve(made.id).metadata == {"a": "b"}
    assert client.conversations.update(made.id, metadata={"c": "d"}).metadata == {"c": "d"}
    prompts = []
    for text in ("first", "second"):
        raw = client.responses.with_raw_response.create(
            model=model_name, input=text, conversation=made.id
        )
        assert raw.headers[CONVERSATION] == made.id
        assert raw.headers[IDENTITY] == "body:conversation"
        response = raw.parse()
        assert response.conversation is not None and response.conversation.id == made.id
        assert response.usage is not None
        prompts.append(response.usage.input_tokens)
    assert prompts[1] > prompts[0] + 30  # the first answer is in the second prompt
    assert gateway.conversation(made.id)["turns"] == 2
    assert client.conversations.delete(made.id).deleted
    assert gateway.conversation(made.id)["state"] == "ended"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=model_name, input="third", conversation=made.id)


def test_custom_tool_is_a_function_of_one_text(client: openai.OpenAI, model_name: str) -> None:
    tool: Any = {"type": "custom", "name": "apply_patch", "description": "Apply a patch."}
    ask: Any = {"model": model_name, "tools": [tool], "tool_choice": "required"}
    with client.responses.stream(**ask, input="apply_patch to the file a.py") as stream:
        kinds = [event.type for event in stream]
        response: Any = stream.get_final_response()
    assert "response.custom_tool_call_input.done" in kinds
    (item,) = response.output
    assert (item.type, item.name) == ("custom_tool_call", "apply_patch")
    assert item.input and not item.input.startswith("{")
    output: Any = {"type": "custom_tool_call_output", "call_id": item.call_id, "output": "done"}
    ask["tool_choice"] = "auto"
    final = client.responses.create(**ask, previous_response_id=response.id, input=[output])
    assert "done" in final.output_text


class City(BaseModel):
    name: str
    people: int


def test_structured_output(client: openai.OpenAI, model_name: str) -> None:
    response = client.responses.parse(model=model_name, input="the city Rome", text_format=City)
    assert isinstance(response.output_parsed, City)


def test_retrieve_delete_cancel(client: openai.OpenAI, model_name: str) -> None:
    response = client.responses.create(model=model_name, input="keep this")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(response.id)
    client.responses.delete(response.id)
    for gone in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="not stored here"):
            gone(response.id)
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(model=model_name, input="x", previous_response_id=response.id)
    assert raised.value.code == "previous_response_not_found"


def test_what_is_stored_is_of_one_tenant(
    client: openai.OpenAI, cluster: str, model_name: str
) -> None:
    response = client.responses.create(model=model_name, input="a secret")
    with openai.OpenAI(base_url=cluster, api_key="other", max_retries=0) as other:
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(response.id)
        with pytest.raises(openai.BadRequestError):
            other.responses.create(model=model_name, input="x", previous_response_id=response.id)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type 'item_reference'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "input[0].content[0].type 'input_file'",
        ),
        ({"background": True}, "background"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "code_interpreter", "container": "x"}]}, "tools[0].type"),
        ({"conversation": "a", "previous_response_id": "b"}, "previous_response_id"),
    ],
)
def test_what_is_refused_is_named(
    client: openai.OpenAI, model_name: str, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(**{"model": model_name, "input": "hi", **change})
    assert param in str(raised.value)
    assert raised.value.param is not None and raised.value.param.startswith(
        param.split(" ", maxsplit=1)[0]
    )


async def test_async_client_in_parallel(cluster: str, model_name: str) -> None:
    async with openai.AsyncOpenAI(base_url=cluster, api_key="conserve", max_retries=0) as client:

        async def one(number: int) -> str:
            async with client.responses.stream(
                model=model_name, input=f"number {number}"
            ) as stream:
                return (await stream.get_final_response()).output_text

        texts = await asyncio.gather(*map(one, range(8)))
    assert all(f"number {number}" in text for number, text in enumerate(texts))
