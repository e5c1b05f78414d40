"""Content of the Messages API as chat messages.

Text is passed on as the JSON it came as, so equal histories stay equal byte by byte.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from conserve_serving.gateway.apis.request import (
    Message,
    call,
    decode,
    given,
    is_list,
    is_string,
    refuse,
    string,
)
from conserve_serving.gateway.errors import InvalidRequestError

#: Claude Code's note to Anthropic's billing. It differs from request to request, so as a part of
#: the prompt it would make every turn a new one.
_BILLING: Final = "x-anthropic-billing-header:"


class Block(msgspec.Struct):
    """One block, as far as it is read."""

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


class _Source(msgspec.Struct):
    type: str
    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    content: Raw | UnsetType = UNSET


BLOCKS: Final = msgspec.json.Decoder(list[Block])
_SOURCE: Final = msgspec.json.Decoder(_Source)
_TEXT: Final = msgspec.json.Decoder(str)


def system_text(system: Raw | UnsetType) -> Any:
    """The system prompt; None without one."""
    if not given(system) or not isinstance(system, Raw):
        return None
    if is_string(system):
        return system
    texts = []
    for number, block in enumerate(decode(system, BLOCKS, "system")):
        where = f"system[{number}]"
        if block.type != "text":
            raise refuse(f"{where}.type", "send text blocks", block.type)
        text = decode(string(block.text, f"{where}.text"), _TEXT, f"{where}.text")
        if not text.startswith(_BILLING):
            texts.append(text)
    return "\n\n".join(texts) if texts else None


def user_messages(role: str, blocks: list[Block], where: str) -> list[Message]:
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


def _result(block: Block, where: str) -> Any:
    content: Any = ""
    if isinstance(block.content, Raw) and is_list(block.content):
        parts: list[dict[str, Any]] = []
        for number, inner in enumerate(decode(block.content, BLOCKS, f"{where}.content")):
            parts += _parts(inner, f"{where}.content[{number}]")
        content = _simplest(parts)
    elif given(block.content):
        content = string(block.content, f"{where}.content")
    if block.is_error:  # chat completions have no field for it: the model is told in words
        if isinstance(content, Raw):
            return "[tool error] " + decode(content, _TEXT, f"{where}.content")
        if isinstance(content, list):
            return [{"type": "text", "text": "[tool error] "}, *content]
        return "[tool error]"
    return content


def _parts(block: Block, where: str) -> list[dict[str, Any]]:
    match block.type:
        case "text":
            return [{"type": "text", "text": string(block.text, f"{where}.text")}]
        case "image":
            return [_image(block, where)]
        case "document":
            return _document(block, where)
    raise refuse(f"{where}.type", "send text, image, document or tool_result blocks", block.type)


def _image(block: Block, where: str) -> dict[str, Any]:
    source = _source(block, where)
    if source.type == "base64" and source.data is not None and source.media_type:
        url = f"data:{source.media_type};base64,{source.data}"
    elif source.type == "url" and source.url:
        url = source.url
    else:
        raise refuse(f"{where}.source", 'send {"type": "base64", "media_type": …, "data": …}')
    return {"type": "image_url", "image_url": {"url": url}}


def _document(block: Block, where: str) -> list[dict[str, Any]]:
    source = _source(block, where)
    head = "".join(f"{text}\n" for text in (block.title, block.context) if text)
    parts = [{"type": "text", "text": head}] if head else []
    if source.type == "text" and source.data is not None:
        return [*parts, {"type": "text", "text": source.data}]
    if source.type == "content" and isinstance(source.content, Raw):
        if is_string(source.content):
            return [*parts, {"type": "text", "text": source.content}]
        inner = decode(source.content, BLOCKS, f"{where}.source.content")
        for number, part in enumerate(inner):
            parts += _parts(part, f"{where}.source.content[{number}]")
        return parts
    raise refuse(f"{where}.source.type", "send the document's text", source.type)


def _source(block: Block, where: str) -> _Source:
    if not isinstance(block.source, Raw):
        raise InvalidRequestError(f"{where}.source is missing", param=f"{where}.source")
    return decode(block.source, _SOURCE, f"{where}.source")


def assistant_message(blocks: list[Block], where: str) -> Message:
    """What the model said, calls included."""
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
                raise refuse(f"{at}.type", "send text, tool_use or thinking blocks", block.type)
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
