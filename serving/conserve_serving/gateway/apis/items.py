"""Items of the Responses API as chat messages.

A run of the model's items (reasoning, text, calls) is one assistant message, as it was when the
model said it. Text is passed on as the JSON it came as.
"""

from __future__ import annotations

from collections.abc import Sequence
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

#: The one argument of a custom tool, as the model sees it.
CUSTOM_INPUT: Final = "input"
_CALLS: Final = ("function_call", "custom_tool_call")
_OUTPUTS: Final = ("function_call_output", "custom_tool_call_output")
_ROLES: Final = {"user": "user", "assistant": "assistant", "system": "system"} | {
    "developer": "system"  # what models served here know it as
}
_TEXTS: Final = ("input_text", "output_text", "text", "summary_text")


class Item(msgspec.Struct):
    """One item, as far as it is read."""

    type: str | None = None
    role: str | None = None
    content: Raw | UnsetType = UNSET
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: Raw | UnsetType = UNSET


class _Part(msgspec.Struct):
    type: str
    text: Raw | UnsetType = UNSET
    refusal: Raw | UnsetType = UNSET
    image_url: str | None = None
    detail: str | None = None
    filename: str | None = None


ITEMS: Final = msgspec.json.Decoder(list[Item])
_PARTS: Final = msgspec.json.Decoder(list[_Part])
_TEXT: Final = msgspec.json.Decoder(str)


def chat_messages(items: Sequence[Item], where: str = "input") -> list[Message]:
    """The chat messages that a list of input items stands for.

    Args:
        items: as `ITEMS` reads them.
        where: the field they are in, for errors.

    Raises:
        InvalidRequestError: an item is malformed or of a kind that is not supported; names it.
    """
    messages: list[Message] = []
    said: Message | None = None  # the assistant message that is being put together
    for number, item in enumerate(items):
        at = f"{where}[{number}]"
        kind = item.type or ("message" if item.role else None)
        if kind == "message" and item.role != "assistant":
            said = None
            messages.append(_message(item, at))
            continue
        if kind in _OUTPUTS:
            said = None
            messages.append(_output(item, at))
            continue
        if kind not in ("message", "reasoning", *_CALLS):
            if kind is None:
                raise InvalidRequestError(f"{at}.type is missing", param=f"{at}.type")
            raise refuse(
                f"{at}.type",
                "send messages, reasoning, calls of functions and custom tools, and their outputs",
                kind,
            )
        # Text or reasoning after a call begins another message of the model.
        if said is None or ("tool_calls" in said and kind not in _CALLS):
            said = {"role": "assistant", "content": None}
            messages.append(said)
        if kind == "message":
            text = _content(item.content, at)
            if said["content"] is not None:
                said = {"role": "assistant", "content": None}
                messages.append(said)
            said["content"] = text
        elif kind in _CALLS:
            if not item.call_id or not item.name:
                raise InvalidRequestError(f"{at} needs a call_id and a name", param=at)
            arguments = item.arguments or "{}"
            if kind == "custom_tool_call":
                arguments = msgspec.json.encode({CUSTOM_INPUT: item.input or ""}).decode()
            made = call(item.call_id, item.name, arguments)
            said.setdefault("tool_calls", []).append(made)
        elif (thought := _reasoning(item, at)) is not None:
            said["reasoning_content"] = said.get("reasoning_content", "") + thought
    return [m for m in messages if m.get("content") is not None or "tool_calls" in m]


def _message(item: Item, where: str) -> Message:
    role = _ROLES.get(item.role or "")
    if role is None:
        raise InvalidRequestError(
            f"{where}.role must be one of {', '.join(_ROLES)}", param=f"{where}.role"
        )
    return {"role": role, "content": _content(item.content, where)}


def _output(item: Item, where: str) -> Message:
    if not item.call_id:
        raise InvalidRequestError(f"{where}.call_id is missing", param=f"{where}.call_id")
    content = _content(item.output, where, field="output")
    return {"role": "tool", "tool_call_id": item.call_id, "content": content}


def _reasoning(item: Item, where: str) -> str | None:
    """What the model thought, where it is readable; summaries and other vendors' seals are not."""
    if not given(item.content) or not isinstance(item.content, Raw):
        return None
    parts = decode(item.content, _PARTS, f"{where}.content")
    texts = [part.text for part in parts if part.type == "reasoning_text" and is_string(part.text)]
    return "".join(decode(text, _TEXT, where) for text in texts if isinstance(text, Raw)) or None


def _content(content: Raw | UnsetType, where: str, *, field: str = "content") -> Any:
    where = f"{where}.{field}"
    if is_string(content):
        return content
    if not isinstance(content, Raw) or not is_list(content):
        raise InvalidRequestError(f"{where} must be text or a list of parts", param=where)
    parts = [
        _part(part, f"{where}[{number}]")
        for number, part in enumerate(decode(content, _PARTS, where))
    ]
    if not parts:
        return ""
    # One text as such, which is the same bytes whichever way the client wrote it.
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _part(part: _Part, where: str) -> dict[str, Any]:
    if part.type in _TEXTS:
        return {"type": "text", "text": string(part.text, f"{where}.text")}
    if part.type == "refusal":
        return {"type": "text", "text": string(part.refusal, f"{where}.refusal")}
    if part.type == "input_image" and part.image_url:
        image = {"url": part.image_url}
        if part.detail in ("low", "high", "auto"):
            image["detail"] = part.detail
        return {"type": "image_url", "image_url": image}
    if part.type == "input_image":
        raise refuse(f"{where}.file_id", "send the picture in image_url, as a data: URL")
    raise refuse(f"{where}.type", "send input_text or input_image parts", part.type)
