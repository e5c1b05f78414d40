"""The little of HTTP that the emulated engine needs, on raw ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import msgspec

from conserve_serving.engines.emulated.errors import ApiError, ClientLeftError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_T = TypeVar("_T")

_JSON: Final = [(b"content-type", b"application/json")]
_TEXT: Final = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")]
_EVENTS: Final = [(b"content-type", b"text/event-stream; charset=utf-8")]
#: Largest request body; a prompt of a million tokens as ids is 10 MB.
MAX_BODY_BYTES: Final = 256 * 1024 * 1024


async def read_body(receive: Receive) -> bytes:
    """The request's body.

    Raises:
        ApiError: 413; it is larger than ``MAX_BODY_BYTES``.
        ClientLeftError: it never came.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ApiError(
                f"request body exceeds {MAX_BODY_BYTES} bytes", status=413, kind="Payload Too Large"
            )
        parts.append(part)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def parse(body: bytes, kind: type[_T]) -> _T:
    """A request body of this kind.

    Raises:
        ApiError: 400; not JSON, or a field of a wrong type (named by its path).
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise ApiError(f"invalid request: {error}", kind="Bad Request") from error
    except msgspec.DecodeError as error:
        raise ApiError(f"request body is not valid JSON: {error}", kind="Bad Request") from error


def require_json(scope: Scope) -> None:
    """Refuse a request that does not say it is JSON, as SGLang does on ``/v1`` endpoints.

    Raises:
        ApiError: 400.
    """
    for name, value in scope["headers"]:
        if name == b"content-type":
            if value.split(b";")[0].strip().lower() == b"application/json":
                return
            break
    raise ApiError(
        "Unsupported Media Type: Only 'application/json' is allowed in header content-type",
        kind="Bad Request",
    )


async def send_json(send: Send, content: Any, status: int = 200) -> None:
    """A JSON response."""
    await _send_whole(send, status, _JSON, msgspec.json.encode(content))


async def send_text(send: Send, text: str, status: int = 200) -> None:
    """A plain-text response."""
    await _send_whole(send, status, _TEXT, text.encode())


async def send_empty(send: Send, status: int = 200) -> None:
    """A response without a body."""
    await _send_whole(send, status, [], b"")


async def _send_whole(
    send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


class EventStream:
    """A server-sent event stream; the head goes out with the first bytes, as SGLang sends it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = False

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Send events, already framed."""
        if not self._begun:
            self._begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})


@asynccontextmanager
async def watching_client(receive: Receive, left: Callable[[], None]) -> AsyncIterator[None]:
    """While the body of this context runs, call ``left`` at once if the client goes away."""
    watcher = asyncio.get_running_loop().create_task(_watch(receive, left))
    try:
        yield
    finally:
        watcher.cancel()


async def _watch(receive: Receive, left: Callable[[], None]) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            left()
            return
