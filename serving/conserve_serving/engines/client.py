"""The one driver of SGLang's HTTP API; the emulated engine answers the same.

Calls raise :class:`~conserve_serving.engines.http_errors.EngineHttpError` and nothing else for
whatever an engine does. What each call relies on is listed in docs/architecture.md.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Final, TypeVar
from urllib.parse import urlsplit

import msgspec

from conserve_serving.engines.client_types import (
    EmulatedExtension,
    EngineDescription,
    Loads,
    ModelCard,
    Occupancy,
    Prefilled,
    Tokenized,
)
from conserve_serving.engines.client_wire import (
    GenerateReply,
    LoadsReply,
    ModelInfo,
    ModelList,
    ServerInfo,
    TokenizeReply,
    describe,
    error_message,
    sum_loads,
)
from conserve_serving.engines.http import Buffer, HttpPool, Response
from conserve_serving.engines.http_errors import BadReply, EngineRefused, ResponseTimeout
from conserve_serving.engines.sglang import marks

_T = TypeVar("_T")

#: Fields of a chat completion that decide its prompt: what ``/v1/tokenize`` is given.
CHAT_PROMPT_FIELDS: Final = (
    "model",
    "messages",
    "tools",
    "tool_choice",
    "reasoning_effort",
    "continue_final_message",
    "chat_template_kwargs",
)

_GAUGE: Final = re.compile(
    rb"^sglang:(kv_used_tokens|kv_evictable_tokens|hicache_host_(?:used|total)_tokens)"
    rb"(?:\{.*\})? ([0-9.eE+-]+)",
    re.MULTILINE,
)


def pool_for(url: str) -> HttpPool:
    """A pool for an engine's address, ``http://host:port``.

    Raises:
        ValueError: the address is of another form; the message says which is meant.
    """
    form = f"engine url {url!r}: write it as http://host:port"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{form} ({error})") from error
    if parts.scheme != "http" or not parts.hostname or port is None:
        raise ValueError(form)
    if parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(f"{form}, without a path, query or user")
    return HttpPool(parts.hostname, port)


class EngineClient:
    """Calls one engine.

    Args:
        url: ``http://host:port``.
        pool: connections to it; by default one is made from ``url``.
        api_key: sent as a bearer token when the engine was started with ``--api-key``.
        timeout_s: longest time for any call but prefill and stream, answer included.
    """

    def __init__(
        self,
        url: str,
        *,
        pool: HttpPool | None = None,
        api_key: str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self.url = url
        self.pool = pool if pool is not None else pool_for(url)
        self._timeout_s = timeout_s
        self._headers: list[tuple[bytes, bytes]] = [(b"Content-Type", b"application/json")]
        if api_key is not None:
            self._headers.append((b"Authorization", f"Bearer {api_key}".encode()))

    # --- the engine ---------------------------------------------------------------------------

    async def describe(self) -> EngineDescription:
        """Read what joining needs.

        Raises:
            BadReply: a field is missing, or the engine is of a kind ConServe cannot use.
        """
        info = await self._get("/server_info", ServerInfo)
        model = await self._get("/model_info", ModelInfo)
        return describe(self.pool.origin, info, model, await self.models())

    async def settings(self) -> dict[str, object]:
        """All that ``/server_info`` says, for those who look at what an engine was started with."""
        return await self._get("/server_info", dict[str, object])

    async def extension(self) -> EmulatedExtension | None:
        """The emulated engine's own figures (energy among them), None from a real one."""
        info = await self._get("/server_info", ServerInfo)
        return info.conserve.value() if info.conserve is not None else None

    async def health(self, *, timeout_s: float | None = None) -> None:
        """Return when the engine says it is healthy.

        Args:
            timeout_s: SGLang may take a second or more: it generates a token to find out.

        Raises:
            EngineRefused: it answered, and is not healthy (starting or stopping).
            EngineHttpError: it did not answer.
        """
        await self._call("GET", "/health", timeout_s=timeout_s)

    async def models(self) -> list[ModelCard]:
        """What the engine serves, the model itself first, then adapters."""
        reply = await self._get("/v1/models", ModelList)
        return [ModelCard(id=card.id, max_context_tokens=card.max_model_len) for card in reply.data]

    async def loads(self) -> Loads:
        """Requests now and counters since the start; see ``client_types.step_delta``."""
        reply = await self._get("/v1/loads?include=core", LoadsReply)
        return sum_loads(reply)

    async def occupancy(self) -> Occupancy | None:
        """KV held, from ``/metrics``; None until the engine has first reported it.

        Raises:
            EngineRefused: the engine runs without ``--enable-metrics``.
        """
        try:
            text = await self._call("GET", "/metrics")
        except EngineRefused as error:
            if error.status != 404:
                raise
            raise EngineRefused(
                error.origin,
                "/metrics: not found: start the engine with --enable-metrics",
                status=error.status,
                body=error.body,
            ) from None
        # Ranks of one engine hold shards of the same tokens, so the largest reading counts.
        values: dict[bytes, int] = {}
        for name, value in _GAUGE.findall(text):
            values[name] = max(values.get(name, 0), int(float(value)))
        if b"kv_used_tokens" not in values or b"kv_evictable_tokens" not in values:
            return None
        return Occupancy(
            kv_used_tokens=values[b"kv_used_tokens"],
            kv_evictable_tokens=values[b"kv_evictable_tokens"],
            host_used_tokens=values.get(b"hicache_host_used_tokens"),
            host_total_tokens=values.get(b"hicache_host_total_tokens"),
        )

    # --- prompts ------------------------------------------------------------------------------

    async def tokenize_chat(self, body: Mapping[str, object]) -> Tokenized:
        """Token ids of a chat completion's prompt, as this engine would render it.

        Args:
            body: the request's fields; only ``CHAT_PROMPT_FIELDS`` are sent. Values may be
                ``msgspec.Raw``.

        Raises:
            EngineRefused: the engine does not accept the messages.
        """
        fields = {name: body[name] for name in CHAT_PROMPT_FIELDS if name in body}
        return await self._tokenize(fields)

    async def tokenize_prompt(self, prompt: str) -> Tokenized:
        """Token ids of a text prompt, special tokens added as ``/v1/completions`` would."""
        return await self._tokenize({"prompt": prompt})

    async def prefill(
        self,
        input_ids: Sequence[int],
        *,
        rid: str,
        conversation: str | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
    ) -> Prefilled:
        """Compute the prompt's KV and generate nothing.

        The reply may come before the pages are in the store: wait for the acknowledgement.
        Cancelling closes the connection; send :meth:`abort` too, as SGLang looks for
        disconnected clients of a call that does not stream only every few seconds.

        Args:
            input_ids: the prompt.
            rid: request id, for :meth:`abort`.
            conversation: whose prompt it is, under the name its session has on the decoder; the
                store keeps the pages until that session is closed.
            priority: as ``EngineDescription.priority_field`` gives it.
            timeout_s: longest wait, queueing included; None: none.
        """
        body: dict[str, object] = {
            "input_ids": input_ids,
            "sampling_params": {"max_new_tokens": 0},
            "rid": rid,
        }
        if conversation is not None:
            body["routing_key"] = conversation
        if priority is not None:
            body["priority"] = priority
        path = "/generate"
        text = await self._call("POST", path, body, timeout_s=timeout_s, unlimited=True)
        meta = self._decode(path, text, GenerateReply).meta_info
        if meta.finish_reason is not None and meta.finish_reason.get("type") == "abort":
            raise BadReply(self.pool.origin, f"{path}: prefill {rid} was aborted on the engine")
        return Prefilled(prompt_tokens=meta.prompt_tokens, cached_tokens=meta.cached_tokens)

    # --- residency ----------------------------------------------------------------------------

    async def open_session(
        self, session_id: str, *, capacity_tokens: int, timeout_s: float
    ) -> None:
        """Keep the KV of requests that carry this ``session_id`` on the device.

        Args:
            capacity_tokens: longest context expected.
            timeout_s: the engine ends the session by itself after this long without a request.

        Raises:
            EngineRefused: the session is open already, or the engine keeps none.
        """
        body = {
            "session_id": session_id,
            "capacity_of_str_len": capacity_tokens,
            "timeout": timeout_s,
        }
        await self._call("POST", "/open_session", body)

    async def close_session(self, session_id: str) -> None:
        """Take the protection of a session's KV away: it may be evicted, or go to the host."""
        await self._call("POST", "/close_session", {"session_id": session_id})

    async def free_session(self, session_id: str) -> None:
        """Have the KV of a closed session leave the device and the host tier.

        Only engines with our store do so; others leave it to eviction.
        """
        await self._call("POST", "/close_session", {"session_id": session_id + marks.FREE})

    async def forget_pages(self, session_id: str) -> None:
        """Have a conversation's pages leave the hand-off store, under its session's name.

        Any engine with our store can do it for all.
        """
        await self._call("POST", "/close_session", {"session_id": session_id + marks.END})

    async def abort(self, rid: str) -> None:
        """Stop a request, wherever it is; unknown ids are ignored by the engine."""
        await self._call("POST", "/abort_request", {"rid": rid})

    # --- the turn -----------------------------------------------------------------------------

    async def stream(
        self,
        path: str,
        body: Buffer | Sequence[Buffer],
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> Response:
        """Send a request whose response, whatever its status, is read as it arrives.

        Args:
            path: for instance ``/v1/chat/completions``.
            body: JSON, in one or several buffers (``splice`` makes them).
            headers: beside Content-Type and Authorization, which are set here.

        Raises:
            EngineHttpError: no head of a response came.
        """
        return await self.pool.request("POST", path, [*self._headers, *headers], body)

    def close(self) -> None:
        """Close all connections at once."""
        self.pool.close()

    # --- inside -------------------------------------------------------------------------------

    async def _tokenize(self, fields: Mapping[str, object]) -> Tokenized:
        path = "/v1/tokenize"
        text = await self._call("POST", path, fields)
        reply = self._decode(path, text, TokenizeReply)
        longest = reply.max_model_len
        return Tokenized(
            tokens=reply.tokens,
            max_model_len_tokens=longest if longest is not None and longest > 0 else None,
        )

    async def _get(self, path: str, kind: type[_T]) -> _T:
        return self._decode(path, await self._call("GET", path), kind)

    def _decode(self, path: str, text: bytes, kind: type[_T]) -> _T:
        try:
            return msgspec.json.decode(text, type=kind)
        except msgspec.MsgspecError as error:
            raise BadReply(
                self.pool.origin,
                f"{path}: {error}: is this SGLang 0.5.23 or an emulated engine?",
            ) from error

    async def _call(
        self,
        method: str,
        path: str,
        payload: Mapping[str, object] | None = None,
        *,
        timeout_s: float | None = None,
        unlimited: bool = False,
    ) -> bytes:
        if timeout_s is None and not unlimited:
            timeout_s = self._timeout_s
        body = msgspec.json.encode(payload) if payload is not None else b""
        try:
            async with (
                asyncio.timeout(timeout_s),
                await self.pool.request(method, path, self._headers, body) as response,
            ):
                text = await response.read()
        except TimeoutError:
            raise ResponseTimeout(
                self.pool.origin, f"no complete answer to {method} {path} within {timeout_s:g} s"
            ) from None
        if not 200 <= response.status < 300:
            raise EngineRefused(
                self.pool.origin,
                f"{method} {path}: {response.status}: {error_message(text)}",
                status=response.status,
                body=text[:4096],
            )
        return text
