"""What LiteLLM passes to a custom provider, and the OpenAI SDK's form of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import openai
from openai.resources.chat import Completions

from conserve_agents import Gateway, GatewayUrlError
from litellm_conserve.errors import bad_parameter

#: Parameters the SDK has a name for; all others travel in ``extra_body``.
_NAMED: Final = frozenset(inspect.signature(Completions.create).parameters) - {"self"}
#: LiteLLM's own, which it leaves among the parameters; and what is decided here.
_DROPPED: Final = frozenset(
    {"max_retries", "drops_unsupported", "stream", "extra_headers", "extra_body"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of LiteLLM's.

    Attributes:
        model: as the gateway knows it, without ``conserve/``.
        arguments: for the SDK's ``create``: model, messages, parameters, headers, timeout.
        headers: those of ``arguments``.
        gateway: where it goes.
        api_key: None: see ``conserve_agents.gateway.default_api_key``.
        retries: retries that LiteLLM was asked for.
        client: a client that the caller brought.
    """

    model: str
    arguments: dict[str, Any]
    headers: dict[str, str]
    gateway: Gateway
    api_key: str | None
    retries: int
    client: Any

    @property
    def base_url(self) -> str:
        """The gateway's address with ``/v1``, which may be left out in ``api_base``."""
        return f"{self.gateway.root}/v1"

    def streamed(self) -> dict[str, Any]:
        """The arguments for a stream. It always reports its usage: LiteLLM shows it if asked to."""
        options = {**(self.arguments.get("stream_options") or {}), "include_usage": True}
        return {**self.arguments, "stream": True, "stream_options": options}


def read(given: Mapping[str, Any]) -> Request:
    """The request in what LiteLLM calls a handler with.

    Raises:
        litellm.BadRequestError: ``api_base`` is not an http or https URL.
    """
    model, params = given["model"], given.get("optional_params") or {}
    api_key = given.get("api_key") or None
    try:
        gateway = Gateway(given.get("api_base") or None)
    except GatewayUrlError as error:
        raise bad_parameter("api_base", error, model=model) from error
    headers = {**(params.get("extra_headers") or {}), **(given.get("headers") or {})}
    arguments: dict[str, Any] = {
        "model": model,
        "messages": _plain(given["messages"]),
        "extra_headers": headers,
    }
    extra = dict(params.get("extra_body") or {})
    for name, value in params.items():
        if name not in _DROPPED:
            (arguments if name in _NAMED else extra)[name] = value
    if arguments.get("tools") == []:
        del arguments["tools"]  # servers differ in what they make of an empty list
    if extra:
        arguments["extra_body"] = extra
    timeout = _timeout(given.get("timeout"))
    if timeout is not None:
        arguments["timeout"] = timeout
    return Request(
        model=model,
        arguments=arguments,
        headers=headers,
        gateway=gateway,
        api_key=api_key,
        retries=int(params.get("max_retries") or 0),
        client=given.get("client"),
    )


def _plain(value: Any) -> Any:
    """Messages as JSON has them: LiteLLM lets its own message and tool call objects through."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    dump = getattr(value, "model_dump", None)
    return dump(exclude_none=True) if callable(dump) else value


def _timeout(given: Any) -> Any:
    """Seconds, or the SDK's own timeout: LiteLLM's is that of httpx, openai 3 wants httpx2's."""
    if given is None or isinstance(given, int | float | openai.Timeout):
        return given
    if isinstance(given, str):
        return float(given)
    return openai.Timeout(
        connect=given.connect, read=given.read, write=given.write, pool=given.pool
    )
