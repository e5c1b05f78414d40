"""Drop-in OpenAI clients that tag their calls with the current conversation.

    from conserve_agents.openai import ConServeOpenAI as OpenAI

Everything the SDK does goes through one method, once per logical call and outside its retry loop:
``request``. That is where the tag goes on, so streaming, ``.stream()``, ``.parse``, raw responses
and generic ``client.post`` are covered, and a retry carries the tag of the call it repeats. A call
that failed for good and is made again by the application is recognised by its prompt.

A call made outside of any :func:`~conserve_agents.conversation` and without the client's own
``conversation_id`` is sent untagged: the gateway then tells conversations apart by their messages.
Nor is a call touched that brings its own ``X-ConServe-Conversation-ID``.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from conserve_agents import wire
from conserve_agents.context import current_conversation
from conserve_agents.conversation import Conversation, conversation_of
from conserve_agents.counting import TokenCounter
from conserve_agents.errors import ConServeError
from conserve_agents.gateway import Gateway, default_api_key, default_base_url
from conserve_agents.logs import warn_once
from conserve_agents.turns import is_model_call, prompt_of

try:
    import openai
except ImportError as error:
    raise ImportError(
        "conserve_agents.openai needs the OpenAI SDK: pip install 'conserve-agents[openai]'"
    ) from error

#: What reading and changing the SDK's request can fail with, should its insides change.
_TAGGING_ERRORS: Final = (ConServeError, AttributeError, LookupError, TypeError, ValueError)
_ELSEWHERE: Final = ("provider", "data_residency")  # arguments that choose the address themselves


@dataclass(frozen=True, slots=True, kw_only=True)
class _Session:
    """What a client and its copies (``with_options``) share."""

    conversation: Conversation | None
    counter: TokenCounter | None


class _Tagging:
    """What both clients do: choose the conversation, tag the request, read the response."""

    _conserve: _Session

    @property
    def conversation(self) -> Conversation | None:
        """The client's own conversation, where ``conversation_id`` was given."""
        return self._conserve.conversation

    def _tagged(self, options: Any) -> Any:
        """The request, tagged where it belongs to a conversation. Never raises."""
        try:
            conversation = self._conversation_of(options)
            return options if conversation is None else self._tag(options, conversation)
        except _TAGGING_ERRORS as error:
            warn_once("tag", "model call sent untagged, for tagging it failed: %r", error)
            return options

    def _counts_blocking(self) -> bool:
        conversation = current_conversation() or self._conserve.conversation
        return conversation is not None and conversation.needs_blocking_count(
            self._conserve.counter
        )

    def _conversation_of(self, options: Any) -> Conversation | None:
        if not is_model_call(options.method, options.url):
            return None
        defaults: Mapping[str, Any] = getattr(self, "_custom_headers", {})
        taken = wire.CONVERSATION_ID.lower()
        if any(name.lower() == taken for name in (*_given_headers(options), *defaults)):
            return None
        return current_conversation() or self._conserve.conversation

    def _tag(self, options: Any, conversation: Conversation) -> Any:
        body = options.json_data if isinstance(options.json_data, Mapping) else {}
        conversation.use_gateway(self._gateway)
        tags = conversation.headers_for(
            prompt_of(body), body.get("tools"), counter=self._conserve.counter
        )
        tagged = copy.copy(options)
        tagged.headers = {**_given_headers(options), **tags}
        return tagged

    def _gateway(self) -> Gateway:
        auth: Mapping[str, Any] = getattr(self, "auth_headers", {})
        headers = {name: value for name, value in auth.items() if isinstance(value, str)}
        return Gateway(str(getattr(self, "base_url")), headers=headers)  # noqa: B009 - a mixin


class ConServeOpenAI(_Tagging, openai.OpenAI):
    """:class:`openai.OpenAI`, tagging its calls.

    Args:
        conversation_id: a conversation of the client's own, for calls outside of any
            ``conversation()``; ended by :meth:`close`.
        token_counter: counts first turns of conversations without a counter of their own.
        kwargs: as for ``openai.OpenAI``. ``base_url`` defaults to ``CONSERVE_BASE_URL``, else
            ``http://127.0.0.1:8000/v1``; ``api_key`` to ``CONSERVE_API_KEY``, else a placeholder
            (never ``OPENAI_API_KEY``: that secret is for another host).

    Raises:
        ConversationIdError: ``conversation_id`` is empty.
    """

    def __init__(
        self,
        *,
        conversation_id: str | None = None,
        token_counter: TokenCounter | None = None,
        _conserve: _Session | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**_with_defaults(kwargs))
        self._conserve = _conserve or _session(conversation_id, token_counter)

    def request(
        self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None
    ) -> Any:
        """The SDK's one way out; see the module."""
        tagged = self._tagged(options)
        try:
            return super().request(cast_to, tagged, stream=stream, stream_cls=stream_cls)
        except BaseException:  # cancelled and interrupted calls were not answered either
            _failed(tagged)
            raise

    def _process_response(self, **kwargs: Any) -> Any:
        _observe(kwargs.get("response"))
        return super()._process_response(**kwargs)

    def copy(self, *, _extra_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> Self:
        """As in the SDK; the copy goes on in the same conversation."""
        extra = {"_conserve": self._conserve, **(_extra_kwargs or {})}
        return super().copy(_extra_kwargs=extra, **kwargs)

    with_options = copy

    def close(self) -> None:
        """End the client's own conversation, then close its connections."""
        if self._conserve.conversation is not None:
            self._conserve.conversation.end()
        super().close()


class AsyncConServeOpenAI(_Tagging, openai.AsyncOpenAI):
    """:class:`openai.AsyncOpenAI`, tagging its calls. Arguments: see :class:`ConServeOpenAI`."""

    def __init__(
        self,
        *,
        conversation_id: str | None = None,
        token_counter: TokenCounter | None = None,
        _conserve: _Session | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**_with_defaults(kwargs))
        self._conserve = _conserve or _session(conversation_id, token_counter)

    async def request(
        self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None
    ) -> Any:
        """The SDK's one way out; see the module."""
        if self._counts_blocking():
            tagged = await asyncio.to_thread(self._tagged, options)
        else:
            tagged = self._tagged(options)
        try:
            return await super().request(cast_to, tagged, stream=stream, stream_cls=stream_cls)
        except BaseException:  # cancelled and interrupted calls were not answered either
            _failed(tagged)
            raise

    async def _process_response(self, **kwargs: Any) -> Any:
        _observe(kwargs.get("response"))
        return await super()._process_response(**kwargs)

    def copy(self, *, _extra_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> Self:
        """As in the SDK; the copy goes on in the same conversation."""
        extra = {"_conserve": self._conserve, **(_extra_kwargs or {})}
        return super().copy(_extra_kwargs=extra, **kwargs)

    with_options = copy

    async def close(self) -> None:
        """End the client's own conversation, then close its connections."""
        if self._conserve.conversation is not None:
            await self._conserve.conversation.aend()
        await super().close()


def _with_defaults(kwargs: dict[str, Any]) -> dict[str, Any]:
    if any(kwargs.get(name) for name in _ELSEWHERE):
        return kwargs
    defaults = dict(kwargs)
    if not kwargs.get("base_url"):  # None, "" and the SDK's NotGiven
        defaults["base_url"] = default_base_url()
    if not kwargs.get("api_key") and not kwargs.get("workload_identity"):
        defaults["api_key"] = default_api_key()
    return defaults


def _session(conversation_id: str | None, counter: TokenCounter | None) -> _Session:
    own = None if conversation_id is None else Conversation(conversation_id, counter=counter)
    return _Session(conversation=own, counter=counter)


def _given_headers(options: Any) -> dict[str, Any]:
    return dict(options.headers) if isinstance(options.headers, Mapping) else {}


def _observe(response: Any) -> None:
    """Give an answer's headers to the conversation its request was tagged in, if it lives."""
    request = getattr(response, "request", None)
    turn_id = None if request is None else request.headers.get(wire.TURN_ID)
    conversation = None if turn_id is None else conversation_of(turn_id)
    if conversation is not None:
        conversation.observe(response.headers, turn_id=turn_id)


def _failed(options: Any) -> None:
    """Tell the conversation that a call was not answered. Never raises."""
    try:
        taken = wire.TURN_ID.lower()
        given = _given_headers(options)
        turn_id = next((value for name, value in given.items() if name.lower() == taken), None)
        conversation = conversation_of(turn_id) if isinstance(turn_id, str) else None
        if conversation is not None and isinstance(turn_id, str):
            body = options.json_data if isinstance(options.json_data, Mapping) else {}
            conversation.failed(turn_id, prompt_of(body))
    except _TAGGING_ERRORS as error:
        warn_once("failed", "a failed call was not noted: %r", error)
