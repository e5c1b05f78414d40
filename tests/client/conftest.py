"""Fixtures of the client layer's tests: a scripted server, and an environment without settings."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conserve_agents import logs


def _load(name: str) -> Any:
    """A module beside this file: test folders are not packages."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


fake_openai = _load("fake_openai")


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
    with fake_openai.FakeOpenAI() as fake:
        yield fake


@pytest.fixture
def reply() -> Any:
    """The class of scripted answers."""
    return fake_openai.Reply
