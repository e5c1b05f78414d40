"""docs/clients/smolagents.md: smolagents on our client."""

from __future__ import annotations

from typing import Any

import pytest

from conserve_agents import conversation
from conserve_agents.openai import ConServeOpenAI

smolagents = pytest.importorskip("smolagents", reason="only where smolagents is installed")


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_run_and_its_follow_up_are_one_conversation(streamed: bool, case: Any) -> None:
    case.proxy.refuse(1, 3)
    client = ConServeOpenAI(base_url=case.proxy.base_url)
    agent = smolagents.ToolCallingAgent(
        tools=[smolagents.tool(tool) for tool in case.tools],
        model=smolagents.OpenAIModel(case.model, client=client),
        stream_outputs=streamed,
        verbosity_level=smolagents.LogLevel.OFF,
    )
    with client, conversation():
        agent.run(case.question)
        first = case.turns
        agent.run(case.follow_up, reset=False)
    assert 3 <= first < case.turns
    case.served_as_one(turns=case.turns)
