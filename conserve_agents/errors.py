"""Errors of the client layer.

    ConServeError
    ├── ArgumentError            a number or setting that makes no sense      (a ValueError)
    ├── ConversationIdError      an id that cannot name a conversation       (a ValueError)
    ├── ConversationStateError   a conversation used out of order            (a RuntimeError)
    ├── HandoverError            a hand-over token that is not one           (a ValueError)
    ├── TokenCountError          a token counter could not count
    └── GatewayError             the gateway could not be asked
        ├── GatewayUrlError          the address is not one                  (a ValueError)
        ├── GatewayUnreachableError  no answer: refused, timed out, broken off
        └── GatewayResponseError     an answer that is not a success; has ``status``

They are raised by what the caller asks for directly. Tagging a model call never raises: a tag that
cannot be made is left out and logged once.
"""

from __future__ import annotations


class ConServeError(Exception):
    """Base of every error this package raises."""


class ArgumentError(ConServeError, ValueError):
    """An argument's value makes no sense; the message names it."""


class ConversationIdError(ConServeError, ValueError):
    """The id cannot name a conversation."""


class ConversationStateError(ConServeError, RuntimeError):
    """The conversation is not in a state that allows this, such as entering it twice."""


class HandoverError(ConServeError, ValueError):
    """The token does not hand over a conversation."""


class TokenCountError(ConServeError):
    """The counter could not count; custom counters raise it (or a subclass) as well."""


class GatewayError(ConServeError):
    """The gateway could not be asked."""


class GatewayUrlError(GatewayError, ValueError):
    """The gateway's address is not an http or https URL."""


class GatewayUnreachableError(GatewayError):
    """The gateway did not answer in time, or at all."""


class GatewayResponseError(GatewayError):
    """The gateway answered with something other than a success.

    Attributes:
        status: the HTTP status, 200 when the body was not what the API promises.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status
