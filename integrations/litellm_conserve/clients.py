"""OpenAI clients, kept: one per gateway and key, and for async calls per event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from typing import Any, Final
from weakref import WeakKeyDictionary

from conserve_agents import TokenCounter
from conserve_agents.openai import AsyncConServeOpenAI, ConServeOpenAI
from litellm_conserve.errors import bad_parameter
from litellm_conserve.request import Request

#: Clients kept per event loop; the one used least recently is let go. It is not closed, for it may
#: be in use.
MAX_CLIENTS: Final = 64

_Kept = OrderedDict[tuple[str, str | None], Any]


class Clients:
    """Makes clients that never retry, since LiteLLM does, and keeps them. Thread-safe."""

    def __init__(self, counter: TokenCounter | None = None) -> None:
        self._counter = counter
        self._lock: Final = threading.Lock()
        self._sync: _Kept = OrderedDict()
        self._async: WeakKeyDictionary[asyncio.AbstractEventLoop, _Kept] = WeakKeyDictionary()

    def sync_for(self, request: Request) -> ConServeOpenAI:
        """The client for a request.

        Raises:
            litellm.BadRequestError: the caller brought one of another kind.
        """
        client: ConServeOpenAI
        if request.client is not None:
            client = _brought(request, ConServeOpenAI, retries=0)
        else:
            with self._lock:
                client = self._one_of(self._sync, request, ConServeOpenAI)
        return client

    def async_for(self, request: Request, *, retries: int = 0) -> AsyncConServeOpenAI:
        """The client for a request on the running event loop, to which its connections belong.

        Args:
            retries: how often it sends the request again, where LiteLLM would not.

        Raises:
            litellm.BadRequestError: the caller brought one of another kind.
        """
        client: AsyncConServeOpenAI
        if request.client is not None:
            client = _brought(request, AsyncConServeOpenAI, retries=retries)
        else:
            with self._lock:
                kept = self._async.setdefault(asyncio.get_running_loop(), OrderedDict())
                client = self._one_of(kept, request, AsyncConServeOpenAI)
            client = client.copy(max_retries=retries) if retries else client
        return client

    def count_with(self, counter: TokenCounter | None) -> None:
        """Count first turns with this from now on."""
        with self._lock:
            if counter is not self._counter:
                self._counter = counter
                self._sync.clear()
                self._async.clear()

    def close(self) -> None:
        """Close the clients of synchronous calls."""
        with self._lock:
            clients = list(self._sync.values())
            self._sync.clear()
        for client in clients:
            client.close()

    async def aclose(self) -> None:
        """Close the clients of the running event loop."""
        with self._lock:
            clients: _Kept = self._async.pop(asyncio.get_running_loop(), OrderedDict())
        for client in clients.values():
            await client.close()

    def _one_of(self, kept: _Kept, request: Request, make: Any) -> Any:
        key = (request.base_url, request.api_key)
        client = kept.get(key)
        if client is None:
            client = kept[key] = make(
                base_url=request.base_url,
                api_key=request.api_key,
                token_counter=self._counter,
                max_retries=0,
            )
            if len(kept) > MAX_CLIENTS:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return client


def _brought(request: Request, kind: Any, *, retries: int) -> Any:
    if not isinstance(request.client, kind):
        problem = f"is a {type(request.client).__name__}: pass a {kind.__name__}, or leave it out"
        raise bad_parameter("client", problem, model=request.model)
    return request.client.copy(max_retries=retries)
