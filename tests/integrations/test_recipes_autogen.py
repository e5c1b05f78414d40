"""docs/clients/autogen.md: AutoGen's AgentChat on our client."""

from __future__ import annotations

from typing import Any

import pytest

from conserve_agents import conversation
from conserve_agents.openai import AsyncConServeOpenAI

pytest.importorskip("autogen_agentchat", reason="only where autogen-agentchat is installed")


def make_agent(
    case: Any, name: str = "helper", own: str | None = None, **options: Any
) -> tuple[Any, Any]:
    from autogen_agentchat.agents import AssistantAgent  # noqa: PLC0415 - optional
    from autogen_core.models import ModelFamily, ModelInfo  # noqa: PLC0415 - optional
    from autogen_ext.models.openai import BaseOpenAIChatCompletionClient  # noqa: PLC0415 - same

    client = AsyncConServeOpenAI(base_url=case.proxy.base_url, conversation_id=own)
    info = ModelInfo(
        family=ModelFamily.UNKNOWN,
        function_calling=True,
        json_output=True,
        multiple_system_messages=True,
        structured_output=True,
        vision=False,
    )
    model = BaseOpenAIChatCompletionClient(
        client=client, create_args={"model": case.model}, model_info=info
    )
    agent = AssistantAgent(name, model, tools=list(case.tools), max_tool_iterations=5, **options)
    return client, agent


async def test_a_run_and_its_follow_up_are_one_conversation(case: Any) -> None:
    case.proxy.refuse(1, 3)
    client, agent = make_agent(case)
    async with client, conversation():
        result = await agent.run(task=case.question)
        assert "sunny" in result.messages[-1].to_text()
        await agent.run(task=case.follow_up)
    assert case.turns > 3
    case.served_as_one(turns=case.turns)


async def test_streamed(case: Any) -> None:
    case.proxy.refuse(2)
    client, agent = make_agent(case, model_client_stream=True)
    async with client, conversation():
        last = [event async for event in agent.run_stream(task=case.question)][-1]
        assert "sunny" in last.messages[-1].to_text()
    case.served_as_one(turns=3)


async def test_each_agent_of_a_team_may_have_a_conversation_of_its_own(
    case: Any, request: pytest.FixtureRequest
) -> None:
    from autogen_agentchat.teams import RoundRobinGroupChat  # noqa: PLC0415 - optional

    names = ("writer", "critic")
    own = {name: f"{name}-{request.node.callspec.id}" for name in names}
    made = [make_agent(case, name, own[name]) for name in names]
    team = RoundRobinGroupChat([agent for _, agent in made], max_turns=4)
    await team.run(task=case.question)
    for client, _ in made:
        await client.close()
    assert {call.conversation for call in case.proxy.calls} == set(own.values())
    for id_ in own.values():
        calls = [call for call in case.proxy.calls if call.conversation == id_]
        assert [call.turn_index for call in calls] == list(range(1, len(calls) + 1))
        seen = case.gateway.conversation(id_)
        assert (seen["state"], seen["turns"], seen["transfers"]) == ("ended", len(calls), 1)
        assert len({turn["decode_engine"] for turn in seen["recent_turns"]}) == 1
