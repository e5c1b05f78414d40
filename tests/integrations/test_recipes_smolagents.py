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


def test_a_managed_agent_is_a_conversation_of_its_own(case: Any) -> None:
    class Expert(smolagents.ToolCallingAgent):  # type: ignore[misc] # no types here
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with conversation():
                return super().__call__(*args, **kwargs)

    client = ConServeOpenAI(base_url=case.proxy.base_url)
    model = smolagents.OpenAIModel(case.model, client=client)
    quiet = {"model": model, "verbosity_level": smolagents.LogLevel.OFF}
    tools = [smolagents.tool(tool) for tool in case.tools]
    expert = Expert(tools=tools, name="expert", description="Knows cities.", **quiet)
    manager = smolagents.ToolCallingAgent(tools=[], managed_agents=[expert], **quiet)
    with client, conversation() as talk:
        manager.run("Ask the expert. The task is: tell the weather report of the city.")
    children = {call.conversation for call in case.proxy.calls} - {talk.id}
    assert children  # one for each time that the manager asked
    for child in children:
        seen = case.gateway.conversation(child)
        assert (seen["parent"], seen["state"]) == (talk.id, "ended")
        calls = [call for call in case.proxy.calls if call.conversation == child]
        assert [call.turn_index for call in calls] == list(range(1, seen["turns"] + 1))
    assert case.gateway.conversation(talk.id)["turns"] >= 2
