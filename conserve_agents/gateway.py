"""The gateway's own small API, over urllib: what the client layer needs besides model calls."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from conserve_agents import wire
from conserve_agents.errors import (
    GatewayError,
    GatewayResponseError,
    GatewayUnreachableError,
    GatewayUrlError,
)
from conserve_agents.logs import log, warn_once

#: Where ``conserve up`` listens unless told otherwise.
DEFAULT_BASE_URL: Final = "http://127.0.0.1:8000/v1"

#: Sends one request and returns the body; raises what ``urllib.request.urlopen`` raises.
Send = Callable[[urllib.request.Request, float], bytes]


def default_base_url() -> str:
    """``CONSERVE_BASE_URL`` where it is set, else :data:`DEFAULT_BASE_URL`."""
    return os.environ.get("CONSERVE_BASE_URL") or DEFAULT_BASE_URL


def default_api_key() -> str:
    """``CONSERVE_API_KEY`` where it is set, else a placeholder.

    ``OPENAI_API_KEY`` is deliberately not read: that secret belongs to another host.
    """
    return os.environ.get("CONSERVE_API_KEY") or wire.NO_API_KEY


def _urlopen(request: urllib.request.Request, timeout_s: float) -> bytes:
    # S310: Gateway.__init__ lets only http and https through.
    with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
        body: bytes = response.read()
        return body


class Gateway:
    """One gateway, by its address. Holds no connection; safe to share between threads.

    Args:
        base_url: the OpenAI-style address, with or without its ``/v1``; None: see
            :func:`default_base_url`.
        headers: sent with every request: the ``Authorization`` of the model calls, since the
            gateway keeps conversations of different keys apart; None: the key of
            :func:`default_api_key`.
        timeout_s: bound on each socket operation of a request.
        send: replaces urllib, for tests and for other transports.

    Raises:
        GatewayUrlError: ``base_url`` is not an http or https URL.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 2.0,
        send: Send = _urlopen,
    ) -> None:
        url = base_url or default_base_url()
        if not url.startswith(("http://", "https://")):
            raise GatewayUrlError(f"gateway address {url!r}: expected http://host:port/v1")
        #: Address without ``/v1``.
        self.root: Final = url.rstrip("/").removesuffix("/v1")
        bearer = {"Authorization": f"Bearer {default_api_key()}"}
        self._headers: Final = bearer if headers is None else dict(headers)
        self._timeout_s: Final = timeout_s
        self._send: Final = send

    def conversation(self, conversation_id: str) -> dict[str, Any]:
        """What the gateway knows of a conversation. Raises GatewayError (404: nothing)."""
        return self._object("GET", _conversation_path(conversation_id))

    def conversations(self, *, limit: int = 100) -> list[dict[str, Any]]:
        """The latest conversations, at most ``limit``. Raises GatewayError."""
        path = f"/conserve/v1/conversations?limit={limit:d}"
        return self._list(path, "conversations")

    def cluster(self) -> dict[str, Any]:
        """Engines, their load and energy, and the scheduler's counters. Raises GatewayError."""
        return self._object("GET", "/conserve/v1/cluster")

    def idle_conversation(self, conversation_id: str) -> bool:
        """Say that a conversation waits for a person, not for a tool: its KV may be parked first.

        Returns:
            False when the gateway did not know it (any more).

        Raises:
            GatewayError: it could not be asked.
        """
        return self._known("POST", f"{_conversation_path(conversation_id)}/idle")

    def end_conversation(self, conversation_id: str) -> bool:
        """End a conversation, so that its KV is freed.

        Returns:
            False when the gateway did not know it (any more).

        Raises:
            GatewayError: it could not be asked.
        """
        return self._known("DELETE", _conversation_path(conversation_id))

    def models(self) -> list[str]:
        """Names of the models it serves. Raises GatewayError."""
        return [str(entry["id"]) for entry in self._list("/v1/models", "data") if "id" in entry]

    def count_tokens(
        self,
        prompt: str | Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        model: str | None = None,
    ) -> int:
        """Length of a prompt in tokens, by the served model's tokenizer and chat template.

        Args:
            prompt: chat messages, or the text of a plain completion.
            tools: tool schemas, rendered into the prompt by the template.
            model: which model's tokenizer; None: the gateway's default.

        Raises:
            GatewayError: it could not be asked, or has no tokenizer.
        """
        body: dict[str, Any] = (
            {"prompt": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}
        )
        if tools:
            body["tools"] = list(tools)
        if model:
            body["model"] = model
        count = self._object("POST", "/v1/tokenize", body).get("count")
        if not isinstance(count, int):
            raise GatewayResponseError(f"{self.root}/v1/tokenize: no integer 'count'", status=200)
        return count

    def _known(self, method: str, path: str) -> bool:
        try:
            self._call(method, path)
        except GatewayResponseError as error:
            if error.status == 404:
                return False
            raise
        return True

    def _list(self, path: str, key: str) -> list[dict[str, Any]]:
        listing = self._object("GET", path).get(key)
        if not isinstance(listing, list):
            raise GatewayResponseError(f"{self.root}{path}: no list {key!r}", status=200)
        return [entry for entry in listing if isinstance(entry, dict)]

    def _object(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        raw = self._call(method, path, body)
        try:
            answer = json.loads(raw)
        except ValueError as error:
            raise GatewayResponseError(f"{self.root}{path}: not JSON", status=200) from error
        if not isinstance(answer, dict):
            raise GatewayResponseError(f"{self.root}{path}: not a JSON object", status=200)
        return answer

    def _call(self, method: str, path: str, body: object = None) -> bytes:
        data = None if body is None else json.dumps(body, default=_plain).encode()
        headers = {**self._headers, "Accept": "application/json"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(  # noqa: S310 - the scheme was checked on construction
            self.root + path, data=data, headers=headers, method=method
        )
        try:
            return self._send(request, self._timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise GatewayResponseError(
                    f"{method} {self.root}{path}: HTTP {error.code} {error.reason}",
                    status=error.code,
                ) from error
        except (OSError, http.client.HTTPException) as error:
            raise GatewayUnreachableError(
                f"{method} {self.root}{path}: {error}; is the gateway up, and is "
                "CONSERVE_BASE_URL right?"
            ) from error


def end_quietly(targets: Iterable[tuple[Gateway, str]]) -> int:
    """End conversations, as far as that can be done; what fails is logged.

    After a gateway that does not answer the rest is left: it would cost a timeout each, and an
    idle conversation ends by itself.

    Returns:
        How many ended, or were over already.
    """
    ended = 0
    for gateway, conversation_id in targets:
        try:
            gateway.end_conversation(conversation_id)
        except GatewayUnreachableError as error:
            warn_once(f"end {gateway.root}", "%s was not ended: %s", conversation_id, error)
            break
        except GatewayError as error:
            log.warning("%s was not ended: %s", conversation_id, error)
        else:
            ended += 1
    return ended


def _conversation_path(conversation_id: str) -> str:
    return f"/conserve/v1/conversations/{urllib.parse.quote(conversation_id, safe='')}"


def _plain(value: object) -> object:
    """JSON form of what SDKs put among messages (pydantic models)."""
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        return dump(exclude_none=True)
    raise TypeError(f"{type(value).__name__} is not JSON serializable")
