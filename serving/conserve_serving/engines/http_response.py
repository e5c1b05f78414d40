"""A response as it arrives: status and headers, then chunks, with back-pressure to the engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from conserve_serving.engines.http_connection import Headers, HttpConnection
from conserve_serving.engines.http_errors import ConnectionLost, EngineHttpError, ProtocolError

#: A consumer this far behind stops the reading of its stream (the transport has handed over up
#: to 256 KiB by then); reading resumes when it has taken everything.
PAUSE_ABOVE_BYTES = 64 * 1024


class Response:
    """One response. Iterate over it for the chunks as they arrive, or ``await read()``.

    Use it as an async context manager, or call :meth:`close`: an unfinished response keeps its
    connection. One consumer at a time. Cancelling a consumer that waits closes the connection.

    Attributes:
        status: the HTTP status.
        headers: names as the engine spelled them, in order.
    """

    __slots__ = (
        "_behind",
        "_buffered_bytes",
        "_chunks",
        "_connection",
        "_ended",
        "_error",
        "_failure",
        "_origin",
        "_paused",
        "_take",
        "_waiter",
        "headers",
        "status",
    )

    def __init__(self, connection: HttpConnection, origin: str) -> None:
        self.status = 0
        self.headers: Headers = []
        self._origin = origin
        self._connection: HttpConnection | None = connection
        self._chunks: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._paused = False
        self._ended = False
        self._error: EngineHttpError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._take: Callable[[bytes], bool] | None = None  # set while `forward` waits
        self._behind = False  # `take` could not take more
        self._failure: Exception | None = None  # what `take` raised

    def header(self, name: bytes) -> bytes | None:
        """The first header of this (lower-case) name, None when there is none."""
        return next((value for key, value in self.headers if key.lower() == name), None)

    @property
    def ended(self) -> bool:
        """Whether the whole response has arrived (some of it may still wait to be taken)."""
        return self._ended

    @property
    def exhausted(self) -> bool:
        """Whether the whole response has arrived and been taken."""
        if self._chunks:
            return False
        connection = self._connection
        return self._ended or (connection is not None and connection.complete)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """The next chunk: what arrived in one piece, never empty.

        Raises:
            ConnectionLost: the connection died before the end, or :meth:`close` was called.
            ProtocolError: the engine broke HTTP.
        """
        while not self._chunks:
            if self._ended:
                raise StopAsyncIteration
            await self._wait()
        return self._pop()

    def _pop(self) -> bytes:
        chunk = self._chunks.popleft()
        self._buffered_bytes -= len(chunk)
        if self._paused and not self._chunks and self._connection is not None:
            self._paused = False
            self._connection.resume_reading()
        return chunk

    async def forward(
        self, take: Callable[[bytes], bool], drained: Callable[[], Awaitable[None]]
    ) -> None:
        """Give every chunk to ``take`` until the end, each the moment it arrives.

        No task is woken for a chunk: ``take`` is called from inside the transport. What arrives
        while ``take`` is behind waits here, and pushes the engine back as iterating does.

        Args:
            take: receives a chunk and says whether it can take another; must not block. What it
                raises ends this call.
            drained: awaited when it could not.

        Raises:
            ConnectionLost: the connection died before the end, or :meth:`close` was called.
            ProtocolError: the engine broke HTTP.
        """
        while True:
            while self._chunks:
                if not take(self._pop()):
                    await drained()
            if self._ended:
                return
            self._take = take
            try:
                await self._wait()
            finally:
                self._take = None
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
            if self._behind:
                self._behind = False
                await drained()

    async def read(self, max_bytes: int = 64 * 1024 * 1024) -> bytes:
        """The whole body.

        Args:
            max_bytes: give up beyond this size.

        Raises:
            ConnectionLost: the connection died before the end.
            ProtocolError: the engine broke HTTP or the body exceeds ``max_bytes``.
        """
        chunks: list[bytes] = []
        size = 0
        async for chunk in self:
            chunks.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                self.close()
                raise ProtocolError(self._origin, f"response body exceeds {max_bytes} bytes")
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def close(self) -> None:
        """Drop what is left. If the response has not ended, its connection closes at once."""
        self._chunks.clear()
        self._buffered_bytes = 0
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
            self._error = ConnectionLost(
                self._origin, "response closed on our side", before_first_byte=self.status == 0
            )
            self._wake()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- Exchange: called by the connection -----------------------------------------------

    def on_head(self, status: int, headers: Headers) -> None:
        self.status = status
        self.headers = headers
        self._wake()

    def on_chunk(self, data: bytes) -> None:
        take = self._take
        if take is not None:
            try:
                if take(data):
                    return
                self._behind = True
            except Exception as error:  # noqa: BLE001 -- raised again by forward, where it belongs
                self._failure = error
            self._take = None
            self._wake()
            return
        self._chunks.append(data)
        self._buffered_bytes += len(data)
        if self._buffered_bytes > PAUSE_ABOVE_BYTES and not self._paused:
            self._paused = True
            if self._connection is not None:
                self._connection.pause_reading()
        self._wake()

    def on_end(self) -> None:
        connection, self._connection = self._connection, None
        self._ended = True
        if self._paused and connection is not None:
            connection.resume_reading()  # it serves others now
        self._wake()

    def on_error(self, error: EngineHttpError) -> None:
        self._connection = None
        self._error = error
        self._wake()

    # --- inside -----------------------------------------------------------------------------

    async def wait_head(self) -> None:
        """Wait for status and headers; the pool does this before it hands the response out.

        Raises:
            EngineHttpError: they did not come.
        """
        while not self.status:
            await self._wait()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
