"""``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conserve_serving.engines.client_wire import error_message
from conserve_serving.engines.http_errors import EngineHttpError, EngineRefused
from conserve_serving.gateway.apis.client import TranslatedClient
from conserve_serving.gateway.apis.messages_answer import MessagesAnswer
from conserve_serving.gateway.apis.messages_request import parse_messages
from conserve_serving.gateway.errors import InvalidRequestError, UpstreamError
from conserve_serving.gateway.http_exchange import Exchange, Request

if TYPE_CHECKING:
    from conserve_serving.gateway.gateway import Gateway
    from conserve_serving.gateway.turn import Turn


class MessagesApi:
    """The Messages API of one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def begin(self, request: Request, exchange: Exchange) -> Turn:
        """Make the turn that a request asks for; the caller starts it.

        Raises:
            ApiError: it cannot be served.
        """
        gateway = self._gateway
        arrived_s = gateway.wall()
        asked = parse_messages(request.body)
        answer = MessagesAnswer(
            id=f"msg_{gateway.token()}",
            model=asked.fields["model"],
            thinks=asked.thinks,
            stops=asked.stops,
        )
        client = TranslatedClient(
            exchange, answer, stream=asked.stream, headers=[(b"request-id", answer.id.encode())]
        )
        return gateway.begin_turn(asked.turn(), request.headers, client, arrived_s=arrived_s)

    async def count(self, request: Request) -> dict[str, int]:
        """Tokens of the prompt that a request means, as an engine renders it.

        Raises:
            ApiError: the prompt is not taken, or no engine would say.
        """
        gateway = self._gateway
        asked = parse_messages(request.body, counting=True)
        gateway.check_model(asked.fields["model"])
        failure: EngineHttpError | None = None
        for engine in sorted(gateway.fleet.serving(), key=lambda engine: engine.running)[:2]:
            try:
                counted = await engine.client.tokenize_chat(asked.fields)
            except EngineHttpError as error:
                if isinstance(error, EngineRefused) and error.status in (400, 413, 422):
                    raise InvalidRequestError(error_message(error.body)) from error
                failure = error
            else:
                return {"input_tokens": len(counted.tokens)}
        if failure is None:
            raise gateway.no_engine()
        raise UpstreamError(f"no engine counted the tokens: {failure}") from failure
