"""Errors of the emulated engine server, one tree under the engine side's root::

EngineError
└── EmulatedEngineError        anything this package raises on purpose
    ├── EngineConfigError      the server cannot start with these settings
    ├── StoreError             the hand-off store cannot be used
    │   └── StampMismatchError the store's KV is of another model, page size or dtype
    ├── ApiError               a request is refused: HTTP status, type, message, field
    └── ClientLeftError        the client went away before its request was complete
"""

from __future__ import annotations

from conserve_serving.engines.errors import EngineError


class EmulatedEngineError(EngineError):
    """Root of every error the emulated engine raises on purpose."""


class EngineConfigError(EmulatedEngineError):
    """The server cannot start with these settings; the message names the setting."""


class StoreError(EmulatedEngineError):
    """The hand-off store cannot be used."""


class StampMismatchError(StoreError):
    """The store holds KV this engine must not load."""


class ClientLeftError(EmulatedEngineError):
    """The client closed the connection before its request was complete; nobody to answer."""


class ApiError(EmulatedEngineError):
    """A request is refused. Rendered in SGLang's error shape of the endpoint it reached.

    Attributes:
        message: what is wrong, and what to send instead.
        status: HTTP status code.
        kind: SGLang's ``type`` field.
        param: the request field at fault, where there is one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "BadRequestError",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.param = param
