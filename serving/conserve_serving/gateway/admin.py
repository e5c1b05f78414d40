"""``/conserve/v1``: the life cycle of conversations, the engines, the cluster at a glance."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
from pydantic import ValidationError

from conserve_agents import wire
from conserve_serving.core.types import Tier
from conserve_serving.gateway.config import TierSection
from conserve_serving.gateway.conversations import Conversation
from conserve_serving.gateway.errors import (
    ConflictError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
    nested_too_deeply,
)
from conserve_serving.gateway.handoffs import Acknowledgement
from conserve_serving.gateway.identity import Headers, Tags
from conserve_serving.gateway.views import describe_cluster, describe_engine

if TYPE_CHECKING:
    from conserve_serving.gateway.gateway import Gateway

Answer = tuple[int, dict[str, Any]]
_T = TypeVar("_T")
_JSON: Final = (b"content-type", b"application/json")
_DEFAULT_LIMIT: Final = 100
_MAX_LIMIT: Final = 10_000


class _Open(msgspec.Struct):
    id: str | None = None
    parent: str | None = None
    model: str | None = None


class _Ack(msgspec.Struct):
    engine: str
    key: str
    tokens: int
    duration_s: float | None = None
    error: str | None = None
    rank: int = 0
    ranks: int = 1


class _NewEngine(msgspec.Struct):
    id: str
    url: str
    tier: Tier
    profile: str | None = None
    gpus: list[str] = []
    replace: bool = False


def json_answer(value: object) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of a JSON answer."""
    return [_JSON], msgspec.json.encode(value)


class Admin:
    """Answers ``/conserve/v1/…`` for one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def handle(
        self,
        method: str,
        parts: list[str],
        query: dict[str, list[str]],
        headers: Headers,
        body: bytes,
    ) -> Answer:
        """Answer one request.

        Args:
            method: in capitals.
            parts: the path below ``/conserve/v1``, split at slashes and unquoted.
            query: the query's parameters.
            headers: request headers, names in lower case.
            body: request body.

        Returns:
            Status and JSON answer.

        Raises:
            ApiError: the request cannot be answered.
        """
        match [method, *parts]:
            case ["GET", "cluster"]:
                await self._gateway.fleet.refresh()
                return 200, describe_cluster(self._gateway)
            case ["POST", "handoffs"]:
                return self._acknowledge(body)
            case ["GET", "conversations"]:
                return self._list(query, headers)
            case ["POST", "conversations"]:
                return self._open(headers, body)
            case ["GET", "conversations", id]:
                found = self._find(headers, id)
                return 200, found.describe(self._gateway.wall())
            case ["POST", "conversations", id, "idle"]:
                found = self._find(headers, id)
                self._gateway.idle_conversation(found)
                return 200, found.describe(self._gateway.wall())
            case ["DELETE", "conversations", id]:
                found = self._find(headers, id)
                self._gateway.end_conversation(found)
                return 200, found.describe(self._gateway.wall())
            case ["GET", "engines"]:
                engines = [describe_engine(self._gateway, e) for e in self._gateway.fleet]
                return 200, {"engines": engines}
            case ["POST", "engines"]:
                self._authorise(headers)
                return self._add_engine(body)
            case ["DELETE", "engines", id]:
                self._authorise(headers)
                return self._known(self._gateway.fleet.remove(id), id, "removed")
            case ["POST", "engines", id, "drain"]:
                self._authorise(headers)
                return self._known(self._gateway.fleet.drain(id), id, "draining")
        if parts and parts[0] in ("cluster", "handoffs", "conversations", "engines"):
            raise MethodNotAllowedError(f"{method} /conserve/v1/{'/'.join(parts)} is not offered")
        raise NotFoundError(f"there is no /conserve/v1/{'/'.join(parts)}", code="unknown_url")

    # --- conversations -----------------------------------------------------------------------
    def _open(self, headers: Headers, body: bytes) -> Answer:
        gateway = self._gateway
        asked = _decode(body or b"{}", _Open)
        for name, value in (("id", asked.id), ("parent", asked.parent)):
            if value is not None and not wire.is_legal_id(value):
                raise InvalidRequestError(
                    f"{name} must be 1 to {wire.MAX_ID_LENGTH} visible ASCII characters", param=name
                )
        model = asked.model or gateway.fleet.model
        if model is None:
            raise UnavailableError(
                "no engine is alive and no model was named: try again", retry_after_s=1.0
            )
        tags = Tags(tenant=gateway.attribution.tenant(headers), parent=asked.parent)
        id = asked.id or gateway.conversations.new_id()
        opened = gateway.conversations.open(id, tags, model=model, source="opened")
        return 201, opened.describe(gateway.wall())

    def _find(self, headers: Headers, id: str) -> Conversation:
        tenant = self._gateway.attribution.tenant(headers)
        found = self._gateway.conversations.find(tenant, id)
        if found is None:
            raise NotFoundError(f"conversation {id!r} is not known here", param="id")
        return found

    def _list(self, query: dict[str, list[str]], headers: Headers) -> Answer:
        text = query.get("limit", [str(_DEFAULT_LIMIT)])[0]
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= _MAX_LIMIT):
            raise InvalidRequestError(f"limit must be 1 to {_MAX_LIMIT}", param="limit")
        gateway = self._gateway
        tenant: str | None = gateway.attribution.tenant(headers)
        if query.get("all") == ["1"]:
            self._authorise(headers)
            tenant = None
        now_s = gateway.wall()
        found = gateway.conversations.of_tenant(tenant, limit=int(text))
        return 200, {
            "open": gateway.conversations.open_count,
            "conversations": [conversation.describe(now_s) for conversation in found],
        }

    # --- hand-offs and engines -----------------------------------------------------------------
    def _acknowledge(self, body: bytes) -> Answer:
        ack = _decode(body, _Ack)
        waited_for = self._gateway.handoffs.acknowledge(
            Acknowledgement(
                engine=ack.engine,
                key=ack.key,
                tokens=ack.tokens,
                duration_s=ack.duration_s,
                error=ack.error,
                rank=ack.rank,
                ranks=ack.ranks,
            )
        )
        return 200, {"expected": waited_for}

    def _add_engine(self, body: bytes) -> Answer:
        asked = _decode(body, _NewEngine)
        if not wire.is_legal_id(asked.id) or len(asked.id) > 64 or "/" in asked.id:
            raise InvalidRequestError(
                "id must be 1 to 64 visible ASCII characters without '/'", param="id"
            )
        known = self._gateway.fleet.get(asked.id)
        if known is not None and known.serving and not asked.replace:
            raise ConflictError(
                f"engine {asked.id!r} serves at {known.url}: choose another id, or send "
                '"replace": true',
                param="id",
                code="engine_exists",
            )
        try:
            section = TierSection(
                role=asked.tier, engine="attach", urls=(asked.url,), profile=asked.profile
            )
            engine = self._gateway.fleet.add(asked.id, asked.url, section, gpus=tuple(asked.gpus))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise InvalidRequestError(f"{field}: {first['msg']}", param=field) from error
        except ValueError as error:
            raise InvalidRequestError(str(error), param="url") from error
        return 201, describe_engine(self._gateway, engine)

    def _known(self, known: bool, id: str, state: str) -> Answer:
        if not known:
            raise NotFoundError(f"engine {id!r} is not known here", param="id")
        return 200, {"id": id, "state": state}

    def _authorise(self, headers: Headers) -> None:
        token = self._gateway.config.gateway.admin_token
        if token is None:
            return
        given = next((value for name, value in headers if name == b"authorization"), b"")
        if not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise UnauthorizedError("this needs 'Authorization: Bearer <admin_token>'")


def _decode(body: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(str(error)) from error
    except RecursionError:
        raise nested_too_deeply() from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"not valid JSON: {error}", code="invalid_json") from error
