"""Answers of the OpenAI Responses API: the response object and its typed events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from conserve_serving.gateway.apis.chat import Answer, Block, event
from conserve_serving.gateway.errors import ApiError

_INCOMPLETE: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}
_PREFIX: Final = {"reasoning": "rs", "text": "msg", "call": "fc"}


class _Wrapped(msgspec.Struct):
    error: dict[str, Any]


class ResponsesAnswer(Answer):
    """One answer of the Responses API.

    Args:
        id: of the response.
        model: as the client named it.
        created_s: seconds since the epoch.
        custom: names of custom tools, whose calls carry text. It is known when it is whole.
        echo: what it repeats of the request.
        on_whole: told of the whole answer, and its JSON, before the client sees its end.
    """

    def __init__(
        self,
        *,
        id: str,
        model: str,
        created_s: int,
        custom: frozenset[str],
        echo: dict[str, Any],
        on_whole: Callable[[ResponsesAnswer, bytes], None],
    ) -> None:
        super().__init__()
        self.id = id
        self._model = model
        self._created_s = created_s
        self._custom = custom
        self._echo = echo
        self._on_whole = on_whole
        self._number = 0

    def items(self) -> list[dict[str, Any]]:
        """The output items."""
        return [self._item(block, self._status(block)) for block in self.blocks]

    def on_begin(self) -> bytes:
        """See `Answer`."""
        response = self._response("in_progress", [])
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def on_open(self, block: Block) -> bytes:
        """See `Answer`."""
        item = self._item(block, "in_progress", empty=True)
        out = self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind != "call":
            part = self._part(block, "")
            out += self._block_event("response.content_part.added", block, part=part)
        return out

    def on_delta(self, block: Block, text: str) -> bytes:
        """See `Answer`."""
        if block.name in self._custom:
            return b""
        if block.kind == "call":
            return self._block_event("response.function_call_arguments.delta", block, delta=text)
        if block.kind == "text":
            return self._block_event("response.output_text.delta", block, delta=text, logprobs=[])
        return self._block_event("response.reasoning_text.delta", block, delta=text)

    def on_close(self, block: Block) -> bytes:
        """See `Answer`."""
        text = block.text
        if block.name in self._custom:
            kind, text = "response.custom_tool_call_input", _input(text)
            out = self._block_event(f"{kind}.delta", block, delta=text)
            out += self._block_event(f"{kind}.done", block, input=text)
        elif block.kind == "call":
            kind = "response.function_call_arguments.done"
            out = self._block_event(kind, block, arguments=text, name=block.name)
        else:
            if block.kind == "text":
                done = self._block_event("response.output_text.done", block, text=text, logprobs=[])
            else:
                done = self._block_event("response.reasoning_text.done", block, text=text)
            part = self._part(block, text)
            out = done + self._block_event("response.content_part.done", block, part=part)
        item = self._item(block, self._status(block))
        return out + self._event("response.output_item.done", output_index=block.index, item=item)

    def on_complete(self) -> bytes:
        """See `Answer`."""
        body = self.whole()
        status = "incomplete" if self.finish in _INCOMPLETE else "completed"
        return self._event(f"response.{status}", response=msgspec.Raw(body))

    def on_error(self, error: ApiError) -> bytes:
        """See `Answer`."""
        response = self._response("failed", self.items())
        response["error"] = {"code": "server_error", "message": error.message}
        return self._event("response.failed", response=response)

    def whole(self) -> bytes:
        """See `Answer`."""
        reason = _INCOMPLETE.get(self.finish or "")
        response = self._response("incomplete" if reason else "completed", self.items())
        if reason:
            response["incomplete_details"] = {"reason": reason}
        counts = self.counts
        response["usage"] = {
            "input_tokens": counts.input_tokens,
            "input_tokens_details": {
                "cached_tokens": counts.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": counts.output_tokens,
            "output_tokens_details": {"reasoning_tokens": counts.reasoning_tokens or 0},
            "total_tokens": counts.input_tokens + counts.output_tokens,
        }
        body = msgspec.json.encode(response)
        self._on_whole(self, body)
        return body

    def error_body(self, status: int, body: bytes) -> bytes:
        """Errors have OpenAI's form already; prompts are called input here."""
        del status
        try:
            error = msgspec.json.decode(body, type=_Wrapped).error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return body
        if error.get("param") == "messages":
            error["param"] = "input"
        return msgspec.json.encode({"error": error})

    def _status(self, block: Block) -> str:
        cut = self.finish in _INCOMPLETE and block is self.blocks[-1]
        return "incomplete" if cut else "completed"

    # --- pieces -------------------------------------------------------------------------------
    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event(kind, {"type": kind, "sequence_number": number, **fields})

    def _block_event(self, kind: str, block: Block, **fields: Any) -> bytes:
        where: dict[str, Any] = {"item_id": self._id(block), "output_index": block.index}
        if block.kind != "call":
            where["content_index"] = 0
        return self._event(kind, **where, **fields)

    def _id(self, block: Block) -> str:
        return f"{_PREFIX[block.kind]}_{self.id.partition('_')[2]}{block.index}"

    def _part(self, block: Block, text: str) -> dict[str, Any]:
        if block.kind == "text":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "reasoning_text", "text": text}

    def _item(self, block: Block, status: str, *, empty: bool = False) -> dict[str, Any]:
        id, text = self._id(block), "" if empty else block.text
        if block.name in self._custom:
            return {
                "type": "custom_tool_call",
                "id": id,
                "call_id": block.id,
                "name": block.name,
                "input": "" if empty else _input(text),
                "status": status,
            }
        if block.kind == "call":
            return {
                "type": "function_call",
                "id": id,
                "call_id": block.id,
                "name": block.name,
                "arguments": text,
                "status": status,
            }
        content = [] if empty else [self._part(block, text)]
        if block.kind == "text":
            return {
                "type": "message",
                "id": id,
                "role": "assistant",
                "status": status,
                "content": content,
            }
        return {"type": "reasoning", "id": id, "summary": [], "content": content, "status": status}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": self._model,
            "output": output,
            "service_tier": "default",
            "tool_choice": "auto",
            "top_logprobs": 0,
            "truncation": "disabled",
            "usage": None,
            "user": None,
            **self._echo,
        }


class _Custom(msgspec.Struct):
    input: str


def _input(arguments: str) -> str:
    """The text of a custom tool's call; what the model wrote, where it kept to no form."""
    try:
        return msgspec.json.decode(arguments, type=_Custom).input
    except msgspec.DecodeError:
        return arguments
