"""One HTTP exchange: a complete request, and the response to it."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from conserve_serving.gateway.http_server import Connection

Headers = list[tuple[bytes, bytes]]
Body = bytes | bytearray

_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_NO_BODY: Final = frozenset({204, 304})


class Request:
    """One complete request. Header names are in lower case."""

    __slots__ = ("_chunks", "body", "headers", "method", "query", "raw_path", "size")

    def __init__(self) -> None:
        self.method = ""
        self.raw_path = b""
        self.query = b""
        self.headers: Headers = []
        self.body: Body = b""
        self.size = 0
        self._chunks: list[Body] = []

    @property
    def path(self) -> str:
        """The path as it came, still percent-encoded."""
        return self.raw_path.decode("latin-1")

    def add(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self.size += len(chunk)

    def fill(self, body: Body) -> None:
        """Set the whole body at once."""
        self._chunks = [body]

    def begun(self) -> bytes:
        """The body as far as it has come."""
        return b"".join(self._chunks)

    def seal(self) -> None:
        chunks = self._chunks
        self.body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []


class Exchange:
    """The response to one request; a ``relay.Client``.

    Attributes:
        on_gone: called once if the client leaves before the response is complete.
        sent: its head has left.
        status: of the response, once started.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_head",
        "_keep_alive",
        "_no_body",
        "finished",
        "on_gone",
        "sent",
        "started",
        "status",
        "version_1_0",
    )

    def __init__(
        self, connection: Connection, *, keep_alive: bool, version_1_0: bool, no_body: bool
    ) -> None:
        self._connection = connection
        self._keep_alive = keep_alive
        self.version_1_0 = version_1_0
        self._no_body = no_body
        self._head = b""
        self._chunked = False
        self.started = False
        self.finished = False
        self.sent = False
        self.status = 0
        self.on_gone: Callable[[], None] | None = None

    def start(self, status: int, headers: Headers, block: bytes = b"") -> None:
        """Set status and headers; they leave with the first part of the body.

        Args:
            status: HTTP status.
            headers: names in lower case.
            block: further header lines, each with its line end.
        """
        self.started = True
        self.status = status
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        sized = self._no_body or status in _NO_BODY
        for name, value in headers:
            lines.append(b"%b: %b\r\n" % (name, value))
            if name == b"content-length":
                sized = True
        if not sized:
            if self.version_1_0:
                self._keep_alive = False
            else:
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
        if self._connection.closing:
            self._keep_alive = False
        if not self._keep_alive:
            lines.append(b"connection: close\r\n")
        elif self.version_1_0:
            lines.append(b"connection: keep-alive\r\n")
        lines += (block, b"\r\n")
        self._head = b"".join(lines)

    def send(self, data: bytes) -> bool:
        """Send a part of the body; returns whether the client can take more already."""
        connection = self._connection
        connection.send(self._frame(data))
        return not connection.write_paused

    async def drained(self) -> None:
        """Return when the client can take more, or has left."""
        await self._connection.drained()

    def finish(self, data: bytes = b"") -> None:
        """Send the last part of the body; what comes after it is ignored."""
        if self.finished:
            return
        self.finished = True
        out = self._frame(data)
        if self._chunked and not self._no_body:
            out += b"0\r\n\r\n"
        self._connection.complete(out, keep_alive=self._keep_alive)

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole response at once."""
        self.start(status, [*headers, (b"content-length", b"%d" % len(body))])
        self.finish(body)

    def _frame(self, data: bytes) -> bytes:
        head, self._head = self._head, b""
        self.sent = True
        if self._no_body or not data:
            return head
        if self._chunked:
            return b"%b%x\r\n%b\r\n" % (head, len(data), data)
        return head + data if head else data
