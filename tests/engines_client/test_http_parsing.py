"""However the network cuts a response into pieces, the receiver gets the same response."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.engines.http_connection import Headers, HttpConnection
from conserve_serving.engines.http_errors import EngineHttpError

EVENTS = [b"data: one\n\n", b"data: \xc3\xbc\n\n", b"\r\n0\r\n\r\n", b"data: [DONE]\n\n"]
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"%X;ext=1\r\n%s\r\n" % (len(e), e) for e in EVENTS)
    + b"0\r\nTrailer: x\r\n\r\n"
)
SIZED = (
    b"HTTP/1.1 100 Continue\r\n\r\n"
    b"HTTP/1.1 503 Busy\r\nContent-Length: 5\r\nRetry-After: 1\r\n\r\nlater"
)
EMPTY = b"HTTP/1.1 204 No Content\r\nX-A: \r\n\r\n"


class Wire(asyncio.Transport):
    """A transport that remembers what became of it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.aborted = False

    def write(self, data: bytes) -> None:  # type: ignore[override] # all that is used here
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True

    def resume_reading(self) -> None: ...

    def pause_reading(self) -> None: ...


class Recorder:
    """Keeps what it is told, and that it was told in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.status = 0
        self.headers: Headers = []
        self.body = b""
        self.error: EngineHttpError | None = None

    def on_head(self, status: int, headers: Headers) -> None:
        self.calls.append("head")
        self.status, self.headers = status, headers

    def on_chunk(self, data: bytes) -> None:
        assert data, "an empty chunk would read as an end"
        self.calls.append("chunk")
        self.body += data

    def on_end(self) -> None:
        self.calls.append("end")

    def on_error(self, error: EngineHttpError) -> None:
        self.calls.append("error")
        self.error = error


class Line:
    """One connection driven by hand."""

    def __init__(self) -> None:
        self.idle = 0
        self.closed = 0
        self.connection = HttpConnection(
            "engine:1",
            on_idle=lambda _: self._count("idle"),
            on_closed=lambda _: self._count("closed"),
        )
        self.wire = Wire()
        self.connection.connection_made(self.wire)

    def _count(self, what: str) -> None:
        setattr(self, what, getattr(self, what) + 1)

    def send(self) -> Recorder:
        recorder = Recorder()
        coroutine = self.connection.send([b"request"], 7, recorder, no_body=False)
        with pytest.raises(StopIteration):  # a small request leaves without waiting
            coroutine.send(None)
        return recorder


def check(recorder: Recorder, response: bytes) -> None:
    assert recorder.error is None
    assert recorder.calls[0] == "head"
    assert recorder.calls[-1] == "end"
    assert set(recorder.calls[1:-1]) <= {"chunk"}
    if response is CHUNKED:
        assert recorder.status == 200
        assert recorder.body == b"".join(EVENTS)
        assert dict(recorder.headers)[b"Content-Type"] == b"text/event-stream"
        assert b"Trailer" not in dict(recorder.headers)
    elif response is SIZED:
        assert recorder.status == 503
        assert recorder.body == b"later"
        assert dict(recorder.headers) == {b"Content-Length": b"5", b"Retry-After": b"1"}
    else:
        assert (recorder.status, recorder.body) == (204, b"")
        assert recorder.headers == [(b"X-A", b"")]


@pytest.mark.parametrize("response", [CHUNKED, SIZED, EMPTY], ids=["chunked", "sized", "empty"])
def test_split_at_every_byte(response: bytes) -> None:
    line = Line()
    for at in range(1, len(response)):
        recorder = line.send()
        line.connection.data_received(response[:at])
        assert "end" not in recorder.calls
        line.connection.data_received(response[at:])
        check(recorder, response)
        assert line.idle == at
    recorder = line.send()
    for byte in response:
        line.connection.data_received(bytes([byte]))
    check(recorder, response)


@given(st.data(), st.lists(st.sampled_from([CHUNKED, SIZED, EMPTY]), min_size=1, max_size=4))
def test_any_split_of_any_sequence(data: st.DataObject, responses: list[bytes]) -> None:
    line = Line()
    for response in responses:
        recorder = line.send()
        cuts = data.draw(st.sets(st.integers(1, len(response) - 1), max_size=12))
        edges = [0, *sorted(cuts), len(response)]
        for start, end in pairwise(edges):
            line.connection.data_received(response[start:end])
        check(recorder, response)
        # At most one chunk is handed over for each piece that arrives.
        assert recorder.calls.count("chunk") <= len(edges) - 1
    assert line.idle == len(responses)
    assert not line.wire.aborted


@pytest.mark.parametrize("response", [CHUNKED, SIZED, EMPTY], ids=["chunked", "sized", "empty"])
def test_lost_at_every_byte(response: bytes) -> None:
    for at in range(len(response)):
        line = Line()
        recorder = line.send()
        if at:
            line.connection.data_received(response[:at])
        line.connection.connection_lost(None)
        assert recorder.calls[-1] == "error"
        assert recorder.error is not None
        assert recorder.error.before_first_byte == (at == 0)  # type: ignore[attr-defined] # ConnectionLost
        assert (line.idle, line.closed) == (0, 1)


@given(st.binary(min_size=1, max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_no_bytes_break_the_connection_without_word(noise: bytes, cuts: list[int]) -> None:
    line = Line()
    recorder = line.send()
    edges = [0, *sorted(cuts), len(noise)]
    for start, end in pairwise(edges):
        if noise[start:end] and not line.wire.aborted:
            line.connection.data_received(noise[start:end])
    line.connection.connection_lost(None)
    assert recorder.calls.count("end") + recorder.calls.count("error") == 1


def test_receiver_that_aborts_in_a_callback_hears_nothing_more() -> None:
    line = Line()
    recorder = line.send()
    recorder.on_head = lambda status, headers: line.connection.abort()  # type: ignore[method-assign] # the point of the test
    line.connection.data_received(CHUNKED)
    line.connection.connection_lost(None)
    assert recorder.calls == []
    assert line.wire.aborted
    assert line.idle == 0
