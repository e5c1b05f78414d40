"""Large request bodies, read straight into the buffer they are kept in."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from typing import Final, Protocol

from conserve_serving.gateway.http_exchange import Request

#: Bodies of these sizes are read this way. Below, it does not pay; above, memory is only taken
#: for what has really come.
LEAST_BYTES: Final = 128 * 1024
MOST_BYTES: Final = 16 * 1024 * 1024

#: A bytearray that is not zeroed first, which would cost as much as filling it.
_new_bytearray: Final = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)(
    ("PyByteArray_FromStringAndSize", ctypes.pythonapi)
)


class Owner(Protocol):
    """The connection, which stays responsible for everything but the bytes."""

    def connection_lost(self, exc: Exception | None) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def eof_received(self) -> bool: ...


class LargeBody(asyncio.BufferedProtocol):
    """Stands in for a connection while the rest of a body comes in.

    In pieces, each byte would be copied three times more (by the event loop, by the parser, and
    into one body at the end): at 2 MB, half of what a request costs.

    Args:
        owner: hears of everything else that happens on the transport.
        request: has what has come already; its ``size`` goes on growing.
        size: of the whole body; larger than what has come.
        on_complete: called once it is there.
    """

    __slots__ = ("_on_complete", "_owner", "_request", "_view", "body")

    def __init__(
        self, owner: Owner, request: Request, size: int, on_complete: Callable[[], None]
    ) -> None:
        self._owner = owner
        self._request = request
        self._on_complete = on_complete
        self.body: bytearray = _new_bytearray(None, size)
        self._view = memoryview(self.body)
        self._view[: request.size] = request.begun()

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._view[self._request.size :]

    def buffer_updated(self, nbytes: int) -> None:
        self._request.size += nbytes
        if self._request.size == len(self.body):
            self._on_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.connection_lost(exc)

    def eof_received(self) -> bool:
        return self._owner.eof_received()

    def pause_writing(self) -> None:
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        self._owner.resume_writing()
