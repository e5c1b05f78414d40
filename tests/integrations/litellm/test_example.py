"""The example agent: its tools, and its whole loop through a real gateway."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("litellm", reason="LiteLLM has its own environment: test-litellm")

from conserve_agents import Gateway

EXAMPLE = Path(__file__).parents[3] / "example_agents" / "litellm_agent"


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its module; other examples have one called ``agent`` too."""
    monkeypatch.syspath_prepend(EXAMPLE)
    spec = importlib.util.spec_from_file_location("litellm_agent", EXAMPLE / "agent.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def log(agent: Any, tmp_path: Path) -> Any:
    lines = ["INFO up", "WARN Disk slow", "ERROR disk full", "nothing in particular"]
    (tmp_path / "a.log").write_text("\n".join(lines))
    return agent.LogTools(tmp_path / "a.log")


def test_the_log_is_read(log: Any) -> None:
    assert log.call("count_by_level", "{}") == "1 INFO, 1 WARN, 1 ERROR, 1 none"
    assert log.call("search_log", '{"query": "DISK"}') == "2: WARN Disk slow\n3: ERROR disk full"
    assert log.call("search_log", '{"query": "full disk"}') == "3: ERROR disk full"
    assert log.call("search_log", '{"query": "fire"}') == "no line contains 'fire'"
    assert log.call("lines_around", '{"line": 1}').count("\n") == 3


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rm", "{}"),
        ("search_log", "{"),
        ("search_log", '{"query": " "}'),
        ("search_log", '{"words": "x"}'),
        ("lines_around", '{"line": 0}'),
        ("lines_around", '{"line": 5}'),
        ("lines_around", '{"line": "many"}'),
    ],
)
def test_what_a_model_gets_wrong_becomes_a_result(log: Any, name: str, arguments: str) -> None:
    assert log.call(name, arguments).startswith("error: ")


def test_answers_are_bounded(agent: Any, tmp_path: Path) -> None:
    (tmp_path / "long.log").write_text("ERROR and so on\n" * 500)
    found = agent.LogTools(tmp_path / "long.log").search_log("error")
    assert found.endswith("… and 470 more") and found.count("\n") == 30


def test_an_incident_is_looked_into(
    agent: Any, cluster: str, gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agent.main(["--gateway", cluster]) == 0
    printed = capsys.readouterr().out
    for tool in ("search_log", "count_by_level", "lines_around"):
        assert f"[{tool} " in printed
    assert "no database connection within 5000 ms" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("conversation "))
    assert "transfers  1 (1 × first_turn)" in printed and "J on all engines" in printed
    seen = gateway.conversation(line.split()[1].rstrip(":"))
    assert seen["state"] == "ended" and seen["turns"] >= 2 and seen["cached_tokens"] > 0


def test_a_gateway_that_is_not_there_is_said(
    agent: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agent.main(["--gateway", "http://127.0.0.1:9/v1"]) == 1
    assert "conserve up" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_said(
    agent: Any, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agent.main(["--gateway", cluster, "--model", "no-such-model"]) == 1
    assert "The model could not be asked" in capsys.readouterr().err


def test_a_log_that_is_not_there_is_said(agent: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        agent.main(["--log", "no-such.log"])
    assert "--log no-such.log" in capsys.readouterr().err
