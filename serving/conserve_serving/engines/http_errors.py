# ruff: noqa: N818 -- named for what happened, so that the tree and its handlers read plainly
"""What can go wrong between us and an engine, one branch of the engine side's tree::

EngineError
└── EngineHttpError       names the engine's address; everything below is one of these
    ├── ConnectFailed     no connection: refused, unreachable, unresolvable, too slow
    ├── ConnectionLost    the connection died under a request
    ├── ResponseTimeout   the engine did not answer in the time it was given
    ├── ProtocolError     what came back is not HTTP/1.1, or is beyond our limits
    ├── EngineRefused     the engine answered with an error status
    └── BadReply          the answer lacks a field we need, or says we cannot use it
"""

from __future__ import annotations

from conserve_serving.engines.errors import EngineError


class EngineHttpError(EngineError):
    """Talking to an engine failed.

    Attributes:
        origin: ``host:port`` of the engine.
    """

    def __init__(self, origin: str, what: str) -> None:
        super().__init__(f"engine {origin}: {what}")
        self.origin = origin


class ConnectFailed(EngineHttpError):
    """No connection could be made; nothing was sent."""


class ConnectionLost(EngineHttpError):
    """The connection ended before the response did.

    Attributes:
        before_first_byte: no byte of the response had arrived.
    """

    def __init__(self, origin: str, what: str, *, before_first_byte: bool) -> None:
        super().__init__(origin, what)
        self.before_first_byte = before_first_byte


class ResponseTimeout(EngineHttpError):
    """The engine did not answer in the time it was given; the connection has been closed."""


class ProtocolError(EngineHttpError):
    """The engine sent something that is not HTTP/1.1 or exceeds our limits."""


class EngineRefused(EngineHttpError):
    """The engine answered with an error status.

    Attributes:
        status: the HTTP status.
        body: the start of the error body, as received.
    """

    def __init__(self, origin: str, what: str, *, status: int, body: bytes) -> None:
        super().__init__(origin, what)
        self.status = status
        self.body = body


class BadReply(EngineHttpError):
    """The engine's answer lacks a field we need, or says something we cannot serve with."""
