"""One streamed completion: server-sent events in, token ids, times and usage out."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

from conserve_serving.replay.errors import TurnFailure


class _Choice(msgspec.Struct):
    text: str | None = None
    token_ids: list[int] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """The engine's own counts."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptDetails | None = None

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens found in the KV cache; None when the engine does not report them."""
        details = self.prompt_tokens_details
        return None if details is None else details.cached_tokens


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


class CompletionStream:
    """Parses the body of one streamed ``/v1/completions`` reply.

    Attributes:
        token_times: clock reading at which each event with tokens came, as given to ``feed``.
        token_counts: tokens in each of those events (1 where the engine does not return ids).
        token_ids: ids of the answer; empty where the engine does not return them.
        text: pieces of the answer's text.
        usage: the engine's counts, once they have come.
        done: the stream's own end marker has come.
    """

    def __init__(self) -> None:
        self.token_times = array("d")
        self.token_counts = array("L")
        self.token_ids: list[int] = []
        self.text: list[str] = []
        self.usage: Usage | None = None
        self.done = False
        self._rest = b""

    def feed(self, chunk: bytes, now: float) -> None:
        """Take the next bytes of the body, whatever their cut.

        Args:
            chunk: bytes as they came.
            now: clock reading to put on the tokens in it.

        Raises:
            TurnFailure: an error event, or one that is not what the API promises.
        """
        lines = (self._rest + chunk if self._rest else chunk).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if not line.startswith(b"data:"):
                continue  # blank lines between events, comments, other fields
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self.done = True
            else:
                self._take(payload, now)

    def _take(self, payload: bytes, now: float) -> None:
        try:
            event = _decode_event(payload)
        except msgspec.MsgspecError as error:
            raise TurnFailure("bad_reply", f"an event is not a completion: {error}") from error
        if event.error is not None:
            raise TurnFailure("stream_error", f"the stream reported {event.error}")
        if event.usage is not None:
            self.usage = event.usage
        for choice in event.choices:
            count = 0
            if choice.token_ids:
                self.token_ids += choice.token_ids
                count = len(choice.token_ids)
            if choice.text:
                self.text.append(choice.text)
                count = count or (1 if choice.token_ids is None else 0)
            if count:
                self.token_times.append(now)
                self.token_counts.append(count)

    def finish(self) -> Usage:
        """The usage of the whole stream, which must have ended.

        Raises:
            TurnFailure: the stream ended without its usage, or without any token.
        """
        if self.usage is None or not self.token_times:
            missing = "its usage" if self.usage is None else "any token"
            raise TurnFailure("stream_cut", f"the stream ended without {missing}")
        return self.usage
