"""``ChatConServe``: ``ChatOpenAI`` whose calls say which conversation they belong to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_openai import ChatOpenAI
from pydantic import Field, SecretStr, model_validator

from conserve_agents import ConServeError, Gateway, TokenCounter, wire
from conserve_agents.conversation import end_all
from conserve_agents.gateway import default_api_key, default_base_url
from conserve_agents.logs import warn_once
from conserve_agents.openai import AsyncConServeOpenAI, ConServeOpenAI
from conserve_agents.turns import prompt_of
from langchain_conserve import identity
from langchain_conserve.identity import Call, CallSite, account, call_site

#: How a call's origin travels from ``invoke`` to the payload; never sent, traced or cached.
_SITE: Final = "conserve_call_site"
#: What telling conversations apart can fail with, should LangChain's insides change.
_TAGGING_ERRORS: Final = (ConServeError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(slots=True)
class _Tagging:
    """Carries a call from where it is made to its payload, where it is tagged, and back."""

    site: CallSite
    call: Call | None = None


class ChatConServe(ChatOpenAI):
    """``ChatOpenAI`` for a ConServe gateway; swapping the class is all it takes.

    Every call is tagged with its conversation: inside LangGraph that is the run's ``thread_id``,
    sub-agents apart; outside of a graph the ``thread_id`` of the call's ``config``; within a
    ``conserve_agents.conversation()`` that one. Without any of them calls go untagged and the
    gateway tells conversations apart by their messages.

    Differs from ``ChatOpenAI`` in these defaults: ``base_url`` (``CONSERVE_BASE_URL``, else
    ``http://127.0.0.1:8000/v1``), ``api_key`` (``CONSERVE_API_KEY``, else a placeholder; never
    ``OPENAI_API_KEY``), ``stream_usage`` on, ``use_responses_api`` off. ``token_counter`` counts
    first turns (bytes / 4 when None); one that does I/O blocks the event loop once per
    conversation.
    """

    openai_api_base: str | None = Field(default_factory=default_base_url, alias="base_url")
    openai_api_key: SecretStr | Callable[[], str] | Callable[[], Any] | None = Field(
        default_factory=lambda: SecretStr(default_api_key()), alias="api_key"
    )
    stream_usage: bool | None = True
    use_responses_api: bool | None = False
    token_counter: TokenCounter | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _read_placements(self) -> Self:
        """Replace the clients the parent made by ones that read the gateway's response headers.

        They share its connections. Clients the caller brought are left alone.
        """
        common: dict[str, Any] = {
            "organization": self.openai_organization,
            "base_url": self.openai_api_base,
            "timeout": self.request_timeout,
            "default_headers": self.default_headers,
            "default_query": self.default_query,
        }
        if self.max_retries is not None:
            common["max_retries"] = self.max_retries
        for name, ours, chat in (
            ("root_client", ConServeOpenAI, "client"),
            ("root_async_client", AsyncConServeOpenAI, "async_client"),
        ):
            made = getattr(self, name)
            if made is None or isinstance(made, ours):
                continue
            key = getattr(made, "_api_key_provider", None) or made.api_key
            client = ours(api_key=key, http_client=made._client, **common)
            setattr(self, name, client)
            setattr(self, chat, client.chat.completions)
        return self

    # --- where a call comes from: read when it is made, and carried to its payload -----------

    def invoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        return super().invoke(input, config, **_with_site(config, kwargs))

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        return await super().ainvoke(input, config, **_with_site(config, kwargs))

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        return super().stream(input, config, **_with_site(config, kwargs))

    def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        return super().astream(input, config, **_with_site(config, kwargs))

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return super().stream_events(input, config, **_with_site(config, kwargs))

    def astream_events(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Any:
        return super().astream_events(input, config, **_with_site(config, kwargs))

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        kwargs.pop(_SITE, None)
        # Equal model names at two gateways are two models.
        return f"{self._address} {super()._get_llm_string(stop=stop, **kwargs)}"

    def _get_invocation_params(
        self, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        kwargs.pop(_SITE, None)
        return super()._get_invocation_params(stop=stop, **kwargs)

    # --- the call, from its tag to its end ---------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        with _followed(kwargs) as followed:
            return super()._generate(*args, **followed)

    async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
        with _followed(kwargs) as followed:
            return await super()._agenerate(*args, **followed)

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        with _followed(kwargs) as followed:
            yield from super()._stream(*args, **followed)

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        with _followed(kwargs) as followed:
            async for chunk in super()._astream(*args, **followed):
                yield chunk

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Called once per logical call, on every path: the tag is made here."""
        tagging = kwargs.pop(_SITE, None)
        if not isinstance(tagging, _Tagging):
            tagging = _Tagging(call_site())
        payload: dict[str, Any] = super()._get_request_payload(input_, stop=stop, **kwargs)
        try:
            headers = self._headers(tagging, payload, self._messages(input_))
        except _TAGGING_ERRORS as error:
            warn_once("tag", "model call sent untagged, for tagging it failed: %r", error)
        else:
            if headers:
                payload["extra_headers"] = headers
        return payload

    def _messages(self, input_: LanguageModelInput) -> Sequence[BaseMessage]:
        if isinstance(input_, list) and all(isinstance(part, BaseMessage) for part in input_):
            return input_  # as LangChain itself calls it; converting would validate it once more
        return self._convert_input(input_).to_messages()

    def _headers(
        self, tagging: _Tagging, payload: dict[str, Any], messages: Sequence[BaseMessage]
    ) -> dict[str, Any]:
        """The call's extra headers: those it has, with its tag."""
        given: dict[str, Any] = dict(payload.get("extra_headers") or {})
        taken = wire.CONVERSATION_ID.lower()
        if any(name.lower() == taken for name in (*given, *(self.default_headers or {}))):
            return given
        call = tagging.call = identity.known.begin(tagging.site, messages, gateway=self._account)
        if call is None:
            return given
        call.conversation.use_gateway(self._gateway)
        tags = call.conversation.headers_for(
            prompt_of(payload), payload.get("tools"), counter=self.token_counter
        )
        return {**given, **tags}

    # --- life cycle --------------------------------------------------------------------------

    def end_thread(self, thread_id: str) -> int:
        """End a thread's conversations at the gateway, its sub-agents' included.

        A thread goes on for as long as its user comes back, so nothing but its owner can tell its
        end; one that is not ended ends at the gateway by being idle. Never raises.

        Returns:
            How many the gateway confirmed.
        """
        return end_all(identity.known.forget(str(thread_id), gateway=self._account))

    async def aend_thread(self, thread_id: str) -> int:
        """:meth:`end_thread` without blocking the event loop."""
        return await asyncio.to_thread(self.end_thread, thread_id)

    @property
    def _address(self) -> str:
        return self.openai_api_base or default_base_url()

    @property
    def _account(self) -> str:
        return account(self._address, self.openai_api_key)

    def _gateway(self) -> Gateway:
        key = getattr(self.root_async_client, "api_key", "") or default_api_key()
        return Gateway(self._address, headers={"Authorization": f"Bearer {key}"})

    # --- what LangChain wants to know of the class -------------------------------------------

    @property
    def _llm_type(self) -> str:
        return "conserve-chat"

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """No: ``langchain_core.load`` has a fixed list of classes, and would look for the key in
        ``OPENAI_API_KEY``."""
        return False


def _with_site(config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    if isinstance(kwargs.get(_SITE), CallSite):
        return kwargs  # stream() falls back to invoke()
    return {**kwargs, _SITE: call_site(config)}


@contextlib.contextmanager
def _followed(kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Note when the call made in the block has come back, or its stream is left."""
    site = kwargs.get(_SITE)
    tagging = _Tagging(site if isinstance(site, CallSite) else call_site())
    try:
        yield {**kwargs, _SITE: tagging}
    finally:
        if tagging.call is not None:
            tagging.call.end()
