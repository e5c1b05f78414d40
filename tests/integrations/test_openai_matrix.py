"""The OpenAI clients in every way of calling, through the real gateway, one attempt refused."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from conserve_agents import ServerTokenCounter, conversation, wire
from conserve_agents.openai import AsyncConServeOpenAI, ConServeOpenAI

#: Turns of the loop below: two tools called one after the other, an answer, a second answer.
TURNS = 4


def schemas(tools: Any) -> list[Any]:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return [
        {
            "type": "function",
            "function": {
                "name": tool.__name__,
                "description": tool.__doc__,
                "parameters": parameters,
                "strict": True,  # openai 2's streaming helper wants it
            },
        }
        for tool in tools
    ]


def results(message: Any, tools: Any) -> list[Any]:
    """The assistant's message, and what its tool calls give."""
    named = {tool.__name__: tool for tool in tools}
    answers = [
        {
            "role": "tool",
            "tool_call_id": call.id,
            "content": named[call.function.name](**json.loads(call.function.arguments)),
        }
        for call in message.tool_calls or ()
    ]
    return [message.model_dump(exclude_none=True), *answers]


def create(client: ConServeOpenAI, **call: Any) -> Any:
    return client.chat.completions.create(**call).choices[0].message


def create_raw(client: ConServeOpenAI, **call: Any) -> Any:
    return client.chat.completions.with_raw_response.create(**call).parse().choices[0].message


def create_with_options(client: ConServeOpenAI, **call: Any) -> Any:
    return client.with_options(timeout=30).chat.completions.create(**call).choices[0].message


def stream(client: ConServeOpenAI, **call: Any) -> Any:
    with client.chat.completions.stream(**call) as events:
        return events.get_final_completion().choices[0].message


@pytest.mark.parametrize("ask", [create, create_raw, create_with_options, stream])
def test_sync(ask: Any, case: Any) -> None:
    case.proxy.refuse(1, 3)
    messages: list[Any] = [{"role": "user", "content": case.question}]
    with ConServeOpenAI(base_url=case.proxy.base_url) as client, conversation():
        for _ in range(TURNS):
            message = ask(client, model=case.model, messages=messages, tools=schemas(case.tools))
            messages += results(message, case.tools)
            if not message.tool_calls:
                messages.append({"role": "user", "content": case.follow_up})
    case.served_as_one(turns=TURNS)


def test_an_answer_that_was_lost_is_not_another_turn(case: Any) -> None:
    case.proxy.lose(1, 3)
    messages: list[Any] = [{"role": "user", "content": case.question}]
    client = ConServeOpenAI(base_url=case.proxy.base_url, max_retries=0)
    with client, conversation():
        for _ in range(2):
            call = {"model": case.model, "messages": messages}
            with pytest.raises(openai.APIConnectionError):
                create(client, **call)
            messages += results(create(client, **call), case.tools)
            messages.append({"role": "user", "content": case.follow_up})
    served = case.served_as_one(turns=2)
    assert served.seen["state"] == "ended"


async def acreate(client: AsyncConServeOpenAI, **call: Any) -> Any:
    return (await client.chat.completions.create(**call)).choices[0].message


async def astream(client: AsyncConServeOpenAI, **call: Any) -> Any:
    async with client.chat.completions.stream(**call) as events:
        return (await events.get_final_completion()).choices[0].message


@pytest.mark.parametrize("ask", [acreate, astream])
async def test_async(ask: Any, case: Any) -> None:
    case.proxy.refuse(2, 3)
    messages: list[Any] = [{"role": "user", "content": case.question}]
    async with AsyncConServeOpenAI(base_url=case.proxy.base_url) as client, conversation():
        for _ in range(TURNS):
            call = {"model": case.model, "messages": messages, "tools": schemas(case.tools)}
            message = await ask(client, **call)
            messages += results(message, case.tools)
            if not message.tool_calls:
                messages.append({"role": "user", "content": case.follow_up})
    case.served_as_one(turns=TURNS)


# --- the Responses API -----------------------------------------------------------------------


def flat(tools: Any) -> list[Any]:
    """Tool schemas as the Responses API has them."""
    return [{"type": "function", **schema["function"]} for schema in schemas(tools)]


def outputs(response: Any, tools: Any) -> list[Any]:
    """What the tool calls of a response give."""
    named = {tool.__name__: tool for tool in tools}
    return [
        {
            "type": "function_call_output",
            "call_id": item.call_id,
            "output": named[item.name](**json.loads(item.arguments)),
        }
        for item in response.output
        if item.type == "function_call"
    ]


def respond(client: ConServeOpenAI, **call: Any) -> Any:
    return client.responses.create(**call)


def respond_streaming(client: ConServeOpenAI, **call: Any) -> Any:
    with client.responses.stream(**call) as events:
        return events.get_final_response()


@pytest.mark.parametrize("chained", [False, True], ids=["history", "previous_response_id"])
@pytest.mark.parametrize("ask", [respond, respond_streaming])
def test_responses(ask: Any, chained: bool, case: Any) -> None:
    case.proxy.refuse(1, 3)
    items: list[Any] = [{"role": "user", "content": case.question}]
    call: dict[str, Any] = {"model": case.model, "tools": flat(case.tools)}
    call["instructions"] = "Answer in short sentences."
    with ConServeOpenAI(base_url=case.proxy.base_url) as client, conversation():
        for _ in range(TURNS):
            response = ask(client, input=items, **call)
            results = outputs(response, case.tools)
            new = results or [{"role": "user", "content": case.follow_up}]
            if chained:
                items, call["previous_response_id"] = new, response.id
            else:
                items = [*items, *(i.to_dict(mode="json") for i in response.output), *new]
    case.served_as_one(turns=TURNS)


async def test_async_responses(case: Any) -> None:
    case.proxy.refuse(2)
    items: list[Any] = [{"role": "user", "content": case.question}]
    async with AsyncConServeOpenAI(base_url=case.proxy.base_url) as client, conversation():
        for _ in range(TURNS):
            call = {"model": case.model, "input": items, "tools": flat(case.tools)}
            async with client.responses.stream(**call) as events:
                response = await events.get_final_response()
            items += [item.to_dict(mode="json") for item in response.output]
            items += outputs(response, case.tools) or [{"role": "user", "content": case.follow_up}]
    case.served_as_one(turns=TURNS)


def test_the_servers_own_count_is_exact(case: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": case.question}]
    counter = ServerTokenCounter(case.gateway)
    client = ConServeOpenAI(base_url=case.proxy.base_url, token_counter=counter)
    with client, conversation():
        for _ in range(2):
            message = create(client, model=case.model, messages=messages)
            messages += [message.model_dump(exclude_none=True), {"role": "user", "content": "?"}]
    served = case.served_as_one(turns=2)
    counted = served.seen["recent_turns"][0]["prompt_tokens"]
    assert {call.tag(wire.FIRST_TURN_TOKENS) for call in case.proxy.calls} == {str(counted)}
    assert {call.tag(wire.TOKEN_COUNTER) for call in case.proxy.calls} == {"server"}
