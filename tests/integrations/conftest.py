"""Fixtures of the integration tests: a real gateway over emulated engines, and what watches it.

Imports no framework: every environment of the matrix (see the Makefile) loads this file.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from conserve_agents import Gateway, logs

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _load(path: Path) -> Any:
    """A module by its file: test folders are not packages."""
    name = path.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


fake_openai = _load(HERE.parent / "client" / "fake_openai.py")
recording_proxy = _load(HERE / "recording_proxy.py")
matrix = _load(HERE / "matrix.py")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches a test, and every test sees its own first warning."""
    for name in (
        *("CONSERVE_BASE_URL", "CONSERVE_API_KEY"),
        *("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID"),
        *("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logs, "_seen", set())


@pytest.fixture
def server() -> Iterator[Any]:
    """The scripted server of tests/client, in the gateway's place."""
    with fake_openai.FakeOpenAI() as fake:
        yield fake


@pytest.fixture
def reply() -> Any:
    """The class of its scripted answers."""
    return fake_openai.Reply


@pytest.fixture(scope="session")
def cluster(
    conserve_up: Callable[[Path], AbstractContextManager[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Address of a real gateway over emulated engines, as `conserve up` starts them."""
    with conserve_up(tmp_path_factory.mktemp("cluster")) as url:
        yield f"{url}/v1"


@pytest.fixture
def gateway(cluster: str) -> Gateway:
    """The gateway's own API, with the key that clients without one send."""
    return Gateway(cluster)


@pytest.fixture
def model_name(gateway: Gateway) -> str:
    """The model it serves."""
    return gateway.models()[0]


@pytest.fixture
def proxy(cluster: str) -> Iterator[Any]:
    """A `RecordingProxy` in front of the gateway: point a client at its ``base_url``."""
    with recording_proxy.RecordingProxy(cluster) as made:
        yield made


@pytest.fixture(scope="session")
def english() -> str:
    """About 8 kB of English prose."""
    text = (ROOT / "docs" / "decisions" / "0001-conversation-is-the-unit.md").read_text("utf-8")
    return (text * 4)[:8000]


@pytest.fixture(scope="session")
def code() -> str:
    """About 8 kB of Python."""
    path = ROOT / "serving" / "conserve_serving" / "core" / "scheduler.py"
    return path.read_text("utf-8")[:8000]


@pytest.fixture(params=["english", "code"])
def case(request: pytest.FixtureRequest, proxy: Any, gateway: Gateway, model_name: str) -> Any:
    """A `matrix.Case`: its question comes after prose once, after code once."""
    text: str = request.getfixturevalue(request.param)
    question = f"{text}\n\n{matrix.QUESTION}"
    return matrix.Case(proxy=proxy, gateway=gateway, model=model_name, question=question)
