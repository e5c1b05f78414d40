"""Routes: which request means what. Turns are started at once, everything else in a task."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Final
from urllib.parse import parse_qs, unquote

from conserve_serving.engines.http_errors import EngineHttpError
from conserve_serving.gateway.admin import Admin, json_answer
from conserve_serving.gateway.apis.messages import MessagesApi
from conserve_serving.gateway.apis.messages_answer import error_body
from conserve_serving.gateway.apis.responses import ResponsesApi
from conserve_serving.gateway.errors import (
    ApiError,
    InternalError,
    MethodNotAllowedError,
    NotFoundError,
    UpstreamError,
    nested_too_deeply,
    normalise_upstream,
    quoted,
)
from conserve_serving.gateway.gateway import Gateway
from conserve_serving.gateway.http_exchange import Body, Exchange, Headers, Request
from conserve_serving.gateway.metrics import Exposition
from conserve_serving.gateway.request import Api, parse_turn
from conserve_serving.gateway.turn import Turn

_log = logging.getLogger("conserve.gateway.app")

Answer = tuple[int, Headers, bytes]

_LOOKS: Final = ("/health", "/ready", "/metrics", "/v1/models")
_TEXT: Final = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")


class App:
    """Routes requests to one gateway.

    Args:
        gateway: started by the caller.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._admin = Admin(gateway)
        self._messages = MessagesApi(gateway)
        self._responses = ResponsesApi(gateway)
        self._begin: dict[str, Callable[[Request, Exchange], Turn]] = {
            **{api.value: partial(self._turn, api) for api in Api},
            "/v1/messages": self._messages.begin,
            "/v1/responses": self._responses.begin,
        }
        self._exposition = Exposition(gateway)
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self, request: Request, exchange: Exchange) -> None:
        """Answer one request (see ``http_server.Handler``)."""
        path = request.path
        begin = self._begin.get(path)
        try:
            if begin is not None and request.method == "POST":
                turn = begin(request, exchange)
                exchange.on_gone = turn.client_gone
                turn.start()
                return
            if begin is not None:
                raise MethodNotAllowedError(f"{path} takes POST, not {request.method}")
        except ApiError as error:
            _refuse(request, exchange, error)
            return
        except RecursionError:  # of any decoder of the body: they stand at different depths
            _refuse(request, exchange, nested_too_deeply())
            return
        except Exception as error:  # noqa: BLE001 -- the boundary: an answer instead of a hang
            self._defect(request, exchange, error)
            return
        task = asyncio.create_task(self._other(path, request, exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        exchange.on_gone = lambda: _cancel(task)

    def _turn(self, api: Api, request: Request, exchange: Exchange) -> Turn:
        gateway = self._gateway
        arrived_s = gateway.wall()
        asked = parse_turn(api, request.body)
        return gateway.begin_turn(asked, request.headers, exchange, arrived_s=arrived_s)

    async def _other(self, path: str, request: Request, exchange: Exchange) -> None:
        try:
            status, headers, body = await self._answer(path, request)
        except ApiError as error:
            _refuse(request, exchange, error)
            return
        except RecursionError:
            _refuse(request, exchange, nested_too_deeply())
            return
        except Exception as error:  # noqa: BLE001 -- the boundary: an answer instead of a hang
            self._defect(request, exchange, error)
            return
        exchange.respond(status, headers, body)

    def _defect(self, request: Request, exchange: Exchange, error: Exception) -> None:
        _log.error("%s %s failed", request.method, request.path, exc_info=error)
        self._gateway.metrics.internal_errors += 1
        answer = InternalError("the gateway failed; its log has the details")
        if not exchange.started:
            _refuse(request, exchange, answer)

    async def _answer(self, path: str, request: Request) -> Answer:
        method = request.method
        if path.startswith("/conserve/v1/"):
            parts = [unquote(part) for part in path.split("/")[3:]]
            query = parse_qs(request.query.decode("latin-1"))
            status, value = await self._admin.handle(
                method, parts, query, request.headers, bytes(request.body)
            )
            return status, *json_answer(value)
        if path == "/v1/messages/count_tokens":
            _only(("POST",), method, path)
            return 200, *json_answer(await self._messages.count(request))
        if path.startswith(("/v1/responses/", "/v1/conversations")):
            parts = [unquote(part) for part in path.split("/")[2:]]
            return 200, *json_answer(self._responses.answer(request, parts))
        if path == "/v1/tokenize":
            _only(("POST",), method, path)
            return await self._tokenize(request.body)
        if path in _LOOKS or path.startswith("/v1/models/"):
            _only(("GET", "HEAD"), method, path)
            return self._look(path)
        raise NotFoundError(f"there is no {path} here", code="unknown_url")

    def _look(self, path: str) -> Answer:
        gateway = self._gateway
        if path == "/health":
            return 200, *json_answer({"status": "ok"})
        if path == "/ready":
            missing = gateway.missing()
            value = {"ready": missing is None, "reason": missing}
            return (503 if missing else 200), *json_answer(value)
        if path == "/metrics":
            return 200, [_TEXT], self._exposition.render()
        cards = gateway.models()
        if path == "/v1/models":
            ends = {"first_id": cards[0]["id"], "last_id": cards[-1]["id"]} if cards else {}
            return 200, *json_answer({"object": "list", "data": cards, "has_more": False, **ends})
        name = unquote(path.removeprefix("/v1/models/"))
        for card in cards:
            if card["id"] == name:
                return 200, *json_answer(card)
        raise NotFoundError(f"model {quoted(name)} is not served here", code="model_not_found")

    async def _tokenize(self, body: Body) -> Answer:
        gateway = self._gateway
        engines = gateway.fleet.serving()
        if not engines:
            raise gateway.no_engine()
        engine = min(engines, key=lambda engine: engine.running)
        try:
            response = await engine.client.stream("/v1/tokenize", body)
            answer = await response.read()
        except EngineHttpError as error:
            raise UpstreamError(f"engine {engine.id} failed: {error}") from error
        if response.status >= 400:
            answer = normalise_upstream(response.status, answer)
        return response.status, [(b"content-type", b"application/json")], answer


def _refuse(request: Request, exchange: Exchange, error: ApiError) -> None:
    """Answer with an error, in the form of the API that was asked."""
    body = error.body()
    if request.path.startswith("/v1/messages"):
        body = error_body(error.status, body)
    exchange.respond(error.status, error.headers(), body)


def _only(methods: tuple[str, ...], method: str, path: str) -> None:
    if method not in methods:
        raise MethodNotAllowedError(f"{path} takes {methods[0]}, not {method}")


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
