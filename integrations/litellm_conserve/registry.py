"""Making LiteLLM know the provider and its models."""

from __future__ import annotations

from typing import Any, Final

import litellm
from litellm.utils import custom_llm_setup

from conserve_agents import Gateway, GatewayError, TokenCounter
from conserve_agents.logs import warn_once
from litellm_conserve.errors import PROVIDER
from litellm_conserve.handler import ConServeLLM

#: The handler of this process; a proxy's ``custom_handler``.
provider: Final = ConServeLLM()
end_session: Final = provider.end_session
aend_session: Final = provider.aend_session

#: What LiteLLM and the frameworks on it want to know of a model before they offer it tools.
_ABILITIES: Final = {
    "litellm_provider": PROVIDER,
    "mode": "chat",
    "supports_function_calling": True,
    "supports_parallel_function_calling": True,
    "supports_tool_choice": True,
    "supports_response_schema": True,
    "supports_system_messages": True,
    "supports_native_streaming": True,
    "supports_prompt_caching": True,
}


def register(
    *models: str,
    api_base: str | None = None,
    api_key: str | None = None,
    token_counter: TokenCounter | None = None,
    **info: Any,
) -> ConServeLLM:
    """Make ``conserve/<model>`` work in this process. May be called again.

    Args:
        models: names of the gateway's models, so that ``litellm.supports_function_calling`` and
            its like know them; none: the gateway is asked (one that cannot be is logged, and calls
            work all the same).
        api_base, api_key: whom to ask; None: see :class:`ConServeLLM`.
        token_counter: counts first turns; None: bytes / 4.
        info: more about the models, as for ``litellm.register_model``: prices, ``supports_vision``,
            ``max_input_tokens``.

    Returns:
        The handler.

    Raises:
        GatewayUrlError: ``api_base`` is not an http or https URL.
    """
    others = [item for item in litellm.custom_provider_map if item["provider"] != PROVIDER]
    litellm.custom_provider_map = [*others, {"provider": PROVIDER, "custom_handler": provider}]
    custom_llm_setup()
    provider.count_with(token_counter)
    names = models or _served(api_base, api_key)
    if names:
        litellm.register_model({f"{PROVIDER}/{name}": {**_ABILITIES, **info} for name in names})
    return provider


def _served(api_base: str | None, api_key: str | None) -> tuple[str, ...]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
    gateway = Gateway(api_base, headers=headers)
    try:
        return tuple(gateway.models())
    except GatewayError as error:
        warn_once("models", "LiteLLM was not told of the gateway's models: %s", error)
        return ()
