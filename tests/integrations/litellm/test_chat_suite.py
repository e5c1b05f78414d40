"""LiteLLM's own idea of a chat provider, against the real gateway on emulated engines.

Written after the cases of ``BaseLLMChatTest`` (``tests/llm_translation/base_llm_unit_tests.py`` in
LiteLLM's repository, which its wheel does not carry); every test names its case. Upstream most of
them are done when the call returns; here what came back is looked at too. As upstream runs them
for ``litellm.completion`` and for a Router, they run here for both and for ``acompletion``.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

litellm = pytest.importorskip("litellm", reason="LiteLLM has its own environment: test-litellm")

from pydantic import BaseModel  # noqa: E402 - as above

import litellm_conserve  # noqa: E402

Complete = Callable[..., Any]
HELLO = [{"role": "user", "content": [{"type": "text", "text": "Hello, how are you?"}]}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather in a given location",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string", "description": "The city and state"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["location"],
        },
    },
}
IN_JSON = [
    {"role": "system", "content": "Your output is a JSON object."},
    {"role": "user", "content": "Respond in JSON: city=San Francisco, state=CA, temp=60"},
]


class CalendarEvent(BaseModel):
    name: str
    date: str
    participants: list[str]


class EventsList(BaseModel):
    events: list[CalendarEvent]


class FirstResponse(BaseModel):
    first_response: str


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner
        runner.run(litellm_conserve.provider.aclose())


@pytest.fixture(params=["completion", "acompletion", "router"])
def complete(
    request: pytest.FixtureRequest, cluster: str, model_name: str, runner: asyncio.Runner
) -> Complete:
    """``completion_function``, with the base arguments; a stream comes back as its chunks."""
    litellm_conserve.register(model_name, api_base=cluster)
    deployment = {"model": f"conserve/{model_name}", "api_base": cluster}

    async def gathered(**given: Any) -> Any:
        answer = await litellm.acompletion(**deployment, **given)
        return [chunk async for chunk in answer] if given.get("stream") else answer

    def call(**given: Any) -> Any:
        if request.param == "acompletion":
            return runner.run(gathered(**given))
        if request.param == "router":
            router = litellm.Router([{"model_name": "agent", "litellm_params": deployment}])
            answer = router.completion("agent", **given)
        else:
            answer = litellm.completion(**deployment, **given)
        return list(answer) if given.get("stream") else answer

    return call


def text(answer: Any) -> str:
    content = answer.choices[0].message.content
    assert isinstance(content, str) and content
    return content


def the_call(answer: Any) -> tuple[str, dict[str, Any]]:
    """The one tool call in an answer: its name and arguments."""
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    return call.function.name, json.loads(call.function.arguments)


def test_developer_role_translation(complete: Complete) -> None:
    """The role ``developer`` is understood (here as it is, it needs no translation)."""
    assert text(complete(messages=[{"role": "developer", "content": "Be good!"}, *HELLO]))


def test_content_list_handling(complete: Complete) -> None:
    assert text(complete(messages=HELLO))


def test_tool_call_with_property_type_array(complete: Complete) -> None:
    """A property whose type is a list of types."""
    shoe = {"type": ["string", "number"], "description": "The shoe ID or name"}
    parameters = {
        "type": "object",
        "properties": {"shoe_id": shoe},
        "required": ["shoe_id"],
        "additionalProperties": False,
        "$schema": "http://json-schema.org/draft-07/schema#",
    }
    tool = {"type": "function", "function": {"name": "shoe_get_id", "parameters": parameters}}
    question = "Tell me if the shoe Air Jordan has more models than the shoe Nike."
    name, arguments = the_call(
        complete(messages=[{"role": "user", "content": question}], tools=[tool])
    )
    assert name == "shoe_get_id" and isinstance(arguments["shoe_id"], str | int | float)


def test_tool_call_with_empty_enum_property(complete: Complete) -> None:
    """An enum that has the empty string among its values."""
    modes = ["", "product_search", "product_search_with_filters"]
    parameters = {
        "type": "object",
        "properties": {"search_mode": {"type": "string", "enum": modes, "default": ""}},
        "required": ["search_mode"],
    }
    tool = {"type": "function", "function": {"name": "product_search", "parameters": parameters}}
    question = "Search for the latest phone models."
    _, arguments = the_call(
        complete(messages=[{"role": "user", "content": question}], tools=[tool])
    )
    assert arguments["search_mode"] in modes


def test_streaming(complete: Complete) -> None:
    """Chunks of one answer share a time, and make up a whole with its usage."""
    chunks = complete(messages=HELLO, stream=True)
    with_time = [chunk for chunk in chunks if chunk.choices[0].delta.content]
    assert len(with_time) > 1
    assert len({(chunk.id, chunk.created) for chunk in with_time}) == 1
    whole = litellm.stream_chunk_builder(chunks)
    assert text(whole) and whole.choices[0].finish_reason == "stop"


def test_pydantic_model_input(complete: Complete) -> None:
    assert text(complete(messages=[litellm.Message(role="user", content="Hello")]))


def test_message_with_name(complete: Complete) -> None:
    assert text(complete(messages=[{"role": "user", "content": "Hello", "name": "test_name"}]))


@pytest.mark.parametrize("kind", ["json_object", "text"])
def test_json_response_format(complete: Complete, kind: str) -> None:
    answer = text(complete(messages=IN_JSON, response_format={"type": kind}))
    if kind == "json_object":
        assert isinstance(json.loads(answer), dict)


def test_response_format_type_text_with_tool_calls_no_tool_choice(complete: Complete) -> None:
    answer = complete(
        messages=[{"role": "user", "content": "What's the weather like in Boston today?"}],
        response_format={"type": "text"},
        tools=[WEATHER],
        drop_params=True,
    )
    assert the_call(answer)[0] == "get_current_weather"


def test_response_format_type_text(server: Any, ask: dict[str, Any]) -> None:
    """It does not turn into tools (upstream asks the provider's configuration object)."""
    litellm.completion(**ask, response_format={"type": "text"})
    assert not {"tools", "tool_choice"} & set(server.calls[0].body)


def test_json_response_pydantic_obj(complete: Complete) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = complete(messages=question, response_format=FirstResponse, timeout=30)
    assert FirstResponse.model_validate_json(text(answer))
    assert answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize("as_schema", [False, True])
def test_json_response_nested_pydantic_obj(complete: Complete, as_schema: bool) -> None:
    """With ``test_json_response_nested_json_schema``: the class itself, and its schema."""
    from litellm.llms.base_llm.base_utils import (  # noqa: PLC0415 - upstream's own
        type_to_response_format_param,
    )

    format_ = type_to_response_format_param(EventsList) if as_schema else EventsList
    question = [{"role": "user", "content": "List 5 important events in the XIX century"}]
    answer = complete(messages=question, response_format=format_, timeout=60)
    assert EventsList.model_validate_json(text(answer)).events
    assert answer.choices[0].message.tool_calls is None


def test_json_response_format_stream(complete: Complete) -> None:
    chunks = complete(messages=IN_JSON, response_format={"type": "json_object"}, stream=True)
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert isinstance(json.loads(content), dict)


def test_tool_call_no_arguments(complete: Complete) -> None:
    """A tool without parameters, and a call of it without arguments in the history."""
    faq = {"type": "function", "function": {"name": "Get-FAQ", "description": "Get the FAQ"}}
    call = {"id": "call_2c38", "type": "function"}
    call["function"] = {"name": "Get-FAQ", "arguments": "{}"}  # type: ignore[assignment] # as JSON
    messages = [
        {"role": "user", "content": "Get the FAQ"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_2c38", "content": "Q: why? A: because."},
    ]
    name, arguments = the_call(complete(messages=messages[:1], tools=[faq]))
    assert (name, arguments) == ("Get-FAQ", {})
    assert text(complete(messages=messages, tools=[faq]))


@pytest.mark.parametrize("detail", [None, "low", "high"])
def test_image_url(complete: Complete, detail: str | None) -> None:
    """Pictures are let through to the model. Upstream's are on the network, this one is here."""
    pixel = base64.b64encode(b"GIF89a\1\0\1\0\0\0\0,\0\0\0\0\1\0\1\0\0\2\0;").decode()
    image = {"url": f"data:image/gif;base64,{pixel}"} | ({"detail": detail} if detail else {})
    parts = [{"type": "text", "text": "What's in it?"}, {"type": "image_url", "image_url": image}]
    assert text(complete(messages=[{"role": "user", "content": parts}]))


def test_image_url_string(complete: Complete) -> None:
    """The picture's address as a bare string: LiteLLM makes an object of it, or we do not."""
    pixel = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAACADs="
    parts = [{"type": "text", "text": "What's in it?"}, {"type": "image_url", "image_url": pixel}]
    assert text(complete(messages=[{"role": "user", "content": parts}]))


def test_prompt_caching(complete: Complete, session: str) -> None:
    """Marks for a cache are let through; what was prefilled once is not prefilled again."""
    mark = {"cache_control": {"type": "ephemeral"}}
    legal = f"Here is the full text of a complex legal agreement {session}. " * 400
    asked = {"type": "text", "text": "What are the key terms of this agreement?", **mark}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": legal, **mark}]},
        {"role": "user", "content": [asked]},
        {"role": "assistant", "content": "The contract is 1 year long for $10/mo"},
        {"role": "user", "content": [asked]},
    ]
    first, second = (complete(messages=messages, max_tokens=10) for _ in range(2))
    for usage in (first.usage, second.usage):
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert 0 < cached < second.usage.prompt_tokens
    costs = [answer._hidden_params["response_cost"] for answer in (first, second)]
    assert costs[1] <= costs[0]


def test_empty_tools(complete: Complete) -> None:
    assert text(complete(messages=HELLO, tools=[]))


def test_basic_tool_calling(complete: Complete) -> None:
    """A call, its result, an answer."""
    messages: list[Any] = [
        {"role": "user", "content": "What's the weather like in Boston today in fahrenheit?"}
    ]
    first = complete(messages=messages, tools=[WEATHER])
    name, arguments = the_call(first)
    assert name == "get_current_weather" and arguments["location"]
    messages.append(first.choices[0].message.model_dump())
    messages.append(
        {
            "role": "tool",
            "tool_call_id": first.choices[0].message.tool_calls[0].id,
            "name": name,
            "content": '{"location": "Boston", "temperature": "72", "unit": "fahrenheit"}',
        }
    )
    assert "72" in text(complete(messages=messages, tools=[WEATHER]))


def test_completion_cost(complete: Complete, model_name: str) -> None:
    """A gateway of one's own costs nothing, or what one says it does."""
    for prices in ((1e-6, 2e-6), (0.0, 0.0)):
        names = ("input_cost_per_token", "output_cost_per_token")
        litellm_conserve.register(model_name, **dict(zip(names, prices, strict=True)))
        priced = complete(messages=HELLO)
        usage = priced.usage
        expected = usage.prompt_tokens * prices[0] + usage.completion_tokens * prices[1]
        assert priced._hidden_params["response_cost"] == pytest.approx(expected)


def test_function_calling_with_tool_response(complete: Complete) -> None:
    """The same as a stream, its calls put together from their pieces."""
    parameters = {
        "$id": "https://some/internal/name",
        "$schema": "https://json-schema.org/draft-07/schema",
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    function = {"name": "get_weather", "parameters": parameters, "strict": True}
    messages: list[Any] = [{"role": "user", "content": "How is the weather in Mumbai?"}]
    pieces: dict[int, Any] = {}
    for _ in range(2):
        pieces.clear()
        answer = ""
        for chunk in complete(
            messages=messages, tools=[{"type": "function", "function": function}], stream=True
        ):
            delta = chunk.choices[0].delta
            answer += delta.content or ""
            for piece in delta.tool_calls or []:
                known = pieces.setdefault(piece.index, piece)
                if known is not piece:
                    known.function.arguments += piece.function.arguments
        for call in pieces.values():
            city = json.loads(call.function.arguments)["city"]
            result = f"City: {city}, Weather: Sunny with 34 degree Celsius"
            messages.append({"role": "assistant", "tool_calls": [call], "content": None})
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert "34 degree" in answer and len(messages) == 3


def test_reasoning_effort(server: Any, ask: dict[str, Any]) -> None:
    """It reaches the server. LiteLLM wants to be told that a custom provider takes it."""
    litellm.completion(**ask, reasoning_effort="low", allowed_openai_params=["reasoning_effort"])
    assert server.calls[0].body["reasoning_effort"] == "low"


_NO_FILES = "files are not part of what the gateway's engines serve"
_NO_SOUND = "sound is not part of what the gateway's engines serve"
_NOT_CLAIMED = {
    "test_web_search": "the gateway searches nothing on the web",
    "test_url_context": "a tool of Google's, which runs on their servers",
    "test_pdf_handling": _NO_FILES,
    "test_async_pdf_handling_with_file_id": _NO_FILES,
    "test_file_data_unit_test": _NO_FILES,
    "test_audio_input": _NO_SOUND,
    "test_supports_audio_input": _NO_SOUND,
    "test_json_response_pydantic_obj_nested_obj": "empty upstream: it asserts nothing",
}


@pytest.mark.parametrize("case", _NOT_CLAIMED)
def test_not_claimed(case: str) -> None:
    """The cases that do not apply, each with its reason."""
    pytest.skip(f"{case}: {_NOT_CLAIMED[case]}")
