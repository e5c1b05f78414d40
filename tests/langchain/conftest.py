"""Fixtures of the LangChain tests: the client tests' scripted server, and a fresh memory."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from pytest_asyncio import is_async_test

from conserve_agents import logs
from langchain_conserve import identity
from langchain_conserve.identity import Conversations


def _load_fake() -> Any:
    """The scripted server of tests/client: test folders are not packages."""
    name = "fake_openai"
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "client" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


fake_openai = _load_fake()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run this folder's async tests in one event loop, and none of them from a recording.

    langchain-openai keeps one async client per address, and a client belongs to one loop.
    ``vcr`` (of ``test_stream_time``) would write a file beside the test.
    """
    here = Path(__file__).parent
    for item in items:
        if not item.path.is_relative_to(here):
            continue
        item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "vcr"]
        if is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches a test, nor a conversation of another test."""
    for name in (
        *("CONSERVE_BASE_URL", "CONSERVE_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"),
        *("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(identity, "known", Conversations())
    monkeypatch.setattr(logs, "_seen", set())


@pytest.fixture
def server() -> Iterator[Any]:
    with fake_openai.FakeOpenAI() as fake:
        yield fake


@pytest.fixture
def reply() -> Any:
    """The class of scripted answers."""
    return fake_openai.Reply


@pytest.fixture(scope="session")
def cluster(
    conserve_up: Callable[[Path], AbstractContextManager[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Address of a real gateway over emulated engines, as `conserve up` starts them."""
    with conserve_up(tmp_path_factory.mktemp("cluster")) as url:
        yield f"{url}/v1"
