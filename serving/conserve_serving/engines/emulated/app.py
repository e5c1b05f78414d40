"""The ASGI application: SGLang's endpoints on an ``EngineService``."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, unquote

from conserve_serving.engines.emulated import reports
from conserve_serving.engines.emulated import tokenizer as tk
from conserve_serving.engines.emulated.asgi import (
    EventStream,
    Receive,
    Scope,
    Send,
    parse,
    read_body,
    require_json,
    send_empty,
    send_json,
    send_text,
    watching_client,
)
from conserve_serving.engines.emulated.chat import ChatExchange
from conserve_serving.engines.emulated.completions import CompletionExchange
from conserve_serving.engines.emulated.errors import ApiError, ClientLeftError
from conserve_serving.engines.emulated.exchange import Exchange
from conserve_serving.engines.emulated.generate import GenerateExchange
from conserve_serving.engines.emulated.protocol import (
    AbortRequest,
    ChatRequest,
    CloseSessionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    OpenSessionRequest,
    TokenizeRequest,
)
from conserve_serving.engines.emulated.service import EngineService

_log = logging.getLogger(__name__)

_MODELS: Final = "/v1/models/"


class Call(NamedTuple):
    """One HTTP request, as ASGI gives it."""

    scope: Scope
    receive: Receive
    send: Send


_Handler = Callable[[Call], Awaitable[None]]


class EngineApp:
    """The application.

    Args:
        service: the engine.
        clock: seconds since the epoch, for ``created``.

    Attributes:
        draining: ``/health`` and ``/ready`` say 503 and nothing new is meant to come.
    """

    def __init__(self, service: EngineService, clock: Callable[[], float] = time.time) -> None:
        self._service = service
        self._clock = clock
        self.draining = False
        get = ("GET",)
        post = ("POST",)
        either = ("GET", "POST")
        self._routes: dict[str, tuple[tuple[str, ...], _Handler]] = {
            "/health": (get, self._health),
            "/health_generate": (get, self._health),
            "/ready": (get, self._health),
            "/v1/models": (get, self._models),
            "/model_info": (get, self._model_info),
            "/get_model_info": (get, self._model_info),
            "/server_info": (get, self._server_info),
            "/get_server_info": (get, self._server_info),
            "/v1/loads": (get, self._loads),
            "/metrics": (get, self._metrics),
            "/v1/tokenize": (post, self._tokenize),
            "/tokenize": (post, self._tokenize),
            "/v1/detokenize": (post, self._detokenize),
            "/detokenize": (post, self._detokenize),
            "/generate": (("POST", "PUT"), self._generate),
            "/v1/completions": (post, self._completions),
            "/v1/chat/completions": (post, self._chat),
            "/open_session": (either, self._open_session),
            "/close_session": (either, self._close_session),
            "/abort_request": (post, self._abort),
            "/flush_cache": (either, self._flush),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"unexpected ASGI scope {scope['type']!r}: only http is served")
        path = scope["path"]
        methods, handler = self._routes.get(path, ((), None))
        if handler is None and path.startswith(_MODELS):
            methods, handler = ("GET",), self._model
        try:
            if handler is None:
                await _send_error(send, path, ApiError("Not Found", status=404, kind="404"))
            elif scope["method"] not in methods:
                error = ApiError("Method Not Allowed", status=405, kind="405")
                await _send_error(send, path, error)
            else:
                await handler(Call(scope, receive, send))
        except ApiError as error:
            await _send_error(send, path, error)
        except ClientLeftError:
            _log.debug("%s: the client left before its request was complete", path)

    # --- generating ---------------------------------------------------------------------------

    async def _chat(self, call: Call) -> None:
        require_json(call.scope)
        request = parse(await read_body(call.receive), ChatRequest)
        framed = (b"x-sglext-ids-framed", b"1") in call.scope["headers"]
        created = int(self._clock())
        exchange = ChatExchange(self._service, request, created, ids_framed=framed)
        await self._serve(exchange, call)

    async def _completions(self, call: Call) -> None:
        require_json(call.scope)
        request = parse(await read_body(call.receive), CompletionRequest)
        exchange = CompletionExchange(self._service, request, int(self._clock()))
        await self._serve(exchange, call)

    async def _generate(self, call: Call) -> None:
        request = parse(await read_body(call.receive), GenerateRequest)
        await self._serve(GenerateExchange(self._service, request), call)

    async def _serve(self, exchange: Exchange, call: Call) -> None:
        """Answer with what becomes of the exchange; a client that leaves aborts it at once."""
        try:
            async with watching_client(call.receive, exchange.abort):
                if exchange.streaming:
                    stream = EventStream(call.send)
                    while True:
                        await exchange.signal.wait()
                        over = exchange.ended
                        events = exchange.events()
                        if events:
                            await stream.write(events, last=over)
                        if over:
                            return
                while not exchange.ended:
                    await exchange.signal.wait()
                await send_json(call.send, exchange.result())
        except asyncio.CancelledError:
            exchange.abort()
            raise

    # --- about the engine ---------------------------------------------------------------------

    async def _health(self, call: Call) -> None:
        down = self.draining or self._service.runtime.failed
        await send_empty(call.send, 503 if down else 200)

    async def _models(self, call: Call) -> None:
        card = reports.model_card(self._service)
        await send_json(call.send, {"object": "list", "data": [card]})

    async def _model(self, call: Call) -> None:
        name = unquote(call.scope["path"].removeprefix(_MODELS))
        card = reports.model_card(self._service)
        if name == card["id"]:
            await send_json(call.send, card)
            return
        error = {
            "message": f"The model '{name}' does not exist",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
        await send_json(call.send, {"error": error}, 404)

    async def _model_info(self, call: Call) -> None:
        await send_json(call.send, reports.model_info(self._service))

    async def _server_info(self, call: Call) -> None:
        await send_json(call.send, reports.server_info(self._service))

    async def _loads(self, call: Call) -> None:
        query = dict(parse_qsl(call.scope["query_string"].decode("latin-1")))
        await send_json(call.send, reports.loads(self._service, query))

    async def _metrics(self, call: Call) -> None:
        await send_text(call.send, reports.metrics(self._service))

    # --- tokens -------------------------------------------------------------------------------

    async def _tokenize(self, call: Call) -> None:
        require_json(call.scope)
        request = parse(await read_body(call.receive), TokenizeRequest)
        if (request.prompt is None) == (request.messages is None):
            raise ApiError(
                "Exactly one of 'prompt' or 'messages' must be provided.", kind="Bad Request"
            )
        tokens: Any
        count: Any
        template = self._service.template
        if request.messages is not None:
            if not request.messages:
                raise ApiError("Messages cannot be empty.", param="messages")
            tokens = template.render(
                request.messages,
                request.tools if request.tool_choice != "none" else None,
                continue_final_message=request.continue_final_message,
            ).tolist()
            count = len(tokens)
        elif isinstance(request.prompt, list):
            tokens = [tk.encode(text).tolist() for text in request.prompt]
            count = [len(ids) for ids in tokens]
        else:
            tokens = template.encode(request.prompt or "").tolist()
            count = len(tokens)
        longest = self._service.context_length
        await send_json(call.send, {"tokens": tokens, "count": count, "max_model_len": longest})

    async def _detokenize(self, call: Call) -> None:
        require_json(call.scope)
        request = parse(await read_body(call.receive), DetokenizeRequest)
        many = bool(request.tokens) and isinstance(request.tokens[0], list)
        lists = request.tokens if many else [request.tokens]
        texts = []
        for ids in lists:
            if not isinstance(ids, list) or not all(type(one) is int for one in ids):
                raise ApiError("Invalid input: 'tokens' must be a list of integers.")
            try:
                text = tk.decode(ids, skip_special_tokens=request.skip_special_tokens)
            except ValueError as error:
                raise ApiError(
                    f"Error decoding tokens: {error}. Input tokens might be invalid for the model.",
                    kind="DecodeError",
                ) from error
            texts.append(text)
        await send_json(call.send, {"text": texts if many else texts[0]})

    # --- sessions, aborts ---------------------------------------------------------------------

    async def _open_session(self, call: Call) -> None:
        request = parse(await read_body(call.receive), OpenSessionRequest)
        if request.streaming:
            raise ApiError(
                "Streaming sessions are disabled. Please relaunch with --enable-streaming-session."
            )
        session_id = request.session_id if request.session_id is not None else uuid.uuid4().hex
        if not self._service.sessions.open(session_id, request.timeout):
            raise ApiError(
                "Failed to open the session. Check if a session with the same id is still open."
            )
        await send_json(call.send, session_id)

    async def _close_session(self, call: Call) -> None:
        request = parse(await read_body(call.receive), CloseSessionRequest)
        if not self._service.close_session(request.session_id):
            _log.warning("session id %s does not exist, cannot delete.", request.session_id)
        await send_empty(call.send)

    async def _abort(self, call: Call) -> None:
        request = parse(await read_body(call.receive), AbortRequest)
        self._service.abort(request.rid, everything=request.abort_all)
        await send_empty(call.send)

    async def _flush(self, call: Call) -> None:
        if self._service.runtime.flush():
            await send_text(
                call.send,
                "Cache flushed.\nPlease check backend logs for more details. (When there are "
                "running or waiting requests, the operation will not be performed.)\n",
            )
        else:
            await send_text(call.send, "Flush cache failed.\n", 400)


async def _send_error(send: Send, path: str, error: ApiError) -> None:
    """SGLang's error shapes: ``ErrorResponse`` on most endpoints, ``{"error": …}`` on its own."""
    if error.status in (404, 405):
        await send_json(send, {"detail": error.message}, error.status)
    elif path.startswith("/v1/") or error.kind == "Bad Request" or path.endswith("tokenize"):
        content = {
            "object": "error",
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.status,
        }
        await send_json(send, content, error.status)
    else:
        await send_json(send, {"error": {"message": error.message}}, error.status)
