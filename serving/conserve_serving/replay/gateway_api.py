"""The gateway's HTTP API, as far as a replay uses it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final
from urllib.parse import quote, urlsplit

import msgspec

from conserve_serving.engines.http import Headers, HttpPool, Response
from conserve_serving.engines.http_errors import (
    ConnectFailed,
    ConnectionLost,
    EngineHttpError,
    ResponseTimeout,
)
from conserve_serving.replay.cluster import Cluster, parse_cluster
from conserve_serving.replay.errors import GatewayUnusable, TurnFailure

#: Statuses after which the same turn may be sent again: the server was busy, or broke.
RETRYABLE_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})

#: Head of a reply that is not a turn's: these answer at once, or the gateway is not well.
_ADMIN_TIMEOUT_S: Final = 30.0


def pool_for(url: str) -> HttpPool:
    """Connections to the server at ``url``.

    Raises:
        GatewayUnusable: not an ``http://host[:port]`` address.
    """
    parts = urlsplit(url)
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port or parts.path.strip("/"):
        raise GatewayUnusable(
            f"gateway address {url!r} is not usable: give http://HOST:PORT, without a path."
        )
    return HttpPool(parts.hostname, port, max_idle=1024)


@contextlib.contextmanager
def _as_failures() -> Iterator[None]:
    """Failures of the connection, as kinds that are counted."""
    try:
        yield
    except ConnectFailed as error:
        raise TurnFailure("connect_failed", str(error)) from error
    except ConnectionLost as error:
        raise TurnFailure("connection_lost", str(error)) from error
    except ResponseTimeout as error:
        raise TurnFailure("timeout", str(error)) from error
    except EngineHttpError as error:
        raise TurnFailure("bad_reply", str(error)) from error


def header(reply: Response, name: str) -> str | None:
    """Value of a reply's header, by its name in any case."""
    value = reply.header(name.lower().encode("ascii"))
    return None if value is None else value.decode("latin-1")


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Tokens(msgspec.Struct):
    tokens: list[int]


class GatewayApi:
    """Calls of one gateway.

    Args:
        pool: connections to it.
        url: its address, for error texts and reports.
        api_key: sent as bearer token, for a gateway that asks for one.
    """

    def __init__(self, pool: HttpPool, *, url: str, api_key: str | None = None) -> None:
        self._pool = pool
        self._authorization: Headers = (
            [] if api_key is None else [(b"authorization", f"Bearer {api_key}".encode())]
        )
        self.url = url

    async def cluster(self) -> Cluster | None:
        """The cluster, None where the server does not describe one (a plain OpenAI server).

        Raises:
            GatewayUnusable: the answer is not what the API promises.
            TurnFailure: the server cannot be reached.
        """
        status, body = await self._call("GET", "/conserve/v1/cluster")
        if status == 404:
            return None
        if status != 200:
            hint = ". Give its admin token with --api-key." if status == 401 else ""
            raise GatewayUnusable(_refusal("GET /conserve/v1/cluster", status, body) + hint)
        return parse_cluster(body)

    async def model(self) -> tuple[str, int | None]:
        """Name of the model served, and the longest context it takes, where it is told.

        Raises:
            GatewayUnusable: no model is served, or the answer is not OpenAI's.
            TurnFailure: the server cannot be reached.
        """
        status, body = await self._call("GET", "/v1/models")
        if status != 200:
            raise GatewayUnusable(_refusal("GET /v1/models", status, body))
        try:
            models = msgspec.json.decode(body, type=_Models).data
        except msgspec.MsgspecError as error:
            raise GatewayUnusable(f"GET /v1/models is not OpenAI's list: {error}") from error
        if not models:
            raise GatewayUnusable(
                f"{self.url} serves no model yet. Wait for GET {self.url}/ready, then replay."
            )
        return models[0].id, models[0].max_model_len

    async def tokenize(self, text: str, *, model: str) -> list[int]:
        """Token ids of a text; raises TurnFailure when the server does not tell."""
        body = msgspec.json.encode({"model": model, "prompt": text, "add_special_tokens": False})
        status, answer = await self._call("POST", "/v1/tokenize", body)
        if status != 200:
            raise TurnFailure("bad_reply", _refusal("POST /v1/tokenize", status, answer))
        try:
            return msgspec.json.decode(answer, type=_Tokens).tokens
        except msgspec.MsgspecError as error:
            raise TurnFailure("bad_reply", f"POST /v1/tokenize: {error}") from error

    async def end(self, conversation: str) -> None:
        """End a conversation; one that the server does not know has ended already.

        Raises:
            TurnFailure: the server cannot be reached, or refuses.
        """
        path = f"/conserve/v1/conversations/{quote(conversation, safe='')}"
        status, body = await self._call("DELETE", path)
        if status >= 400 and status != 404:
            raise TurnFailure(f"http_{status}", _refusal("DELETE " + path, status, body))

    @contextlib.asynccontextmanager
    async def complete(
        self, body: bytes, headers: Sequence[tuple[bytes, bytes]]
    ) -> AsyncIterator[Response]:
        """Send one ``/v1/completions`` request; iterate over the reply for its stream.

        Raises:
            TurnFailure: the connection failed (in the ``async with`` body, too), or a status
                other than 200; ``retryable`` and ``retry_after_s`` say what a client may do.
        """
        headers = [*headers, *self._authorization, (b"content-type", b"application/json")]
        with _as_failures():
            reply = await self._pool.request("POST", "/v1/completions", headers, body)
            async with reply:
                if reply.status != 200:
                    raise TurnFailure(
                        f"http_{reply.status}",
                        _refusal("POST /v1/completions", reply.status, await reply.read()),
                        retryable=reply.status in RETRYABLE_STATUS,
                        retry_after_s=_seconds(header(reply, "retry-after")),
                    )
                yield reply

    async def _call(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        headers = [*self._authorization]
        if body:
            headers.append((b"content-type", b"application/json"))
        with _as_failures():
            reply = await self._pool.request(
                method, path, headers, body, head_timeout_s=_ADMIN_TIMEOUT_S
            )
            async with reply:
                return reply.status, await reply.read()


def _seconds(value: str | None) -> float | None:
    """Seconds of a Retry-After header; its other form, a date, is not used by our servers."""
    try:
        return None if value is None else max(0.0, float(value))
    except ValueError:
        return None


def _refusal(call: str, status: int, body: bytes) -> str:
    """What the server said, in one line: OpenAI's error message where it is one."""
    message = body[:200].decode("utf-8", "replace")
    try:
        error = msgspec.json.decode(body)
        message = str(error["error"]["message"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        pass  # not OpenAI's format: the text as it came says more than nothing
    return f"{call} answered {status}: {message}"
