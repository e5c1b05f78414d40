"""Streams, in the order in which LiteLLM reads them to their end.

Of a custom provider LiteLLM takes chunks as they are (tool calls, logprobs and all), but nothing
after the first finish reason, and the usage comes after it. So finish reasons are held back until
the stream is through.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Final, Self

from litellm import ModelResponseStream


class Order:
    """Turns the SDK's chunks into LiteLLM's. Sans-I/O."""

    def __init__(self) -> None:
        self._last: Final[list[ModelResponseStream]] = []

    def put(self, chunk: Any) -> list[ModelResponseStream]:
        """A chunk arrived; what to pass on now."""
        data: dict[str, Any] = chunk.model_dump()
        choices = data.get("choices") or []
        data["choices"] = choices
        finished = [choice for choice in choices if choice.get("finish_reason")]
        if not finished:
            return [ModelResponseStream(**data)]
        ends = [{**choice, "delta": {}, "logprobs": None} for choice in finished]
        self._last.append(ModelResponseStream(**{**data, "choices": ends, "usage": None}))
        for choice in finished:
            choice["finish_reason"] = None
        if data.get("usage") or any(_content(choice.get("delta")) for choice in choices):
            return [ModelResponseStream(**data)]
        return []

    def end(self) -> list[ModelResponseStream]:
        """The stream is through; what is left to pass on."""
        return self._last


class Chunks(Iterator[ModelResponseStream]):
    """A stream that was opened, as LiteLLM wants it.

    Args:
        stream: the SDK's.
        guard: a context manager per read, which maps what reading raises.
    """

    def __init__(self, stream: Any, guard: Any) -> None:
        self._stream: Final = stream
        self._chunks: Final = iter(stream)
        self._guard: Final = guard
        self._order: Final = Order()
        self._ready: deque[ModelResponseStream] = deque()
        self._through = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ModelResponseStream:
        while not self._ready and not self._through:
            with self._guard():
                chunk = next(self._chunks, None)
            if chunk is None:
                self._through = True
                self._ready.extend(self._order.end())
            else:
                self._ready.extend(self._order.put(chunk))
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()

    def close(self) -> None:
        """Let go of the connection; LiteLLM calls it when its reader stops early."""
        self._through = True
        self._ready.clear()
        self._stream.close()


def _content(delta: Any) -> bool:
    return any(value for name, value in (delta or {}).items() if name != "role")
