"""A chat completion read as blocks (reasoning, text, calls), as it arrives or at once.

What the answers of the other APIs have in common: `Answer` reads the engine's events and keeps the
blocks; its subclasses say how each step looks in their API.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from conserve_serving.gateway.errors import ApiError, UpstreamError

_DONE: Final = b"[DONE]"
#: Of an incomplete event this much is kept; no event of an engine is larger.
_MAX_EVENT_BYTES: Final = 8 * 1024 * 1024

Kind = Literal["reasoning", "text", "call"]


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None
    matched_stop: Any = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class Counts(msgspec.Struct):
    """The engine's token counts."""

    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    reasoning_tokens: int | None = 0
    prompt_tokens_details: _Details | None = None

    @property
    def input_tokens(self) -> int:
        """Prompt tokens, cached ones included."""
        return max(0, self.prompt_tokens or 0)

    @property
    def output_tokens(self) -> int:
        """Tokens generated, reasoning included."""
        return max(0, self.completion_tokens or 0)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were cached; 0 where the engine does not tell."""
        details = self.prompt_tokens_details
        cached = 0 if details is None else details.cached_tokens or 0
        return min(max(cached, 0), self.input_tokens)


class _Error(msgspec.Struct):
    message: str = "the engine failed"
    code: str | int | None = None
    type: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Counts | None = None
    error: _Error | str | None = None


_CHUNK: Final = msgspec.json.Decoder(_Chunk)


@dataclass(slots=True)
class Block:
    """One piece of an answer.

    Attributes:
        index: its place among the blocks.
        call: the call's place among the calls.
        id, name: of a call.
        parts: its text (of a call: the arguments) as it arrived.
    """

    kind: Kind
    index: int
    call: int = -1
    id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


class Answer(ABC):
    """One answer in another API's form.

    Attributes:
        blocks: what has come so far.
        finish: the chat completion's finish reason.
        matched_stop: the stop string that ended it, where one did.
        counts: token counts, the latest.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.finish: str | None = None
        self.matched_stop: str | None = None
        self.counts = Counts()
        self._held = b""
        self._open: Block | None = None
        self._begun = False
        self._closed = False
        self._out: list[bytes] = []

    # --- a stream ---------------------------------------------------------------------------
    def feed(self, data: bytes) -> bytes:
        """Take what arrived of the chat completion's stream; returns what the client gets of it."""
        if self._held:
            data = self._held + data
        end = data.rfind(b"\n\n")
        self._held = data[end + 2 :] if end >= 0 else data
        if len(self._held) > _MAX_EVENT_BYTES:
            self._held = b""
            self._fail(UpstreamError("the engine sent an event that does not end"))
        if end >= 0:
            for event in data[:end].split(b"\n\n"):
                self._take(event)
        return self._taken()

    def end(self) -> bytes:
        """The stream is over; returns what is left to say."""
        if not self._closed:
            self._take(self._held)
        if not self._closed:
            self._fail(UpstreamError("the stream ended early"))
        return self._taken()

    def _taken(self) -> bytes:
        out, self._out = b"".join(self._out), []
        return out

    def _take(self, event: bytes) -> None:
        if self._closed:
            return
        for line in event.splitlines():
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == _DONE:
                    self._complete()
                elif data:
                    self._chunk(data)

    def _chunk(self, data: bytes) -> None:
        try:
            chunk = _CHUNK.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._fail(UpstreamError(f"the engine sent an event that makes no sense: {error}"))
            return
        if chunk.error is not None:
            self._fail(_failure(chunk.error))
            return
        if chunk.usage is not None:
            self.counts = chunk.usage
        if not chunk.choices:
            return
        choice, delta = chunk.choices[0], chunk.choices[0].delta
        if delta is not None:
            if delta.reasoning_content:
                self._add("reasoning", delta.reasoning_content)
            if delta.content:
                self._add("text", delta.content)
            for call in delta.tool_calls or ():
                self._add_call(call)
        self._finished(choice)

    def _finished(self, choice: _Choice) -> None:
        if choice.finish_reason is not None:
            self.finish = choice.finish_reason
            if isinstance(choice.matched_stop, str):
                self.matched_stop = choice.matched_stop

    def _add(self, kind: Kind, text: str) -> None:
        block = self._open
        if block is None or block.kind != kind:
            block = self._next(Block(kind, len(self.blocks)))
        block.parts.append(text)
        self._out.append(self.on_delta(block, text))

    def _add_call(self, call: _Call) -> None:
        function = call.function or _Function()
        block = self._open
        number = call.index
        if number is None:  # an engine that does not count: a name begins a call
            number = sum(1 for b in self.blocks if b.kind == "call") - (not function.name)
        if block is None or block.call != number:
            if any(b.call == number for b in self.blocks):
                self._fail(UpstreamError("the engine mixed the arguments of two calls"))
                return
            id = call.id or f"call_{number}"
            block = Block("call", len(self.blocks), number, id, function.name or "")
            self._next(block)
        if function.arguments and not self._closed:
            block.parts.append(function.arguments)
            self._out.append(self.on_delta(block, function.arguments))

    def _next(self, block: Block) -> Block:
        self._begin()
        self._close_block()
        self.blocks.append(block)
        self._open = block
        self._out.append(self.on_open(block))
        return block

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._out.append(self.on_begin())

    def _close_block(self) -> None:
        block, self._open = self._open, None
        if block is not None:
            self._out.append(self.on_close(block))

    def _complete(self) -> None:
        if self.finish == "abort":
            self._fail(UpstreamError("the engine aborted the turn"))
            return
        self._begin()
        self._close_block()
        self._closed = True
        self._out.append(self.on_complete())

    def _fail(self, error: ApiError) -> None:
        if not self._closed:
            self._begin()
            self._closed = True
            self._out.append(self.on_error(error))

    # --- a reply at once ----------------------------------------------------------------------
    def read(self, body: bytes) -> bytes:
        """Take a whole chat completion; returns the answer.

        Raises:
            UpstreamError: it is none.
        """
        try:
            reply = _CHUNK.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamError(f"the engine's answer makes no sense: {error}") from error
        message = reply.choices[0].message if reply.choices else None
        if message is None:
            raise UpstreamError("the engine's answer has no message")
        self.counts = reply.usage or self.counts
        if message.reasoning_content:
            self.blocks.append(Block("reasoning", 0, parts=[message.reasoning_content]))
        if message.content:
            self.blocks.append(Block("text", len(self.blocks), parts=[message.content]))
        for number, call in enumerate(message.tool_calls or ()):
            function = call.function or _Function()
            id, name = call.id or f"call_{number}", function.name or ""
            block = Block("call", len(self.blocks), number, id, name, [function.arguments or ""])
            self.blocks.append(block)
        self._finished(reply.choices[0])
        if self.finish == "abort":
            raise UpstreamError("the engine aborted the turn")
        return self.whole()

    # --- in the API's own form ----------------------------------------------------------------
    @abstractmethod
    def on_begin(self) -> bytes:
        """Events before the first block."""

    @abstractmethod
    def on_open(self, block: Block) -> bytes:
        """Events that begin a block."""

    @abstractmethod
    def on_delta(self, block: Block, text: str) -> bytes:
        """Events of a piece of a block."""

    @abstractmethod
    def on_close(self, block: Block) -> bytes:
        """Events that end a block."""

    @abstractmethod
    def on_complete(self) -> bytes:
        """Events that end the answer."""

    @abstractmethod
    def on_error(self, error: ApiError) -> bytes:
        """Events that end an answer that failed."""

    @abstractmethod
    def whole(self) -> bytes:
        """The answer as one JSON body."""

    @abstractmethod
    def error_body(self, status: int, body: bytes) -> bytes:
        """An error of OpenAI's form in this API's."""


def _failure(error: _Error | str) -> UpstreamError:
    if isinstance(error, str):
        return UpstreamError(error)
    code = None if error.code is None else str(error.code)
    return UpstreamError(error.message, code=code)


def event(kind: str, value: object) -> bytes:
    """One server-sent event."""
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"
