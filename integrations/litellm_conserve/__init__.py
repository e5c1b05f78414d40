"""ConServe for LiteLLM: ``conserve/<model>`` in its SDK, its Router and its proxy.

    import litellm, litellm_conserve

    litellm_conserve.register()
    litellm.completion("conserve/<model>", messages=…, litellm_session_id="customer-7")

In a proxy's ``config.yaml`` (``python -m litellm_conserve`` says where a ready one lies) name
``litellm_conserve.provider`` as the custom handler, and ``litellm_conserve.proxy_hook`` among the
callbacks where calls reach the gateway through another provider.

The modules, each on those before it: ``errors`` (LiteLLM's exceptions for the SDK's) · ``request``
(what LiteLLM passes, and the SDK's form of it) · ``clients`` (one per address and event loop) ·
``identity`` (whose call it is) · ``sessions`` (their conversations) · ``stream`` · ``handler`` ·
``registry`` · ``hook``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from litellm_conserve.handler import ConServeLLM
    from litellm_conserve.hook import ConServeProxyHook, proxy_hook
    from litellm_conserve.registry import aend_session, end_session, provider, register

#: A configuration of LiteLLM's proxy to start from.
CONFIG: Final = Path(__file__).with_name("config.yaml")

_MODULES: Final = {
    "ConServeLLM": "handler",
    "ConServeProxyHook": "hook",
    "proxy_hook": "hook",
    "aend_session": "registry",
    "end_session": "registry",
    "provider": "registry",
    "register": "registry",
}

__all__ = [
    "CONFIG",
    "ConServeLLM",
    "ConServeProxyHook",
    "aend_session",
    "end_session",
    "provider",
    "proxy_hook",
    "register",
]


def __getattr__(name: str) -> Any:
    """Import on first use: LiteLLM takes seconds, and looks for prices on the network."""
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name not in ("litellm", "openai"):
            raise
        raise ImportError(
            "litellm_conserve needs LiteLLM: pip install 'conserve-agents[litellm]'"
        ) from error
