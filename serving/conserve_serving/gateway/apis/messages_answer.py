"""Answers of the Anthropic Messages API, and its form of errors."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Raw

from conserve_serving.gateway.apis.chat import Answer, Block, event
from conserve_serving.gateway.errors import ApiError

_ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_STOP_REASONS: Final = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}


class _Wrapped(msgspec.Struct):
    error: Raw


class _Message(msgspec.Struct):
    message: str = "the request failed"


class MessagesAnswer(Answer):
    """One answer of the Messages API.

    Args:
        id: of the message.
        model: as the client named it.
        thinks: whether thinking blocks are passed on.
        stops: the client's stop sequences.
    """

    def __init__(self, *, id: str, model: str, thinks: bool, stops: tuple[str, ...]) -> None:
        super().__init__()
        self.id = id
        self._model = model
        self._thinks = thinks
        self._stops = stops
        self._shown = 0

    def on_begin(self) -> bytes:
        """See `Answer`."""
        return event("message_start", {"type": "message_start", "message": self._message([])})

    def on_open(self, block: Block) -> bytes:
        """See `Answer`."""
        if not self._shows(block):
            return b""
        empty: dict[str, Any]
        if block.kind == "call":
            empty = {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}
        elif block.kind == "text":
            empty = {"type": "text", "text": ""}
        else:
            empty = {"type": "thinking", "thinking": "", "signature": ""}
        return self._block_event("content_block_start", content_block=empty)

    def on_delta(self, block: Block, text: str) -> bytes:
        """See `Answer`."""
        if not self._shows(block):
            return b""
        if block.kind == "call":
            delta = {"type": "input_json_delta", "partial_json": text}
        elif block.kind == "text":
            delta = {"type": "text_delta", "text": text}
        else:
            delta = {"type": "thinking_delta", "thinking": text}
        return self._block_event("content_block_delta", delta=delta)

    def on_close(self, block: Block) -> bytes:
        """See `Answer`."""
        if not self._shows(block):
            return b""
        out = self._block_event("content_block_stop")
        self._shown += 1
        return out

    def on_complete(self) -> bytes:
        """See `Answer`."""
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        last = {"type": "message_delta", "delta": delta, "usage": self._usage()}
        return event("message_delta", last) + event("message_stop", {"type": "message_stop"})

    def on_error(self, error: ApiError) -> bytes:
        """See `Answer`."""
        return b"event: error\ndata: " + error_body(error.status, error.body()) + b"\n\n"

    def whole(self) -> bytes:
        """See `Answer`."""
        content: list[dict[str, Any]] = []
        for block in self.blocks:
            if not self._shows(block):
                continue
            if block.kind == "call":
                content.append(
                    {
                        "type": "tool_use",
                        "id": block.id,
                        "name": block.name,
                        "input": _arguments(block.text),
                    }
                )
            elif block.kind == "text":
                content.append({"type": "text", "text": block.text})
            else:
                content.append({"type": "thinking", "thinking": block.text, "signature": ""})
        message = self._message(content)
        message["stop_reason"], message["stop_sequence"] = self._stop()
        return msgspec.json.encode(message)

    def error_body(self, status: int, body: bytes) -> bytes:
        """See `Answer`."""
        return error_body(status, body)

    def _shows(self, block: Block) -> bool:
        return block.kind != "reasoning" or self._thinks

    def _block_event(self, kind: str, **fields: Any) -> bytes:
        return event(kind, {"type": kind, "index": self._shown, **fields})

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        counts = self.counts
        return {
            "input_tokens": counts.input_tokens - counts.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": counts.cached_tokens,
            "output_tokens": counts.output_tokens,
        }

    def _stop(self) -> tuple[str, str | None]:
        if self.finish == "stop" and self.matched_stop in self._stops:
            return "stop_sequence", self.matched_stop
        return _STOP_REASONS.get(self.finish or "stop", "end_turn"), None


def _arguments(text: str) -> Any:
    """A call's input. Arguments that are no JSON object reach the tool under a name it refuses."""
    if not text.strip():
        return {}
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        value = None
    return Raw(text.encode()) if isinstance(value, dict) else {"unparsable_arguments": text}


def error_body(status: int, body: bytes) -> bytes:
    """An error of OpenAI's form in Anthropic's."""
    try:
        inner = msgspec.json.decode(body, type=_Wrapped).error
        message = msgspec.json.decode(inner, type=_Message).message
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        message = body[:500].decode("utf-8", "replace") or "the request failed"
    kind = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return msgspec.json.encode(
        {"type": "error", "error": {"type": kind, "message": message}, "request_id": None}
    )
