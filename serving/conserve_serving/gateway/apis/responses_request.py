"""OpenAI Responses requests, translated to chat completions.

Ignored because they change nothing here: ``include``, ``truncation``, ``service_tier``,
``prompt_cache_*``, ``text.verbosity``, ``reasoning.summary``, ``user`` and everything the gateway
has not heard of. An offer of web search is ignored too, as nobody here can run it and a model that
is not told of it does not miss it. A custom tool, which takes text instead of JSON, is offered as a
function of one string. Refused: what would change the answer.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from conserve_serving.gateway.apis.items import CUSTOM_INPUT, ITEMS, chat_messages
from conserve_serving.gateway.apis.request import (
    Message,
    check_effort,
    decode,
    function,
    given,
    is_list,
    is_string,
    refuse,
)
from conserve_serving.gateway.errors import InvalidRequestError, quoted
from conserve_serving.gateway.request import IdentityFields, decode_body

_SEARCHES: Final = ("web_search", "web_search_preview", "web_search_2025_08_26")


class _Tool(msgspec.Struct):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: Raw | UnsetType = UNSET
    strict: bool | None = None


#: What a custom tool is offered with.
_ONE_TEXT: Final = {
    "type": "object",
    "properties": {CUSTOM_INPUT: {"type": "string"}},
    "required": [CUSTOM_INPUT],
}


class _Format(msgspec.Struct):
    type: str
    name: str = "output"
    schema: Raw | UnsetType = UNSET
    strict: bool | None = None


class _Text(msgspec.Struct):
    format: _Format | None = None


class _Reasoning(msgspec.Struct):
    effort: str | None = None


class _Request(IdentityFields):
    model: str | None = None
    input: Raw | UnsetType = UNSET
    instructions: Raw | UnsetType = UNSET
    previous_response_id: str | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    tools: list[_Tool] | None = None
    tool_choice: Raw | UnsetType = UNSET
    parallel_tool_calls: bool | None = None
    text: _Text | None = None
    reasoning: _Reasoning | None = None
    prompt: Raw | UnsetType = UNSET
    context_management: Raw | UnsetType = UNSET
    truncation: str | None = None


class _Choice(msgspec.Struct):
    type: str
    name: str | None = None
    mode: str | None = None


class _Id(msgspec.Struct):
    id: str


_REQUEST: Final = msgspec.json.Decoder(_Request)
_CHOICE: Final = msgspec.json.Decoder(_Choice)
_CONVERSATION: Final = msgspec.json.Decoder(str | _Id)
_TEXT: Final = msgspec.json.Decoder(str)
_ANY: Final = msgspec.json.Decoder()
#: Fields of a request that a response repeats.
_ECHOED: Final = ("instructions", "metadata", "tool_choice")


class ResponsesRequest(msgspec.Struct, frozen=True):
    """A Responses request and the chat completion it means.

    Attributes:
        fields: of the chat completion, but for its messages.
        opening: messages before the history: the instructions, which are not remembered.
        new: messages that this request adds.
        custom: names of the custom tools.
        echo: what the response repeats of the request.
    """

    fields: Message
    opening: list[Message]
    new: list[Message]
    identity: dict[str, Raw]
    stream: bool
    store: bool
    previous: str | None
    conversation: str | None
    custom: frozenset[str]
    echo: dict[str, Any]


def parse_responses(body: bytes | bytearray) -> ResponsesRequest:
    """Read a Responses request.

    Raises:
        InvalidRequestError: not JSON, a field missing, of the wrong type or not supported here.
    """
    asked = decode_body(body, _REQUEST)
    _refuse(asked)
    if not asked.model:
        raise InvalidRequestError("model is missing: name the served model", param="model")
    conversation = _conversation(asked.conversation)
    if conversation is not None and asked.previous_response_id is not None:
        raise InvalidRequestError(
            "conversation and previous_response_id exclude each other: send one",
            param="previous_response_id",
        )
    fields: Message = {"model": asked.model}
    tools = _tools(asked, fields)
    for name, value in (
        ("temperature", asked.temperature),
        ("top_p", asked.top_p),
        ("max_completion_tokens", asked.max_output_tokens),
        ("parallel_tool_calls", asked.parallel_tool_calls),
    ):
        if value is not None:
            fields[name] = value
    _format(asked, fields)
    effort = None if asked.reasoning is None else asked.reasoning.effort
    check_effort(effort, "reasoning.effort")
    if effort is not None:
        fields["reasoning_effort"] = effort
    if asked.stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    echo: dict[str, Any] = {
        name: value for name in _ECHOED if given(value := getattr(asked, name))
    } | {
        "tools": tools,
        "text": _echoed_format(asked.text),
        "reasoning": {"effort": effort, "summary": None},
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "max_output_tokens": asked.max_output_tokens,
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "store": asked.store is not False,
    }
    if conversation is not None:
        echo["conversation"] = {"id": conversation}
    return ResponsesRequest(
        fields=fields,
        opening=_instructions(asked.instructions),
        new=_input(asked.input),
        identity=asked.identity(),
        stream=bool(asked.stream),
        store=asked.store is not False,
        previous=asked.previous_response_id,
        conversation=conversation,
        custom=frozenset(tool["name"] for tool in tools if tool["type"] == "custom"),
        echo=echo,
    )


def _refuse(asked: _Request) -> None:
    if asked.background:
        raise refuse("background", "leave it out and stream the response")
    if given(asked.prompt):
        raise refuse("prompt", "send the prompt's text as instructions")
    if given(asked.context_management):
        raise refuse("context_management", "compact the input on the client")
    if asked.top_logprobs:
        raise refuse("top_logprobs", "leave it out")
    limit = asked.max_output_tokens
    if limit is not None and limit < 1:
        raise InvalidRequestError("max_output_tokens must be at least 1", param="max_output_tokens")


def _input(value: Raw | UnsetType) -> list[Message]:
    if is_string(value):
        return [{"role": "user", "content": value}]
    if not isinstance(value, Raw) or not is_list(value):
        raise InvalidRequestError("input must be text or a list of items", param="input")
    return chat_messages(decode(value, ITEMS, "input"))


def _instructions(value: Raw | UnsetType) -> list[Message]:
    if not isinstance(value, Raw) or not given(value):
        return []
    if is_string(value):
        return [{"role": "system", "content": value}]
    return chat_messages(decode(value, ITEMS, "instructions"), "instructions")


def _conversation(value: Raw | UnsetType) -> str | None:
    if not isinstance(value, Raw) or not given(value):
        return None
    named = decode(value, _CONVERSATION, "conversation")
    return named if isinstance(named, str) else named.id


def _tools(asked: _Request, fields: Message) -> list[dict[str, Any]]:
    """Put tools and the choice among them into ``fields``; returns those offered, for the echo."""
    offered: list[dict[str, Any]] = []
    echoed: list[dict[str, Any]] = []
    for number, tool in enumerate(asked.tools or ()):
        where = f"tools[{number}]"
        if tool.type in _SEARCHES:
            continue
        if tool.type not in ("function", "custom"):
            remedy = "declare it as a function, which the client runs"
            raise refuse(f"{where}.type", remedy, tool.type)
        if not tool.name:
            raise InvalidRequestError(f"{where}.name is missing", param=f"{where}.name")
        if tool.type == "custom":
            made = {"name": tool.name, "description": tool.description or ""}
            offered.append({"type": "function", "function": {**made, "parameters": _ONE_TEXT}})
            echoed.append({"type": "custom", **made})
            continue
        offered.append(function(tool.name, tool.description, tool.parameters, strict=tool.strict))
        echoed.append(
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters if given(tool.parameters) else None,
                "strict": bool(tool.strict),
            }
        )
    if offered:
        fields["tools"] = offered
    choice = asked.tool_choice
    if not isinstance(choice, Raw) or not given(choice):
        return echoed
    if is_string(choice):
        mode = decode(choice, _TEXT, "tool_choice")
        if mode not in ("auto", "none", "required"):
            raise InvalidRequestError(
                f"tool_choice {quoted(mode)} is unknown: send auto, none, required or a function",
                param="tool_choice",
            )
        fields["tool_choice"] = mode
        return echoed
    named = decode(choice, _CHOICE, "tool_choice")
    if named.type not in ("function", "custom") or not named.name:
        raise refuse("tool_choice.type", "name a function", named.type)
    fields["tool_choice"] = {"type": "function", "function": {"name": named.name}}
    return echoed


def _format(asked: _Request, fields: Message) -> None:
    shape = None if asked.text is None else asked.text.format
    if shape is None or shape.type == "text":
        return
    if shape.type == "json_object":
        fields["response_format"] = {"type": "json_object"}
    elif shape.type == "json_schema" and given(shape.schema):
        schema: dict[str, Any] = {"name": shape.name, "schema": shape.schema}
        if shape.strict is not None:
            schema["strict"] = shape.strict
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    else:
        raise InvalidRequestError(
            "text.format must be text, json_object, or json_schema with a schema",
            param="text.format",
        )


def _echoed_format(text: _Text | None) -> dict[str, Any]:
    shape = None if text is None else text.format
    if shape is None or shape.type != "json_schema":
        return {"format": {"type": "text" if shape is None else shape.type}}
    return {
        "format": {
            "type": "json_schema",
            "name": shape.name,
            "schema": shape.schema,
            "strict": bool(shape.strict),
        }
    }
