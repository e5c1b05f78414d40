"""A hook of LiteLLM's proxy: tags model calls whichever provider carries them to the gateway.

    litellm_settings:
      callbacks: ["litellm_conserve.proxy_hook"]

The tag is made once per request, before the proxy's Router: all of its attempts carry the same.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Final

from litellm.integrations.custom_logger import CustomLogger

from conserve_agents import Conversation, Gateway, TokenCounter, wire
from conserve_agents.logs import warn_once
from conserve_agents.turns import Prompt, prompt_of
from litellm_conserve.identity import identify
from litellm_conserve.sessions import TAGGING_ERRORS, Sessions

#: What the proxy calls requests that are turns of a conversation.
_TURNS: Final = frozenset(
    {
        *("completion", "acompletion", "text_completion", "atext_completion"),
        *("responses", "aresponses", "anthropic_messages", "aanthropic_messages"),
    }
)
#: Requests under way that are remembered; the oldest is forgotten first.
MAX_UNDER_WAY: Final = 1000
#: How LiteLLM marks an upstream's headers.
_UPSTREAM: Final = "llm_provider-"


@dataclass(frozen=True, slots=True, kw_only=True)
class _UnderWay:
    conversation: Conversation
    turn_id: str
    prompt: Prompt | None


class ConServeProxyHook(CustomLogger):
    """See the module.

    Args:
        models: names in ``model_list`` whose calls are tagged; None: all. The tag is harmless to
            servers that do not know it, but tells them ids.
        token_counter: counts first turns; None: bytes / 4.
    """

    def __init__(
        self, *, models: Container[str] | None = None, token_counter: TokenCounter | None = None
    ) -> None:
        super().__init__()
        self._models: Final = models
        self._sessions: Final = Sessions(token_counter)
        self._lock: Final = threading.Lock()
        self._under_way: OrderedDict[str, _UnderWay] = OrderedDict()

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any] | None:
        """A request came in: add its tag to the headers that go upstream. Never raises."""
        if call_type not in _TURNS:
            return None
        if self._models is not None and data.get("model") not in self._models:
            return None
        try:
            headers = await self._headers(data)
        except TAGGING_ERRORS as error:
            warn_once("tag", "model call sent untagged, for tagging it failed: %r", error)
            return None
        data["extra_headers"] = {**(data.get("extra_headers") or {}), **headers}
        return data

    async def _headers(self, data: dict[str, Any]) -> dict[str, str]:
        given = {**(data.get("headers") or {}), **(data.get("extra_headers") or {})}
        who = identify(given, data)
        # Where the call will go, only the Router knows: what is named here is for its ids.
        talk = self._sessions.conversation(who, Gateway())
        if talk is None:
            return who.headers
        prompt = prompt_of(data)
        if talk.needs_blocking_count():
            tag = await asyncio.to_thread(talk.headers_for, prompt, data.get("tools"))
        else:
            tag = talk.headers_for(prompt, data.get("tools"))
        call_id, turn_id = data.get("litellm_call_id"), tag.get(wire.TURN_ID)
        if isinstance(call_id, str) and turn_id is not None:
            with self._lock:
                self._under_way[call_id] = _UnderWay(
                    conversation=talk, turn_id=turn_id, prompt=prompt
                )
                if len(self._under_way) > MAX_UNDER_WAY:
                    self._under_way.popitem(last=False)
        return tag

    async def async_post_call_response_headers_hook(
        self,
        data: dict[str, Any],
        user_api_key_dict: Any,
        response: Any,
        request_headers: dict[str, str] | None = None,
        **_: Any,
    ) -> dict[str, str] | None:
        """An answer goes out: with the gateway's own headers, as if LiteLLM were not there."""
        hidden = getattr(response, "_hidden_params", None)
        upstream = hidden.get("additional_headers") if isinstance(hidden, Mapping) else None
        headers = {
            name.removeprefix(_UPSTREAM): str(value)
            for name, value in (upstream or {}).items()
            if name.startswith(f"{_UPSTREAM}x-conserve-")
        }
        # Nothing is known of a stream that is yet to be opened: the provider, where it is ours,
        # hears its answer.
        if response is not None and (headers or not data.get("stream")):
            under_way = self._take(data)
            if under_way is not None:
                under_way.conversation.observe(headers, turn_id=under_way.turn_id)
        return headers or None

    async def async_post_call_failure_hook(
        self,
        request_data: dict[str, Any],
        original_exception: Exception,
        user_api_key_dict: Any,
        traceback_str: str | None = None,
    ) -> None:
        """A request failed for good: should its client send it again, it is the same turn."""
        under_way = self._take(request_data)
        if under_way is not None:
            under_way.conversation.failed(under_way.turn_id, under_way.prompt)

    def _take(self, data: Mapping[str, Any]) -> _UnderWay | None:
        with self._lock:
            return self._under_way.pop(str(data.get("litellm_call_id")), None)


#: For ``litellm_settings.callbacks`` of a proxy.
proxy_hook: Final = ConServeProxyHook()
