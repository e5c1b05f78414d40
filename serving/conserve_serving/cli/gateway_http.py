"""The gateway's own API as the command line reads it: small blocking calls, typed answers.

Unknown keys are ignored and missing ones have defaults, so that a newer command line can look at
an older gateway and the other way round.
"""

from __future__ import annotations

import http.client
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from conserve_serving.cli.errors import BadInputError, GatewayAnsweredError, GatewayUnreachableError

T = TypeVar("T")

DEFAULT_GATEWAY = "http://127.0.0.1:8000"
#: Engine states in which an engine serves turns.
UP_STATES = frozenset({"ready", "draining"})


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One engine in ``GET /conserve/v1/cluster``; None where the gateway does not know.

    Sizes in tokens, energy in joules.
    """

    id: str
    url: str = ""
    tier: str = "?"
    state: str = "?"
    note: str | None = None
    model: str | None = None
    profile: str | None = None
    kv_held_tokens: int | None = None
    kv_capacity_tokens: int | None = None
    parked_tokens: int | None = None
    host_capacity_tokens: int | None = None
    running: int | None = None
    queued: int | None = None
    conversations: int | None = None
    energy_j: float | None = None
    energy_source: str | None = None

    @property
    def is_up(self) -> bool:
        """Whether it serves turns."""
        return self.state in UP_STATES


class GatewayStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway about itself."""

    version: str = "?"
    model: str | None = None
    uptime_s: float = 0.0
    policy: str = "?"
    tier_mode: str = "?"
    open_conversations: int = 0
    waiting_turns: int = 0
    draining: bool = False


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler's totals since the gateway started, by reason."""

    turns_by_outcome: dict[str, int] = {}
    placements_by_reason: dict[str, int] = {}
    transfers_by_reason: dict[str, int] = {}
    fallbacks_by_reason: dict[str, int] = {}
    moves_by_reason: dict[str, int] = {}
    cached_token_shortfall_tokens: int = 0
    shortfall_turns: int = 0


class ClusterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """``GET /conserve/v1/cluster``."""

    gateway: GatewayStatus = GatewayStatus()
    speed: float | None = None
    engines: list[EngineStatus] = []
    counters: Counters = Counters()


class ConversationStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One row of ``GET /conserve/v1/conversations``."""

    id: str
    state: str = "?"
    phase: str = "?"
    decode_engine: str | None = None
    turns: int = 0
    context_tokens: int = 0
    transfers: int = 0
    idle_s: float | None = None


class ConversationList(msgspec.Struct, frozen=True, kw_only=True):
    """``GET /conserve/v1/conversations``."""

    conversations: list[ConversationStatus] = []


class EnergyDetail(msgspec.Struct, frozen=True, kw_only=True):
    """Joules of a turn or a conversation; None where they are not known."""

    total_j: float | None = None
    prefill_j: float | None = None
    decode_j: float | None = None
    source: str | None = None
    settled: bool = True
    unknown_engines: list[str] = []


class TurnDetail(msgspec.Struct, frozen=True, kw_only=True):
    """One turn, of those a gateway remembers or a journal holds."""

    index: int
    outcome: str = "?"
    reason: str | None = None
    #: Only from a journal: why it was held before it was placed, and why a hand-off did not happen.
    held: list[str] = []
    fallback: str | None = None
    prefill_engine: str | None = None
    decode_engine: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    ttft_s: float | None = None
    duration_s: float | None = None
    energy: EnergyDetail | None = None


class ConversationDetail(ConversationStatus, frozen=True, kw_only=True):
    """``GET /conserve/v1/conversations/{id}``."""

    transfers_by_reason: dict[str, int] = {}
    cached_token_shortfall_tokens: int = 0
    energy: EnergyDetail | None = None
    recent_turns: list[TurnDetail] = []


class GatewayHttp:
    """A gateway's own API.

    Args:
        url: ``http://host:port``; a path such as ``/v1`` at its end is dropped.
        timeout_s: longest wait for an answer.
        api_key: sent as a bearer token; conversations are kept apart by it.

    Raises:
        BadInputError: ``url`` is not an http URL.
    """

    def __init__(self, url: str, *, timeout_s: float, api_key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme != "http" or not parts.hostname or port == -1:
            raise BadInputError(
                f"{url!r} is not the URL of a gateway",
                remedy="write it as http://HOST:PORT, for example http://127.0.0.1:8000",
            )
        self._host, self._port = parts.hostname, port or 80
        self.url = f"http://{parts.netloc}"
        self._timeout_s = timeout_s
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def cluster(self) -> ClusterStatus:
        """The cluster now.

        Raises:
            GatewayUnreachableError, GatewayAnsweredError: see ``get``.
        """
        return _decode(self.get("/conserve/v1/cluster"), ClusterStatus, self.url)

    def conversations(self, *, limit: int, everybody: bool = False) -> list[ConversationStatus]:
        """Conversations, ended ones included, the most recently active first.

        Args:
            limit: at most this many.
            everybody: those of all API keys; a gateway with an admin token wants that as its key.

        Raises:
            GatewayUnreachableError, GatewayAnsweredError: see ``get``.
        """
        body = self.get(f"/conserve/v1/conversations?limit={limit}&all={everybody:d}")
        return _decode(body, ConversationList, self.url).conversations

    def conversation(self, id_: str) -> ConversationDetail:
        """One conversation with its latest turns.

        Raises:
            GatewayUnreachableError, GatewayAnsweredError: see ``get``; status 404 when the
                gateway does not know it.
        """
        body = self.get(f"/conserve/v1/conversations/{quote(id_, safe='')}")
        return _decode(body, ConversationDetail, self.url)

    def get(self, path: str) -> bytes:
        """The body of an answer with status 200.

        Raises:
            GatewayUnreachableError: nothing answers there.
            GatewayAnsweredError: it answers with another status.
        """
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request("GET", path, headers=self._headers)
            response = connection.getresponse()
            status, body = response.status, response.read()
        except (OSError, http.client.HTTPException) as failure:
            raise GatewayUnreachableError(
                f"no gateway answers at {self.url} ({failure or type(failure).__name__})",
                remedy="start one with `conserve up`, or give its address with --gateway URL",
            ) from failure
        finally:
            connection.close()
        if status != 200:
            raise GatewayAnsweredError(
                f"the gateway at {self.url} answered {status}: {_error_message(body)}",
                remedy="check that this is a ConServe gateway of the same version",
                status=status,
            )
        return body


def _decode(body: bytes, into: type[T], url: str) -> T:
    try:
        return msgspec.json.decode(body, type=into)
    except msgspec.MsgspecError as failure:
        raise GatewayAnsweredError(
            f"{url} does not answer as a ConServe gateway does ({failure})",
            remedy="check that this is a ConServe gateway of the same version",
            status=200,
        ) from failure


def _error_message(body: bytes) -> str:
    """The message of an error in OpenAI's format, else the start of the body."""
    try:
        answer: Any = msgspec.json.decode(body)
        return str(answer["error"]["message"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace").strip() or "(nothing)"
