"""Counting a prompt's tokens before anybody has tokenized it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, runtime_checkable

from conserve_agents import wire
from conserve_agents.errors import GatewayError, TokenCountError
from conserve_agents.gateway import Gateway
from conserve_agents.logs import warn_once
from conserve_agents.turns import Prompt

#: Mean of three modern tokenizers on code and prose, within 8 % (docs/clients/README.md).
BYTES_PER_TOKEN: Final = 4
#: What chat templates put around a message: role, start and end markers (4 tokens in ChatML).
BYTES_PER_MESSAGE: Final = 16
#: A picture, sound or file costs what the model's encoder makes of it, whatever its bytes; 765 is
#: OpenAI's price of a 1024 × 1024 picture in high detail.
TOKENS_PER_ATTACHMENT: Final = 765
_ATTACHMENTS: Final = frozenset({"image_url", "input_image", "input_audio", "file", "input_file"})


@runtime_checkable
class TokenCounter(Protocol):
    """Counts the first turn of a conversation. Must be safe to call from several threads."""

    @property
    def name(self) -> str:
        """Goes into the header: ``bytes/4``, ``server``, ``hf:<name>`` …"""

    @property
    def blocking(self) -> bool:
        """Whether counting does I/O; then async clients call it on a worker thread."""

    def count(self, prompt: Prompt, tools: Sequence[Any] | None) -> int:
        """Tokens of the prompt with its tool schemas. Raises TokenCountError."""


class BytesTokenCounter:
    """UTF-8 bytes / 4 over the texts of all messages and the tool schemas.

    Against real tokenizers: code +8 %, prose +3 %, JSON −15 %, tool schemas −8 %, Chinese −8 %,
    Russian +60 %, hexadecimal −72 %. The gateway corrects it.
    """

    name = "bytes/4"
    blocking = False

    def count(self, prompt: Prompt, tools: Sequence[Any] | None) -> int:
        """See :class:`TokenCounter`; accepts anything and never fails on an odd message."""
        size_bytes = _utf8_bytes(prompt) if isinstance(prompt, str) else 0
        if not isinstance(prompt, str):
            size_bytes = sum(_text_bytes(m) + BYTES_PER_MESSAGE for m in prompt)
        if tools:
            schemas = json.dumps(
                tools, ensure_ascii=False, separators=(",", ":"), default=str, skipkeys=True
            )
            size_bytes += _utf8_bytes(schemas)
        return max(1, -(-size_bytes // BYTES_PER_TOKEN))


class ServerTokenCounter:
    """The served model's own tokenizer and chat template, through ``POST /v1/tokenize``.

    Exact, at the price of one request per conversation.

    Args:
        gateway: whom to ask; None: the gateway at ``CONSERVE_BASE_URL``.
        model: whose tokenizer; None: the gateway's default.
    """

    name = "server"
    blocking = True

    def __init__(self, gateway: Gateway | None = None, *, model: str | None = None) -> None:
        self._gateway: Final = gateway or Gateway()
        self._model: Final = model

    def count(self, prompt: Prompt, tools: Sequence[Any] | None) -> int:
        """See :class:`TokenCounter`. Raises TokenCountError when the gateway cannot be asked."""
        try:
            return self._gateway.count_tokens(
                prompt if isinstance(prompt, str) else chat_messages(prompt),
                tools=chat_tools(tools) if tools else None,
                model=self._model,
            )
        except GatewayError as error:
            raise TokenCountError(f"the server's tokenizer: {error}") from error


class FirstTurn:
    """The length of a conversation's first turn: counted once, then frozen. Thread-safe.

    Args:
        value: tokens and who counted them, where that was done elsewhere.
    """

    __slots__ = ("_lock", "frozen", "value")

    def __init__(self, value: tuple[int, str] | None = None) -> None:
        self.value = value
        self.frozen = value is not None
        self.renew_lock()

    def renew_lock(self) -> None:
        """In a forked process: the old lock may be held by a thread that is not there."""
        self._lock = threading.Lock()

    def freeze(
        self, prompt: Prompt | None, tools: Sequence[Any] | None, counter: TokenCounter | None
    ) -> tuple[int, str] | None:
        """Tokens and who counted them, counted now if they were not yet; None of no prompt."""
        if not self.frozen:
            with self._lock:
                if not self.frozen:
                    if prompt is not None:
                        self.value = count_first_turn(prompt, tools, counter)
                    self.frozen = True
        return self.value

    def thaw(self) -> None:
        """The first turn failed: the next one will be counted."""
        self.frozen = False


def count_first_turn(
    prompt: Prompt, tools: Sequence[Any] | None, counter: TokenCounter | None
) -> tuple[int, str]:
    """Tokens of a first turn and who counted them. Never raises: bytes / 4 stands in.

    A prompt that already is token ids needs no counter (``token-ids``).
    """
    if not isinstance(prompt, str) and prompt and all(isinstance(part, int) for part in prompt):
        return len(prompt), "token-ids"
    if counter is not None:
        try:
            return _usable(counter.count(prompt, tools), counter.name)
        except Exception as error:  # noqa: BLE001 - anybody's code; a call must survive it
            warn_once("count", "first turn counted as bytes/4, for the counter failed: %r", error)
    fallback = BytesTokenCounter()
    return fallback.count(prompt, tools), fallback.name


def _usable(tokens: int, name: str) -> tuple[int, str]:
    """What a counter said, if it can be sent: the gateway refuses a header that is no number."""
    if not isinstance(tokens, int) or not 0 <= tokens < 10**9 or not wire.is_legal_id(name):
        raise TokenCountError(f"counter {name!r} said {tokens!r}: expected a number of tokens")
    return tokens, name


def texts_of(message: Any) -> tuple[list[str], int]:
    """The texts in a message or item, however nested, and how many attachments it has.

    Keys, numbers and structure are not text: a template renders them as markers.
    """
    texts: list[str] = []
    return texts, _collect(message, texts)


def _text_bytes(message: Any) -> int:
    texts, attachments = texts_of(message)
    return sum(map(_utf8_bytes, texts)) + attachments * TOKENS_PER_ATTACHMENT * BYTES_PER_TOKEN


def _utf8_bytes(text: str) -> int:
    # Whether a string is ASCII is known to it: most of a history is never encoded.
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _collect(value: Any, texts: list[str]) -> int:
    """Append the texts to ``texts``; returns the number of attachments."""
    if isinstance(value, str):
        texts.append(value)
        return 0
    if isinstance(value, dict) or isinstance(value, Mapping):  # noqa: SIM101 - the first is quick
        kind = value.get("type")
        if isinstance(kind, str) and kind in _ATTACHMENTS:
            return 1
        attachments = 0
        for key, part in value.items():
            if key not in _NOT_TEXT:
                if isinstance(part, str):
                    texts.append(part)
                elif part is not None:
                    attachments += _collect(part, texts)
        return attachments
    if isinstance(value, bytes | int | float) or value is None:
        return 0
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        return _collect(dump(), texts)
    if isinstance(value, Iterable):
        return sum(_collect(v, texts) for v in value)
    return 0


def chat_messages(prompt: Sequence[Any]) -> list[Any]:
    """Messages as chat templates know them, from messages or from Responses items."""
    return [_chat_message(item) for item in prompt]


def chat_tools(tools: Sequence[Any]) -> list[Any]:
    """Tool schemas as chat templates know them, from those of either API."""
    return [
        {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        if isinstance(tool, Mapping) and tool.get("type") == "function" and "name" in tool
        else tool
        for tool in tools
    ]


def _chat_message(item: Any) -> Any:
    if not isinstance(item, Mapping):
        dump = getattr(item, "model_dump", None)
        item = dump(exclude_none=True) if callable(dump) else item
    if not isinstance(item, Mapping):
        return item
    if item.get("type") == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if item.get("type") == "function_call_output":
        return {
            "role": "tool",
            "tool_call_id": item.get("call_id"),
            "content": item.get("output"),
        }
    content = item.get("content")
    if isinstance(content, list | tuple):
        parts = [
            {"type": "text", "text": part["text"]}
            if isinstance(part, Mapping)
            and part.get("type") in ("input_text", "output_text")
            and "text" in part
            else part
            for part in content
        ]
        item = {**item, "content": parts}
    if item.get("type") == "message":
        item = {name: value for name, value in item.items() if name in ("role", "content")}
    return item


#: Structure rather than text: a template renders these as a marker, counted per message.
_NOT_TEXT: Final = frozenset(
    {"role", "type", "id", "tool_call_id", "call_id", "status", "encrypted_content"}
)
