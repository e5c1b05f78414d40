"""Fixtures of the LiteLLM tests: run by ``make test-litellm``, in an environment of its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from typing import Any

import pytest

#: Before LiteLLM is imported: it would look for prices on the network.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
#: Seconds; the Router would wait for half a second and longer before each retry.
os.environ["INITIAL_RETRY_DELAY"] = "0.01"

_numbers = count(1)


@pytest.fixture(autouse=True)
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The registered handler, closed again; LiteLLM says nothing about itself."""
    litellm = pytest.importorskip("litellm")
    import litellm_conserve  # noqa: PLC0415 - not before LiteLLM is known to be there

    monkeypatch.setattr(litellm, "suppress_debug_info", True)
    monkeypatch.setattr(litellm, "num_retries", None)
    handler = litellm_conserve.register("fake-model", api_base="http://127.0.0.1:9")
    yield handler
    handler.close()


@pytest.fixture
async def aprovider(provider: Any) -> AsyncIterator[Any]:
    """For tests that call asynchronously: their connections end with their event loop."""
    yield provider
    await provider.aclose()


@pytest.fixture
def session() -> str:
    """A session id that no other test has."""
    return f"session-{os.getpid()}-{next(_numbers):04}"


@pytest.fixture
def ask(server: Any) -> dict[str, Any]:
    """A call of the scripted server's model."""
    messages = [{"role": "user", "content": "hi"}]
    return {"model": "conserve/fake-model", "messages": messages, "api_base": server.base_url}


@pytest.fixture
def turn(ask: dict[str, Any], session: str) -> dict[str, Any]:
    """The same call in a session."""
    return {**ask, "litellm_session_id": session}


@pytest.fixture
def refuse(server: Any, reply: Any) -> Callable[..., None]:
    """Make the scripted server refuse the next model calls, for no time at all."""

    def script(times: int = 1, *, status: int = 503, **headers: str) -> None:
        at_once = {"retry-after": "0", "retry-after-ms": "1"}
        server.script.extend([reply(status=status, headers=headers or at_once)] * times)

    return script


@pytest.fixture
def tags(server: Any) -> Callable[[str], list[str | None]]:
    """What the model calls so far carried in a header."""
    return lambda name: [call.tag(name) for call in server.calls]
