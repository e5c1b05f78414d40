"""docs/clients/crewai.md: CrewAI through the interceptor it offers."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from conserve_agents import Conversation, conversation

#: Read when CrewAI is imported: without them it calls home and writes beside the user's data.
_QUIET = {
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_DISABLE_TRACKING": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "OTEL_SDK_DISABLED": "true",
}
if importlib.util.find_spec("crewai"):  # elsewhere other tests want their telemetry
    os.environ.update(_QUIET)
crewai = pytest.importorskip("crewai", reason="only where crewai is installed")


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it stores goes into the test's own folder."""
    monkeypatch.setenv("CREWAI_STORAGE_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))


def make_crew(case: Any, *, streamed: bool = False, own: Conversation | None = None) -> Any:
    from crewai.tools import tool  # noqa: PLC0415 - optional

    from conserve_agents.crewai import ConServeInterceptor  # noqa: PLC0415 - needs crewai

    llm = crewai.LLM(
        model=case.model,
        provider="openai",
        base_url=case.proxy.base_url,
        api_key="conserve",
        stream=streamed,
        interceptor=ConServeInterceptor(own),
    )
    agent = crewai.Agent(
        role="helper",
        goal="help",
        backstory="You help.",
        llm=llm,
        tools=[tool(one) for one in case.tools],
    )
    task = crewai.Task(description=case.question, expected_output="an answer", agent=agent)
    return crewai.Crew(agents=[agent], tasks=[task], verbose=False)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_crews_task_is_one_conversation(streamed: bool, case: Any) -> None:
    case.proxy.refuse(1, 3)
    with conversation():
        result = make_crew(case, streamed=streamed).kickoff()
    assert "sunny" in str(result)
    assert case.turns >= 3
    case.served_as_one(turns=case.turns)


async def test_async(case: Any) -> None:
    case.proxy.refuse(2)
    async with conversation():
        result = await make_crew(case).akickoff()
    assert "sunny" in str(result)
    case.served_as_one(turns=case.turns)


def test_an_interceptor_may_have_a_conversation_of_its_own(case: Any) -> None:
    own = Conversation()
    assert "sunny" in str(make_crew(case, own=own).kickoff())
    served = case.served_as_one(turns=case.turns)
    assert served.id == own.id and own.end()
