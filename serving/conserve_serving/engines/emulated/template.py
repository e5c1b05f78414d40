"""The chat template: messages and tools to token ids, in the manner of ChatML.

Every piece of text is a segment tokenized on its own, and an assistant message from the history
renders to exactly the ids it was generated with. So a conversation's next prompt begins with the
previous prompt's ids followed by the output's ids, tool calls included.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from typing import Any, Final

from conserve_serving.engines.emulated import tokenizer as tk
from conserve_serving.engines.emulated.errors import ApiError
from conserve_serving.engines.emulated.protocol import Message, Tool

#: Roles SGLang accepts (case-insensitive).
ROLES: Final = (
    "system",
    "user",
    "assistant",
    "tool",
    "function",
    "developer",
    "latest_reminder",
    "root",
)
#: Tokens a media part counts for; fixed, since the emulated engine does not look at pixels.
MEDIA_TOKENS: Final = {"image": 256, "audio": 512, "video": 2048, "file": 1024}
_MEDIA_KINDS: Final = {
    "image_url": "image",
    "image": "image",
    "input_image": "image",
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "video",
    "file": "file",
}
_NEWLINE: Final = tk.encode("\n")
_CALL_TAIL: Final = tk.encode("}\n")


def call_head(name: str) -> str:
    """What a tool call's text begins with, up to its arguments."""
    return '\n{"name": ' + json.dumps(name, ensure_ascii=False) + ', "arguments": '


def canonical_arguments(arguments: Any) -> str:
    """Arguments as this engine writes them.

    Clients parse and re-serialize tool arguments before they send the history back; parsing and
    writing them again in one form makes the ids independent of that.
    """
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return str(arguments)  # cut by max_tokens: as it was
    return json.dumps({} if arguments is None else arguments, ensure_ascii=False)


class ChatTemplate:
    """Renders conversations. Holds no state but the memory of segments already tokenized."""

    def __init__(self, segments: tk.SegmentCache | None = None) -> None:
        self._segments = segments or tk.SegmentCache()

    def encode(self, text: str) -> array[int]:
        """One segment's ids; not to be changed by the caller."""
        return self._segments.encode(text)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        continue_final_message: bool = False,
    ) -> array[int]:
        """The prompt's ids, ending where the assistant is to speak.

        Args:
            messages: the conversation; at least one.
            tools: offered tools, described in the first (system) block.
            continue_final_message: leave a final assistant message open instead of a new one.

        Raises:
            ApiError: 400; an unknown role or kind of content part, named.
        """
        ids = array("I")
        start = 0
        if tools:
            lead = ""
            if messages[0].role.lower() in ("system", "developer", "root"):
                lead = text_of(messages[0].content) + "\n\n"
                start = 1
            self._open(ids, "system")
            ids += self.encode(lead + _describe(tools))
            self._close(ids)
        last = len(messages) - 1
        for index in range(start, len(messages)):
            message = messages[index]
            self._message(ids, message, where=f"messages[{index}]")
            if index == last and continue_final_message and message.role.lower() == "assistant":
                return ids
            self._close(ids)
        self._open(ids, "assistant")
        return ids

    def assistant_body(self, content: str, calls: Sequence[tuple[str, str]]) -> array[int]:
        """The ids of an assistant message between its role line and its end."""
        ids = array("I")
        if content:
            ids += self.encode(content)
        for name, arguments in calls:
            ids.append(tk.TOOL_CALL)
            ids += tk.encode(call_head(name))
            ids += self.encode(arguments)
            ids += _CALL_TAIL
            ids.append(tk.TOOL_CALL_END)
        return ids

    @staticmethod
    def _open(ids: array[int], role: str) -> None:
        ids.append(tk.IM_START)
        ids += tk.encode(role + "\n")

    @staticmethod
    def _close(ids: array[int]) -> None:
        ids.append(tk.IM_END)
        ids += _NEWLINE

    def _message(self, ids: array[int], message: Message, *, where: str) -> None:
        role = message.role.lower()
        if role not in ROLES:
            allowed = ", ".join(repr(known) for known in ROLES)
            raise ApiError(
                f"{where}: 'role' must be one of {allowed} (case-insensitive), not "
                f"{message.role!r}.",
                param="messages",
            )
        if role == "assistant":
            self._open(ids, role)
            calls = [
                (call.function.name or "", canonical_arguments(call.function.arguments))
                for call in message.tool_calls or ()
            ]
            ids += self.assistant_body(text_of(message.content), calls)
        elif role in ("tool", "function"):
            self._open(ids, "user")
            ids.append(tk.TOOL_RESPONSE)
            self._content(ids, message.content, where=where)
            ids.append(tk.TOOL_RESPONSE_END)
        else:
            self._open(ids, role)
            self._content(ids, message.content, where=where)

    def _content(self, ids: array[int], content: Any, *, where: str) -> None:
        if content is None:
            return
        if isinstance(content, str):
            ids += self.encode(content)
            return
        for place, part in enumerate(content):
            kind = part.get("type")
            if kind == "text" and isinstance(part.get("text"), str):
                ids += self.encode(part["text"])
            elif isinstance(kind, str) and kind in _MEDIA_KINDS:
                data = json.dumps(part, sort_keys=True).encode("utf-8", "surrogatepass")
                digest = hashlib.blake2b(data, digest_size=4).digest()
                pad = tk.media_pad(int.from_bytes(digest, "big"))
                ids.append(tk.MEDIA_START)
                ids += array("I", [pad]) * MEDIA_TOKENS[_MEDIA_KINDS[kind]]
                ids.append(tk.MEDIA_END)
            else:
                raise ApiError(
                    f"{where}.content[{place}]: unknown part {kind!r}; send 'text' (with a string "
                    f"'text') or one of {', '.join(sorted(_MEDIA_KINDS))}.",
                    param="messages",
                )


def text_of(content: Any) -> str:
    """The text of a message's content, media parts left out."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(
        part["text"]
        for part in content
        if part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _describe(tools: Sequence[Tool]) -> str:
    lines = "\n".join(
        json.dumps(
            {
                "name": tool.function.name,
                "description": tool.function.description,
                "parameters": tool.function.parameters,
            },
            ensure_ascii=False,
        )
        for tool in tools
    )
    return f"# Tools\n\nYou may call these functions:\n<tools>\n{lines}\n</tools>"
