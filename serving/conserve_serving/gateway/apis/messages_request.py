"""Anthropic Messages requests, translated to chat completions.

Text is passed on as the JSON it came as, so equal histories stay equal byte by byte. Ignored
because they change nothing here: ``cache_control``, ``service_tier``, ``metadata`` (but for
identity) and everything the gateway has not heard of. Refused: what would change the answer.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from conserve_serving.gateway.apis.request import (
    Message,
    call,
    decode,
    function,
    given,
    is_list,
    is_string,
    refuse,
    string,
    thinks,
    translated,
)
from conserve_serving.gateway.errors import InvalidRequestError
from conserve_serving.gateway.request import IdentityFields, Original, TurnRequest, decode_body

#: Claude Code's note to Anthropic's billing. It differs from request to request, so as a part of
#: the prompt it would make every turn a new one.
_BILLING: Final = "x-anthropic-billing-header:"
_ROLES: Final = ("user", "assistant", "system")


class _Block(msgspec.Struct):
    type: str
    text: Raw | UnsetType = UNSET
    source: Raw | UnsetType = UNSET
    title: str | None = None
    context: str | None = None
    id: str | None = None
    name: str | None = None
    input: Raw | UnsetType = UNSET
    tool_use_id: str | None = None
    content: Raw | UnsetType = UNSET
    is_error: bool | None = None
    thinking: Raw | UnsetType = UNSET


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


class _Source(msgspec.Struct):
    type: str
    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    content: Raw | UnsetType = UNSET


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
_BLOCKS: Final = msgspec.json.Decoder(list[_Block])
_SOURCE: Final = msgspec.json.Decoder(_Source)
_TEXT: Final = msgspec.json.Decoder(str)


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
    thinks(fields, output.effort)
    # Who does not ask for thinking does not expect his tokens to be spent on it.
    thinking = asked.thinking is not None and asked.thinking.type != "disabled"
    fields["chat_template_kwargs"] = {"enable_thinking": thinking}
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
    system = _system(asked.system)
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
            blocks = decode(content, _BLOCKS, where)
            if message.role == "assistant":
                messages.append(_assistant(blocks, where))
            else:
                messages += _user(message.role, blocks, where)
        else:
            raise InvalidRequestError(f"{where} must be text or a list of blocks", param=where)
    return messages


def _system(system: Raw | UnsetType) -> Any:
    if not given(system) or not isinstance(system, Raw):
        return None
    if is_string(system):
        return system
    texts = []
    for number, block in enumerate(decode(system, _BLOCKS, "system")):
        where = f"system[{number}]"
        if block.type != "text":
            raise refuse(f"{where}.type {block.type!r}", "send text blocks")
        text = decode(string(block.text, f"{where}.text"), _TEXT, f"{where}.text")
        if not text.startswith(_BILLING):
            texts.append(text)
    return "\n\n".join(texts) if texts else None


def _user(role: str, blocks: list[_Block], where: str) -> list[Message]:
    """Tool results become messages of their own, before what the user says."""
    results: list[Message] = []
    parts: list[dict[str, Any]] = []
    for number, block in enumerate(blocks):
        at = f"{where}[{number}]"
        if block.type == "tool_result":
            if not block.tool_use_id:
                raise InvalidRequestError(f"{at}.tool_use_id is missing", param=at)
            content = _result(block, at)
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        else:
            parts += _parts(block, at)
    if parts or not results:
        results.append({"role": role, "content": _simplest(parts)})
    return results


def _result(block: _Block, where: str) -> Any:
    content: Any = ""
    if isinstance(block.content, Raw) and is_list(block.content):
        parts: list[dict[str, Any]] = []
        for number, inner in enumerate(decode(block.content, _BLOCKS, f"{where}.content")):
            parts += _parts(inner, f"{where}.content[{number}]")
        content = _simplest(parts)
    elif given(block.content):
        content = string(block.content, f"{where}.content")
    if block.is_error:  # chat completions have no field for it: the model is told in words
        if isinstance(content, Raw):
            return "[tool error] " + decode(content, _TEXT, f"{where}.content")
        note = [{"type": "text", "text": "[tool error] "}]
        return [*note, *content] if isinstance(content, list) else note
    return content


def _parts(block: _Block, where: str) -> list[dict[str, Any]]:
    match block.type:
        case "text":
            return [{"type": "text", "text": string(block.text, f"{where}.text")}]
        case "image":
            return [_image(block, where)]
        case "document":
            return _document(block, where)
    raise refuse(f"{where}.type {block.type!r}", "send text, image, document or tool_result blocks")


def _image(block: _Block, where: str) -> dict[str, Any]:
    source = _source(block, where)
    if source.type == "base64" and source.data is not None and source.media_type:
        url = f"data:{source.media_type};base64,{source.data}"
    elif source.type == "url" and source.url:
        url = source.url
    else:
        raise refuse(f"{where}.source", 'send {"type": "base64", "media_type": …, "data": …}')
    return {"type": "image_url", "image_url": {"url": url}}


def _document(block: _Block, where: str) -> list[dict[str, Any]]:
    source = _source(block, where)
    head = "".join(f"{text}\n" for text in (block.title, block.context) if text)
    parts = [{"type": "text", "text": head}] if head else []
    if source.type == "text" and source.data is not None:
        return [*parts, {"type": "text", "text": source.data}]
    if source.type == "content" and isinstance(source.content, Raw):
        if is_string(source.content):
            return [*parts, {"type": "text", "text": source.content}]
        inner = decode(source.content, _BLOCKS, f"{where}.source.content")
        for number, part in enumerate(inner):
            parts += _parts(part, f"{where}.source.content[{number}]")
        return parts
    raise refuse(f"{where}.source.type {source.type!r}", "send the document's text")


def _source(block: _Block, where: str) -> _Source:
    if not isinstance(block.source, Raw):
        raise InvalidRequestError(f"{where}.source is missing", param=f"{where}.source")
    return decode(block.source, _SOURCE, f"{where}.source")


def _assistant(blocks: list[_Block], where: str) -> Message:
    texts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for number, block in enumerate(blocks):
        at = f"{where}[{number}]"
        match block.type:
            case "text":
                texts.append({"type": "text", "text": string(block.text, f"{at}.text")})
            case "tool_use":
                if not block.id or not block.name:
                    raise InvalidRequestError(f"{at} needs an id and a name", param=at)
                arguments = bytes(block.input).decode() if isinstance(block.input, Raw) else "{}"
                calls.append(call(block.id, block.name, arguments))
            case "thinking":
                if is_string(block.thinking):
                    thoughts.append(decode(string(block.thinking, at), _TEXT, at))
            case "redacted_thinking":
                pass  # nobody here can read it
            case _:
                raise refuse(f"{at}.type {block.type!r}", "send text, tool_use or thinking blocks")
    message: Message = {"role": "assistant", "content": _simplest(texts) if texts else None}
    if not texts and not calls:
        message["content"] = ""
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _simplest(parts: list[dict[str, Any]]) -> Any:
    """One text as such, which is the same bytes whichever way the client wrote it."""
    if not parts:
        return ""
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


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
            f"{where}.type {tool.type!r}",
            "it is a tool of Anthropic's own; define one with a name and an input_schema",
        )
    if not tool.name:
        raise InvalidRequestError(f"{where}.name is missing", param=f"{where}.name")
    return function(tool.name, tool.description, tool.input_schema, strict=tool.strict)
