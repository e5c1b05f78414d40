"""Errors of the gateway, and their form on the wire: OpenAI's error object.

    GatewayError
    ├── ConfigError             the configuration file cannot be used (names the key and the remedy)
    ├── EngineUnfitError        an engine answers but cannot serve here: wrong model, other layout
    ├── PortInUseError          the address cannot be listened on (in ``server``)
    └── ApiError                an answer to a client that is not a completion
        ├── InvalidRequestError       400  malformed JSON, wrong type, illegal id
        ├── ContextLengthError        400  no decoder can hold the prompt
        ├── UnauthorizedError         401  an operator's call without the operator's token
        ├── NotFoundError             404  no such path, conversation, engine or model
        ├── MethodNotAllowedError     405
        ├── RequestTimeoutError       408  the request came too slowly
        ├── BodyTooLargeError         413
        ├── ConflictError             409  an engine's id is in use
        ├── OverloadedError           429  queue full, or held too long; with Retry-After
        ├── InternalError             500  a defect of the gateway itself
        ├── UpstreamError             502  the engine answered badly, after all attempts
        └── UnavailableError          503  no engine, or draining; with Retry-After

Errors of the engines' HTTP layer (``engines.errors.EngineError``) never reach a client as such.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Final

import msgspec

#: Of a name that a client chose, this much is repeated to it.
_MAX_QUOTED: Final = 200
_JSON: Final = (b"content-type", b"application/json")


class GatewayError(Exception):
    """Root of the gateway's errors."""


class ConfigError(GatewayError, ValueError):
    """The configuration cannot be used; the message names the key and what to do."""


class EngineUnfitError(GatewayError):
    """An engine answers but cannot serve here; the message names the field and the remedy."""


class ApiError(GatewayError):
    """An error answer in OpenAI's format.

    Args:
        message: what is wrong and what to do about it.
        param: the request field it is about.
        code: OpenAI's machine-readable code; the class's own where None.
        retry_after_s: time after which a retry can succeed; becomes ``Retry-After``.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """The error as JSON: ``{"error": {"message", "type", "param", "code"}}``."""
        return encode_error(self.message, self.type, param=self.param, code=self.code)

    def event(self) -> bytes:
        """The same as a server-sent event, for a stream that has begun."""
        return b"data: " + self.body() + b"\n\n"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Response headers that belong to the error itself."""
        headers = [_JSON]
        if self.retry_after_s is not None:
            seconds = max(1, math.ceil(self.retry_after_s))
            headers.append((b"retry-after", str(seconds).encode()))
        return headers


class InvalidRequestError(ApiError):
    """The request is malformed; ``param`` names the field."""

    status = 400
    type = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """No decoder can hold the prompt."""

    default_code = "context_length_exceeded"


class UnauthorizedError(ApiError):
    """An operator's call without the operator's token."""

    status = 401
    type = "authentication_error"
    default_code = "unauthorized"


class NotFoundError(ApiError):
    """There is no such path, model, conversation or engine."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class MethodNotAllowedError(ApiError):
    """The path exists, the method does not."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class RequestTimeoutError(ApiError):
    """The request did not come in time."""

    status = 408
    type = "invalid_request_error"
    default_code = "request_timeout"


class BodyTooLargeError(ApiError):
    """The request body is larger than ``gateway.max_body_bytes``."""

    status = 413
    type = "invalid_request_error"
    default_code = "body_too_large"


class ConflictError(ApiError):
    """The id is in use."""

    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class OverloadedError(ApiError):
    """The cluster has no room now and will have some later."""

    status = 429
    type = "rate_limit_error"
    default_code = "overloaded"


class InternalError(ApiError):
    """A defect of the gateway; the log has it."""

    default_code = "internal_error"


class UpstreamError(ApiError):
    """The engine failed the turn, after every attempt the scheduler allowed."""

    status = 502
    default_code = "upstream_failed"


class UnavailableError(ApiError):
    """No engine is alive, or the gateway is draining."""

    status = 503
    default_code = "unavailable"


def quoted(name: str) -> str:
    """A name of somebody's choosing, as it appears in a message."""
    return repr(name if len(name) <= _MAX_QUOTED else name[:_MAX_QUOTED] + "…")


def nested_too_deeply() -> InvalidRequestError:
    """JSON that no decoder here follows to its end."""
    return InvalidRequestError(
        "the request body is nested too deeply to be read: flatten it", code="invalid_json"
    )


def encode_error(message: str, kind: str, *, param: str | None, code: str | int | None) -> bytes:
    """OpenAI's error object as JSON bytes."""
    return msgspec.json.encode(
        {"error": {"message": message, "type": kind, "param": param, "code": code}}
    )


def normalise_upstream(status: int, body: bytes) -> bytes:
    """An engine's error body in OpenAI's format.

    SGLang answers with the error's fields at the top level; they are moved under ``error``. A body
    that is no JSON object is quoted in the message (its first 500 characters).
    """
    try:
        answer: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        answer = None
    if isinstance(answer, dict):
        if isinstance(answer.get("error"), dict):
            return body
        inner = answer.get("error", answer.get("message", answer.get("detail")))
        if inner is not None:
            message = inner if isinstance(inner, str) else msgspec.json.encode(inner).decode()
            kind = str(answer.get("type") or _kind(status))
            code = answer.get("code")
            if "context length" in message or "longer than the model" in message:
                code = "context_length_exceeded"
            return encode_error(message, kind, param=answer.get("param"), code=code)
    text = body[:500].decode("utf-8", "replace").strip()
    return encode_error(
        f"the engine answered {status}: {text or 'no text'}", _kind(status), param=None, code=status
    )


def _kind(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"
