"""Reading the engine's counts out of a response without touching what the client gets.

A stream whose client asked for the usage event is passed on byte for byte, and its end is parsed
once. Where the client did not ask, the gateway asks for itself and takes exactly that one event
out again.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Final

import msgspec

from conserve_serving.gateway.conversations import Usage

_TAIL_CHUNKS: Final = 8
#: Smaller chunks are kept with the one before, so that the tail holds the last events whole.
_SMALL_BYTES: Final = 256
#: The usage event has counts (others have null) and no choices.
_USAGE: Final = re.compile(rb'"usage"\s*:\s*\{')
#: The last event. In a string of JSON the line end before it would be escaped.
_END: Final = re.compile(rb"(?:^|\n)data: ?\[DONE\]")
_NEEDLE: Final = b'"usage"'
#: Held back at most while waiting for the end of an event; no event of an engine is larger.
_MAX_HELD_BYTES: Final = 8 * 1024 * 1024


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Counts(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = 0
    prompt_tokens_details: _Details | None = None


class _Reply(msgspec.Struct):
    usage: _Counts | None = None
    choices: list[msgspec.Raw] | None = None


_DECODER: Final = msgspec.json.Decoder(_Reply)


def parse_usage(body: bytes) -> Usage | None:
    """The counts in a JSON reply (or in one event's JSON); None where there are none."""
    reply = _decode(body)
    return None if reply is None else _usage(reply)


def read_reply(body: bytes) -> tuple[bool, Usage | None]:
    """Whether a body is a JSON object, and the counts in it."""
    reply = _decode(body)
    if reply is not None:
        return True, _usage(reply)
    try:  # an object all the same, whose counts are of the wrong type?
        return isinstance(msgspec.json.decode(body), dict), None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False, None


def plausible(usage: Usage | None, *, max_context_tokens: int, choices: int) -> Usage | None:
    """The counts as they can be believed: impossible ones are none at all.

    Args:
        usage: as the engine gave them.
        max_context_tokens: the engine's context length, for each choice.
        choices: completions of the same prompt that were asked for.
    """
    if usage is None:
        return None
    prompt, output, cached = usage
    if prompt < 0 or output < 0 or prompt + -(-output // choices) > max_context_tokens:
        return None
    if cached is not None and not 0 <= cached <= prompt:
        return usage._replace(cached_tokens=min(max(cached, 0), prompt))
    return usage


def _decode(body: bytes) -> _Reply | None:
    try:
        return _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _usage(reply: _Reply) -> Usage | None:
    counts = reply.usage
    if counts is None or counts.prompt_tokens is None:
        return None
    details = counts.prompt_tokens_details
    return Usage(
        prompt_tokens=counts.prompt_tokens,
        output_tokens=counts.completion_tokens or 0,
        cached_tokens=None if details is None else details.cached_tokens,
    )


class StreamTap:
    """Watches one stream of server-sent events.

    Args:
        remove: take the usage event out (the client did not ask for it).

    Attributes:
        events: events that have ended so far.
    """

    __slots__ = ("_held", "_remove", "_tail", "_usage", "events")

    def __init__(self, *, remove: bool) -> None:
        self._remove = remove
        self._held = b""
        self._tail: deque[bytes] = deque(maxlen=_TAIL_CHUNKS)
        self._usage: Usage | None = None
        self.events = 0

    def feed(self, chunk: bytes) -> bytes:
        """Take what arrived; returns what the client gets of it now."""
        if not self._remove:
            self.events += chunk.count(b"\n\n")
            tail = self._tail
            if tail and len(tail[-1]) < _SMALL_BYTES:
                tail[-1] += chunk
            else:
                tail.append(chunk)
            return chunk
        if self._held:
            chunk = self._held + chunk
            self._held = b""
        if not chunk.endswith(b"\n\n"):
            # Half an event is no use to a client, and may be half of the one to be removed.
            end = chunk.rfind(b"\n\n") + 2
            end = end if end >= 2 else 0
            if len(chunk) - end <= _MAX_HELD_BYTES:
                chunk, self._held = chunk[:end], chunk[end:]
        self.events += chunk.count(b"\n\n")
        self._tail.append(chunk)
        found = _USAGE.search(chunk) if _NEEDLE in chunk else None
        return self._without_usage(chunk, found.start()) if found else chunk

    def flush(self) -> bytes:
        """The stream has ended: what was held back."""
        held, self._held = self._held, b""
        self._tail.append(held)
        return held

    def usage(self) -> Usage | None:
        """The counts, once the stream has ended; None if the engine gave none."""
        if self._usage is None:
            tail = b"".join(self._tail)
            for event in reversed(tail.split(b"\n\n")):
                if _NEEDLE in event and (usage := parse_usage(_data(event))) is not None:
                    self._usage = usage
                    break
        return self._usage

    def ended(self) -> bool:
        """Whether the stream's last event has come; true only of a whole one."""
        return _END.search(b"".join(self._tail)) is not None

    def error(self) -> bool:
        """Whether the stream ended with an error event instead of its end."""
        tail = b"".join(self._tail)
        return b'"error"' in tail and any(
            _data(event).startswith((b'{"error"', b'{"object":"error"'))
            for event in tail.split(b"\n\n")
        )

    def _without_usage(self, chunk: bytes, at: int) -> bytes:
        """``chunk`` without its usage event, which has counts ``at`` the given position."""
        while at >= 0:
            start = chunk.rfind(b"\n\n", 0, at) + 2 if b"\n\n" in chunk[:at] else 0
            end = chunk.find(b"\n\n", at) + 2
            reply = _decode(_data(chunk[start:end]))
            usage = _usage(reply) if reply is not None else None
            if usage is not None:
                self._usage = usage
                if reply is not None and not reply.choices:
                    chunk = chunk[:start] + chunk[end:]
                    end = start
            found = _USAGE.search(chunk, end)
            at = found.start() if found else -1
        return chunk


def _data(event: bytes) -> bytes:
    """An event's data. Engines send it in one line."""
    return event.lstrip(b"\r\n").removeprefix(b"data:").strip()
