"""``/v1/responses`` and ``/v1/conversations``."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from conserve_serving.gateway.apis.client import TranslatedClient
from conserve_serving.gateway.apis.items import ITEMS, Item, chat_messages
from conserve_serving.gateway.apis.request import Message, translated
from conserve_serving.gateway.apis.responses_answer import ResponsesAnswer
from conserve_serving.gateway.apis.responses_request import ResponsesRequest, parse_responses
from conserve_serving.gateway.apis.store import Entry, History
from conserve_serving.gateway.errors import (
    ApiError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    quoted,
)
from conserve_serving.gateway.http_exchange import Body, Exchange, Request
from conserve_serving.gateway.identity import scoped
from conserve_serving.gateway.request import Original, decode_body

if TYPE_CHECKING:
    from conserve_serving.gateway.gateway import Gateway
    from conserve_serving.gateway.turn import Turn


class _Opening(msgspec.Struct):
    items: list[Item] | None = None
    metadata: Raw | UnsetType = UNSET


_OPENING = msgspec.json.Decoder(_Opening)


class ResponsesApi:
    """The Responses API of one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._store = gateway.responses

    # --- turns --------------------------------------------------------------------------------
    def begin(self, request: Request, exchange: Exchange) -> Turn:
        """Make the turn that a request asks for; the caller starts it.

        Raises:
            ApiError: it cannot be served.
        """
        gateway = self._gateway
        arrived_s = gateway.wall()
        asked = parse_responses(request.body)
        tenant = gateway.attribution.tenant(request.headers)
        entry = self._continued(asked, tenant)
        history = None if entry is None else entry.history
        new = [_encoded(message) for message in asked.new]
        messages = [
            *(_encoded(message) for message in asked.opening),
            *(() if history is None else history.whole()),
            *new,
        ]
        if not messages:
            raise InvalidRequestError("input is empty: send text or items", param="input")
        original = Original(
            prompt_field="input",
            identity=asked.identity,
            continues=entry.conversation if entry is not None and asked.previous else None,
            branches=entry is not None and (entry.continued or self._runs(entry, asked, tenant)),
        )
        turn: Turn | None = None

        def remember(answer: ResponsesAnswer, body: bytes) -> None:
            if turn is not None:
                said = chat_messages(ITEMS.decode(msgspec.json.encode(answer.items())))
                history = [*new, *(_encoded(message) for message in said)]
                entry = Entry(body=body, conversation=turn.conversation.id, history=None)
                self._remember(asked, tenant, answer.id, entry, history)

        answer = ResponsesAnswer(
            id=f"resp_{gateway.token()}",
            model=asked.fields["model"],
            created_s=int(time.time()),
            custom=asked.custom,
            echo=asked.echo,
            on_whole=remember,
        )
        client = TranslatedClient(
            exchange, answer, stream=asked.stream, headers=[(b"x-request-id", answer.id.encode())]
        )
        turn = gateway.begin_turn(
            translated({**asked.fields, "messages": messages}, original),
            request.headers,
            client,
            arrived_s=arrived_s,
        )
        return turn

    def _runs(self, entry: Entry, asked: ResponsesRequest, tenant: str) -> bool:
        """Whether somebody goes on in the entry's conversation at this moment."""
        key = scoped(tenant, asked.fields["model"], entry.conversation)
        return self._gateway.conversations.is_running(key)

    def _continued(self, asked: ResponsesRequest, tenant: str) -> Entry | None:
        """What the request builds on, where it names something."""
        if asked.previous is not None:
            entry = self._store.get("response", tenant, asked.previous)
            if entry is None:
                raise InvalidRequestError(
                    f"previous response {quoted(asked.previous)} is not stored here (any more): "
                    "send the whole input",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            return entry
        if asked.conversation is not None:
            return self._find("conversation", tenant, asked.conversation)
        return None

    def _remember(
        self, asked: ResponsesRequest, tenant: str, id: str, entry: Entry, messages: list[Raw]
    ) -> None:
        """Store what a later request may name. Before the client hears of the end."""
        previous = None
        if asked.previous is not None:
            previous = self._store.get("response", tenant, asked.previous)
            if previous is None:  # forgotten meanwhile: its history would be missing
                return
            previous.continued = True
        elif asked.conversation is not None:
            # Parallel turns of one conversation: in the order in which they end.
            previous = self._store.get("conversation", tenant, asked.conversation)
        entry.history = History(messages, None if previous is None else previous.history)
        if asked.conversation is not None and previous is not None:
            grown = replace(previous, history=entry.history)
            self._store.put("conversation", tenant, asked.conversation, grown)
        if asked.store:
            self._store.put("response", tenant, id, entry)

    # --- everything else ----------------------------------------------------------------------
    def answer(self, request: Request, parts: list[str]) -> dict[str, Any] | Raw:
        """Answer a request below ``/v1/responses`` or ``/v1/conversations``.

        Args:
            request: the request.
            parts: its path below ``/v1``, split at slashes and unquoted.

        Raises:
            ApiError: it cannot be answered.
        """
        tenant = self._gateway.attribution.tenant(request.headers)
        match [request.method, *parts]:
            case ["GET", "responses", id]:
                if b"stream=true" in request.query.lower():
                    raise InvalidRequestError(
                        "a stored response is not streamed again: leave stream out",
                        param="stream",
                        code="unsupported_parameter",
                    )
                return Raw(self._find("response", tenant, id).body)
            case ["DELETE", "responses", id]:
                self._find("response", tenant, id)
                self._store.delete("response", tenant, id)
                return {"id": id, "object": "response", "deleted": True}
            case ["POST", "responses", id, "cancel"]:
                self._find("response", tenant, id)
                raise InvalidRequestError(
                    "only background responses can be cancelled, and none are here: to stop a "
                    "stream, close its connection",
                    code="unsupported",
                )
            case ["POST", "conversations"]:
                return self._open(tenant, request.body)
            case ["GET", "conversations", id]:
                return Raw(self._find("conversation", tenant, id).body)
            case ["POST", "conversations", id]:
                return self._update(tenant, id, request.body)
            case ["DELETE", "conversations", id]:
                return self._end(tenant, id)
        raise self._unknown(request, parts)

    def _open(self, tenant: str, body: Body) -> Raw:
        asked = decode_body(body or b"{}", _OPENING)
        messages = [_encoded(m) for m in chat_messages(asked.items or [], "items")]
        id = f"conv_{self._gateway.token()}"
        value = {
            "id": id,
            "object": "conversation",
            "created_at": int(time.time()),
            "metadata": {} if asked.metadata is UNSET else asked.metadata,
        }
        history = History(messages, None) if messages else None
        entry = Entry(body=msgspec.json.encode(value), history=history, conversation=id)
        self._store.put("conversation", tenant, id, entry)
        return Raw(entry.body)

    def _update(self, tenant: str, id: str, body: Body) -> Raw:
        asked = decode_body(body or b"{}", _OPENING)
        entry = self._find("conversation", tenant, id)
        value = msgspec.json.decode(entry.body)
        value["metadata"] = {} if asked.metadata is UNSET else asked.metadata
        entry = replace(entry, body=msgspec.json.encode(value))
        self._store.put("conversation", tenant, id, entry)
        return Raw(self._find("conversation", tenant, id).body)

    def _end(self, tenant: str, id: str) -> dict[str, Any]:
        """A deleted conversation is over: its KV is free."""
        self._find("conversation", tenant, id)
        self._store.delete("conversation", tenant, id)
        known = self._gateway.conversations.find(tenant, id)
        if known is not None:
            self._gateway.end_conversation(known)
        return {"id": id, "object": "conversation.deleted", "deleted": True}

    def _find(self, kind: Any, tenant: str, id: str) -> Entry:
        entry = self._store.get(kind, tenant, id)
        if entry is None:
            raise NotFoundError(
                f"{kind} {quoted(id)} is not stored here (any more)",
                param="conversation" if kind == "conversation" else "response_id",
            )
        return entry

    def _unknown(self, request: Request, parts: list[str]) -> ApiError:
        if len(parts) <= 2:
            return MethodNotAllowedError(f"{request.method} {request.path} is not offered")
        return NotFoundError(f"{request.path} is not offered here", code="unknown_url")


def _encoded(message: Message) -> Raw:
    return Raw(msgspec.json.encode(message))
