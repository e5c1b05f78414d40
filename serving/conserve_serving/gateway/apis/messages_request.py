"""Anthropic Messages requests, translated to chat completions.

Ignored because they change nothing here: ``cache_control``, ``service_tier``, ``metadata`` (but for
identity) and everything the gateway has not heard of. Refused: what would change the answer.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from conserve_serving.gateway.apis.blocks import (
    BLOCKS,
    assistant_message,
    system_text,
    user_messages,
)
from conserve_serving.gateway.apis.request import (
    Message,
    check_effort,
    decode,
    function,
    given,
    is_list,
    is_string,
    refuse,
    translated,
)
from conserve_serving.gateway.errors import InvalidRequestError
from conserve_serving.gateway.request import IdentityFields, Original, TurnRequest, decode_body

_ROLES: Final = ("user", "assistant", "system")


class _Message(msgspec.Struct):
    role: str
    content: Raw | UnsetType = UNSET


class _Tool(msgspec.Struct):
    name: str | None = None
    type: str | None = None
    description: str | None = None
    input_schema: Raw | UnsetType = UNSET
    strict: bool | None = None


class _ToolChoice(msgspec.Struct):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Thinking(msgspec.Struct):
    type: str


class _Format(msgspec.Struct):
    type: str
    schema: Raw | UnsetType = UNSET


class _Output(msgspec.Struct):
    effort: str | None = None
    format: _Format | None = None


class _Request(IdentityFields):
    model: str | None = None
    messages: list[_Message] | UnsetType = UNSET
    max_tokens: int | None = None
    system: Raw | UnsetType = UNSET
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[_Tool] | None = None
    tool_choice: _ToolChoice | None = None
    thinking: _Thinking | None = None
    output_config: _Output | None = None
    output_format: _Format | None = None
    container: Raw | UnsetType = UNSET
    mcp_servers: Raw | UnsetType = UNSET


_REQUEST: Final = msgspec.json.Decoder(_Request)


class MessagesRequest(msgspec.Struct, frozen=True):
    """A Messages request and the chat completion it means.

    Attributes:
        fields: of the chat completion.
        stream: whether a stream was asked for.
        thinks: the client takes thinking blocks.
        stops: its stop sequences.
    """

    fields: Message
    identity: dict[str, Raw]
    stream: bool
    thinks: bool
    stops: tuple[str, ...]

    def turn(self) -> TurnRequest:
        """The chat completion as the gateway serves it."""
        original = Original(prompt_field="messages", identity=self.identity)
        return translated(self.fields, original)


def parse_messages(body: bytes | bytearray, *, counting: bool = False) -> MessagesRequest:
    """Read a Messages request.

    Args:
        body: the whole request body.
        counting: it is one for ``count_tokens``: nothing will be generated.

    Raises:
        InvalidRequestError: not JSON, a field missing, of the wrong type or not supported here.
    """
    asked = decode_body(body, _REQUEST)
    for name, value in (("container", asked.container), ("mcp_servers", asked.mcp_servers)):
        if given(value):
            raise refuse(name, "leave it out and run such tools on the client")
    if not isinstance(asked.messages, list) or not asked.messages:
        raise InvalidRequestError("messages is missing or empty: send a list", param="messages")
    if asked.max_tokens is None and not counting:
        raise InvalidRequestError("max_tokens is missing: send an integer", param="max_tokens")
    if asked.max_tokens is not None and asked.max_tokens < 1:
        raise InvalidRequestError("max_tokens must be at least 1", param="max_tokens")
    if not asked.model:
        raise InvalidRequestError("model is missing: name the served model", param="model")
    fields: Message = {"model": asked.model, "messages": _messages(asked)}
    if asked.messages[-1].role == "assistant":
        fields["continue_final_message"] = True
    _tools(asked, fields)
    for name in ("temperature", "top_p", "top_k"):
        if (value := getattr(asked, name)) is not None:
            fields[name] = value
    output, shape = asked.output_config or _Output(), asked.output_format
    shape = output.format or shape
    if shape is not None:
        if shape.type != "json_schema" or not given(shape.schema):
            raise refuse("output_config.format", 'send {"type": "json_schema", "schema": …}')
        schema = {"name": "output", "schema": shape.schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    check_effort(output.effort, "output_config.effort")
    if output.effort is not None:
        fields["reasoning_effort"] = output.effort
    # Who does not ask for thinking does not expect tokens to be spent on it. Some templates look
    # at the one name, some at the other.
    thinking = asked.thinking is not None and asked.thinking.type != "disabled"
    fields["chat_template_kwargs"] = {"enable_thinking": thinking, "thinking": thinking}
    if not counting:
        fields["max_completion_tokens"] = asked.max_tokens
        if asked.stop_sequences:
            fields["stop"] = asked.stop_sequences
        if asked.stream:
            # message_start says how long the prompt was, so the counts are needed at once.
            options = {"include_usage": True, "continuous_usage_stats": True}
            fields |= {"stream": True, "stream_options": options}
    return MessagesRequest(
        fields=fields,
        identity=asked.identity(),
        stream=bool(asked.stream),
        thinks=thinking,
        stops=tuple(asked.stop_sequences or ()),
    )


def _messages(asked: _Request) -> list[Message]:
    messages: list[Message] = []
    system = system_text(asked.system)
    if system is not None:
        messages.append({"role": "system", "content": system})
    for number, message in enumerate(asked.messages or ()):
        where = f"messages[{number}]"
        if message.role not in _ROLES:
            raise InvalidRequestError(
                f"{where}.role must be one of {', '.join(_ROLES)}", param=f"{where}.role"
            )
        where += ".content"
        content = message.content
        if is_string(content):
            messages.append({"role": message.role, "content": content})
        elif isinstance(content, Raw) and is_list(content):
            blocks = decode(content, BLOCKS, where)
            if message.role == "assistant":
                messages.append(assistant_message(blocks, where))
            else:
                messages += user_messages(message.role, blocks, where)
        else:
            raise InvalidRequestError(f"{where} must be text or a list of blocks", param=where)
    return messages


def _tools(asked: _Request, fields: Message) -> None:
    if asked.tools:
        fields["tools"] = [_tool(tool, f"tools[{n}]") for n, tool in enumerate(asked.tools)]
    choice = asked.tool_choice
    if choice is None:
        return
    match choice.type:
        case "auto" | "none":
            fields["tool_choice"] = choice.type
        case "any":
            fields["tool_choice"] = "required"
        case "tool" if choice.name:
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        case _:
            raise InvalidRequestError(
                "tool_choice.type must be auto, any, none, or tool with a name", param="tool_choice"
            )
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False


def _tool(tool: _Tool, where: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise refuse(
            f"{where}.type",
            "it is a tool of Anthropic's own; define one with a name and an input_schema",
            tool.type,
        )
    if not tool.name:
        raise InvalidRequestError(f"{where}.name is missing", param=f"{where}.name")
    return function(tool.name, tool.description, tool.input_schema, strict=tool.strict)
