"""Fixtures of the LiteLLM tests: run by ``make test-litellm``, in an environment of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from conserve_agents import Gateway

#: Before LiteLLM is imported: it would look for prices on the network.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
#: Seconds; the Router would wait for half a second and longer before each retry.
os.environ["INITIAL_RETRY_DELAY"] = "0.01"

#: What clients of the proxies here send as their key.
MASTER_KEY = "sk-9f41c27d0b3e4a6688b2"
#: Far more than a proxy takes to start, on a machine that is busy.
PATIENCE_S = 180.0

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


# --- whole conversations: see matrix.py -------------------------------------------------------


@pytest.fixture
def schemas() -> Callable[[Any], list[Any]]:
    """Tool schemas of the matrix' functions."""

    def of(tools: Any) -> list[Any]:
        city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        return [
            {
                "type": "function",
                "function": {"name": t.__name__, "description": t.__doc__, "parameters": city},
            }
            for t in tools
        ]

    return of


@pytest.fixture
def results() -> Callable[[Any, Any], list[Any]]:
    """An assistant's message, and what its tool calls give."""

    def of(message: Any, tools: Any) -> list[Any]:
        named = {tool.__name__: tool for tool in tools}
        answers = [
            {
                "role": "tool",
                "tool_call_id": call.id,
                "content": named[call.function.name](**json.loads(call.function.arguments)),
            }
            for call in message.tool_calls or ()
        ]
        return [message.model_dump(exclude_none=True), *answers]

    return of


# --- LiteLLM's proxy --------------------------------------------------------------------------


@dataclass
class Wire:
    """What one test sees of a recording proxy that outlives it."""

    proxy: Any
    since: int

    @property
    def calls(self) -> list[Any]:
        calls: list[Any] = self.proxy.calls[self.since :]
        return calls

    def refuse(self, *numbers: int, status: int = 503) -> None:
        self.proxy.refuse(*numbers, status=status)

    def forgive(self) -> None:
        """Refuse nothing any more."""
        self.proxy._refusals.clear()


@pytest.fixture(scope="session")
def recorder(cluster: str) -> Iterator[Any]:
    """Between LiteLLM's proxies and the gateway."""
    with sys.modules["recording_proxy"].RecordingProxy(cluster) as made:
        yield made


@pytest.fixture
def between(recorder: Any) -> Iterator[Wire]:
    wire = Wire(recorder, len(recorder.calls))
    yield wire
    wire.forgive()


@pytest.fixture
def proxied_case(
    request: pytest.FixtureRequest, between: Wire, gateway: Gateway, model_name: str
) -> Any:
    """A `matrix.Case` whose calls go through one of LiteLLM's proxies."""
    matrix = sys.modules["matrix"]
    text: str = request.getfixturevalue(getattr(request, "param", "english"))
    question = f"{text}\n\n{matrix.QUESTION}"
    return matrix.Case(proxy=between, gateway=gateway, model=model_name, question=question)


@contextmanager
def litellm_proxy(config: Path, gateway: str, folder: Path) -> Iterator[str]:
    """A proxy process, ready; its address with ``/v1``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, str(Path(sys.executable).with_name("litellm"))]
    argv += ["--config", str(config)]
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "LITELLM_MASTER_KEY": MASTER_KEY, "CONSERVE_BASE_URL": gateway}
    with (folder / "proxy.log").open("w") as log:
        process = subprocess.Popen(  # noqa: S603 - LiteLLM's own command
            argv, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        up = threading.Event()

        def follow() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line.decode(errors="replace"))
                log.flush()
                if b"Application startup complete" in line:
                    up.set()
            up.set()  # or it died

        reader = threading.Thread(target=follow, daemon=True)
        reader.start()
        try:
            if not up.wait(PATIENCE_S) or process.poll() is not None:
                pytest.fail(f"litellm: {(folder / 'proxy.log').read_text()[-4000:]}")
            yield f"http://127.0.0.1:{port}/v1"
            process.terminate()
            process.wait(timeout=30)
        finally:
            process.kill()
            process.wait()
            reader.join()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture(scope="session")
def ready_proxy(recorder: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """LiteLLM's proxy with the configuration that the package ships."""
    pytest.importorskip("litellm")
    argv = [sys.executable, "-m", "litellm_conserve"]
    where = subprocess.check_output(argv, text=True).strip()  # noqa: S603 - our own module
    folder = tmp_path_factory.mktemp("ready")
    with litellm_proxy(Path(where), recorder.base_url, folder) as url:
        yield url


#: Stock providers, and one model each for the hook and for the provider alone.
ZERO_CODE = """
model_list:
  - model_name: as-it-is
    litellm_params: &gateway
      model: openai/{model}
      api_base: {url}
      api_key: conserve
  - model_name: affine
    litellm_params:
      <<: *gateway
      provider_affinity_header: X-Session-ID
  - model_name: tagged-by-hook
    litellm_params: *gateway
  - model_name: provider-without-hook
    litellm_params: {{model: conserve/{model}, api_base: {url}}}
litellm_settings:
  callbacks: ["some_models.hook"]
  custom_provider_map: [{{provider: conserve, custom_handler: litellm_conserve.provider}}]
general_settings:
  master_key: os.environ/LITELLM_MASTER_KEY
  forward_client_headers_to_llm_api: true
"""


HOOK = """
from litellm_conserve import ConServeProxyHook

hook = ConServeProxyHook(models={"tagged-by-hook"})
"""


@pytest.fixture(scope="session")
def zero_code_proxy(
    recorder: Any, cluster: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """LiteLLM's proxy with stock providers that point at the gateway."""
    pytest.importorskip("litellm")
    folder = tmp_path_factory.mktemp("zero-code")
    config = folder / "config.yaml"
    model = Gateway(cluster).models()[0]
    config.write_text(ZERO_CODE.format(model=model, url=recorder.base_url))
    (folder / "some_models.py").write_text(HOOK)
    with litellm_proxy(config, recorder.base_url, folder) as url:
        yield url


@pytest.fixture
def key() -> str:
    return MASTER_KEY
