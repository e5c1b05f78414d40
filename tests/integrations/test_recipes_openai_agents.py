"""docs/clients/openai-agents.md: the OpenAI Agents SDK on our client."""

from __future__ import annotations

from typing import Any

import pytest

from conserve_agents import conversation
from conserve_agents.openai import AsyncConServeOpenAI

agents = pytest.importorskip("agents", reason="only where openai-agents is installed")


@pytest.fixture(autouse=True)
def _no_telemetry() -> None:
    agents.set_tracing_disabled(True)


def make_agent(case: Any, model_class: Any) -> tuple[Any, Any]:
    client = AsyncConServeOpenAI(base_url=case.proxy.base_url)
    tools = [agents.function_tool(tool) for tool in case.tools]
    model = model_class(model=case.model, openai_client=client)
    return client, agents.Agent(name="helper", instructions="Help.", tools=tools, model=model)


@pytest.mark.parametrize("api", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
async def test_a_run_and_its_follow_up_are_one_conversation(api: str, case: Any) -> None:
    case.proxy.refuse(1, 3)
    client, agent = make_agent(case, getattr(agents, api))
    async with client, conversation():
        result = await agents.Runner.run(agent, case.question)
        assert "sunny" in result.final_output
        goes_on = [*result.to_input_list(), {"role": "user", "content": case.follow_up}]
        await agents.Runner.run(agent, goes_on)
    assert case.turns > 3
    case.served_as_one(turns=case.turns)


async def test_streamed(case: Any) -> None:
    case.proxy.refuse(2)
    client, agent = make_agent(case, agents.OpenAIChatCompletionsModel)
    async with client, conversation():
        result = agents.Runner.run_streamed(agent, case.question)
        kinds = {event.type async for event in result.stream_events()}
        assert "raw_response_event" in kinds and "sunny" in result.final_output
    case.served_as_one(turns=3)


async def test_an_agent_as_a_tool_is_a_conversation_of_its_own(case: Any) -> None:
    client, expert = make_agent(case, agents.OpenAIChatCompletionsModel)

    @agents.function_tool
    async def travel_advice(question: str) -> str:
        """Give travel advice.

        Args:
            question: what to advise on
        """
        async with conversation():
            return str((await agents.Runner.run(expert, case.question)).final_output)

    model = agents.OpenAIChatCompletionsModel(model=case.model, openai_client=client)
    lead = agents.Agent(name="lead", tools=[travel_advice], model=model)
    async with client, conversation() as talk:
        await agents.Runner.run(lead, "Ask for travel advice about a question.")
    (sub,) = {call.conversation for call in case.proxy.calls} - {talk.id}
    seen = case.gateway.conversation(sub)
    assert (seen["parent"], seen["turns"], seen["state"]) == (talk.id, 3, "ended")
    assert case.gateway.conversation(talk.id)["turns"] == 2
