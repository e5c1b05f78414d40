"""The custom provider ``conserve/<model>``: LiteLLM's calls, made by our OpenAI clients.

Retries are LiteLLM's: it calls the provider again, and the client layer knows a call that failed
by its messages, so that it stays one turn. The clients make none themselves, except for async
streams, which LiteLLM opens when it has given up the chance to retry: always outside of a Router,
and before 1.108 within one, too.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any, Final

import openai
from litellm import CustomLLM, ModelResponse, ModelResponseStream
from openai.types.chat import ChatCompletion

from conserve_agents import Conversation, Gateway, TokenCounter
from conserve_agents.logs import warn_once
from litellm_conserve.clients import Clients
from litellm_conserve.errors import not_a_completion, to_litellm
from litellm_conserve.identity import identify
from litellm_conserve.request import Request, read
from litellm_conserve.sessions import TAGGING_ERRORS, Sessions
from litellm_conserve.stream import Chunks, Order

_LITELLM: Final = tuple(int(part) for part in version("litellm").split(".")[:2])
#: Retries of an async stream that nobody asked for: as many as the SDK makes by itself.
_STREAM_RETRIES: Final = 0 if _LITELLM >= (1, 108) else openai.DEFAULT_MAX_RETRIES


class ConServeLLM(CustomLLM):
    """LiteLLM's handler for ``conserve/<model>``.

    ``api_base`` and ``api_key`` default to ``CONSERVE_BASE_URL`` and ``CONSERVE_API_KEY``, else the
    gateway of ``conserve up`` and a placeholder.

    Args:
        token_counter: counts first turns of conversations without a counter of their own; None:
            bytes / 4.
    """

    def __init__(self, *, token_counter: TokenCounter | None = None) -> None:
        super().__init__()
        self._clients: Final = Clients(token_counter)
        self._sessions: Final = Sessions(token_counter)

    # --- LiteLLM's interface: it passes everything by name ----------------------------------

    def completion(self, **given: Any) -> ModelResponse:
        """One call. Raises LiteLLM's exceptions, see ``errors``."""
        request, talk = self._read(given)
        client = self._clients.sync_for(request)
        with _guard(request), _within(talk):
            raw = client.chat.completions.with_raw_response.create(**request.arguments)
            answer = raw.parse()
        return _response(answer, raw.headers, request)

    async def acompletion(self, **given: Any) -> ModelResponse:
        """:meth:`completion` on the event loop."""
        request, talk = self._read(given)
        client = self._clients.async_for(request)
        with _guard(request), _within(talk):
            raw = await client.chat.completions.with_raw_response.create(**request.arguments)
            answer = raw.parse()
        return _response(answer, raw.headers, request)

    def streaming(self, **given: Any) -> Iterator[ModelResponseStream]:
        """A stream, opened here: what fails now, LiteLLM can retry."""
        request, talk = self._read(given)
        client = self._clients.sync_for(request)
        with _guard(request), _within(talk):
            stream = client.chat.completions.create(**request.streamed())
        return Chunks(stream, partial(_guard, request))

    def astreaming(self, **given: Any) -> AsyncIterator[ModelResponseStream]:
        """A stream, opened when it is first read: LiteLLM calls this outside of the event loop.

        Whose it is, is settled here: its reader may be elsewhere.
        """
        return self._astream(*self._read(given))

    async def _astream(
        self, request: Request, talk: Conversation | None
    ) -> AsyncIterator[ModelResponseStream]:
        retries = request.retries or _STREAM_RETRIES
        client = self._clients.async_for(request, retries=retries)
        with _guard(request), _within(talk):
            stream = await client.chat.completions.create(**request.streamed())
        order, chunks = Order(), aiter(stream)
        try:
            while True:
                with _guard(request):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    break
                for ready in order.put(chunk):
                    yield ready
            for ready in order.end():
                yield ready
        finally:
            await stream.close()

    def _read(self, given: Mapping[str, Any]) -> tuple[Request, Conversation | None]:
        """The call, and the conversation it belongs to on this side."""
        request = read(given)
        try:
            who = identify(request.headers, given.get("litellm_params") or {})
            talk = self._sessions.conversation(who, request.gateway)
        except TAGGING_ERRORS as error:
            warn_once("tag", "model call sent untagged, for tagging it failed: %r", error)
            return request, None
        request.headers.update(who.headers)
        return request, talk

    # --- sessions ----------------------------------------------------------------------------

    def end_session(
        self, session_id: str, *, api_base: str | None = None, api_key: str | None = None
    ) -> bool:
        """End the conversation of a LiteLLM session at the gateway, so that its KV is freed.

        A session goes on for as long as its user comes back, so nothing but its owner can tell its
        end; one that is not ended ends at the gateway by being idle.

        Args:
            session_id: as passed in ``litellm_session_id`` or ``metadata["session_id"]``.
            api_base, api_key: those of its calls.

        Returns:
            Whether the gateway confirmed; a failure is logged.

        Raises:
            GatewayUrlError: ``api_base`` is not an http or https URL.
        """
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
        return self._sessions.end(session_id, Gateway(api_base, headers=headers))

    async def aend_session(
        self, session_id: str, *, api_base: str | None = None, api_key: str | None = None
    ) -> bool:
        """:meth:`end_session` without blocking the event loop."""
        return await asyncio.to_thread(
            self.end_session, session_id, api_base=api_base, api_key=api_key
        )

    def count_with(self, token_counter: TokenCounter | None) -> None:
        """Count first turns with this from now on."""
        self._sessions.counter = token_counter
        self._clients.count_with(token_counter)

    def close(self) -> None:
        """Close the connections of synchronous calls; later ones open new ones."""
        self._clients.close()

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        await self._clients.aclose()


def _within(talk: Conversation | None) -> contextlib.AbstractContextManager[object]:
    """Make a conversation current for one call; never across a ``yield``."""
    return contextlib.nullcontext() if talk is None else talk.activate()


@contextlib.contextmanager
def _guard(request: Request) -> Iterator[None]:
    """Say in LiteLLM's words what went wrong."""
    try:
        yield
    except Exception as error:
        mapped = to_litellm(error, model=request.model)
        if mapped is error:
            raise
        raise mapped from error


def _response(answer: Any, headers: Mapping[str, str], request: Request) -> ModelResponse:
    if not isinstance(answer, ChatCompletion):
        raise not_a_completion(request.model, request.base_url, answer)
    response = ModelResponse(**answer.model_dump())
    # Where LiteLLM and its proxy look for an upstream's headers.
    response._hidden_params["additional_headers"] = {
        f"llm_provider-{name.lower()}": value
        for name, value in headers.items()
        if name.lower().startswith("x-conserve-")
    }
    return response
