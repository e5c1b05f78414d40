"""docs/clients/pydantic-ai.md: Pydantic AI on our client."""

from __future__ import annotations

from typing import Any

import pytest

from conserve_agents import conversation
from conserve_agents.openai import AsyncConServeOpenAI

pydantic_ai = pytest.importorskip("pydantic_ai", reason="only where pydantic-ai is installed")


def make_agent(case: Any, api: str = "OpenAIChatModel") -> tuple[Any, Any]:
    from pydantic_ai.models import openai as models  # noqa: PLC0415 - optional
    from pydantic_ai.providers.openai import OpenAIProvider  # noqa: PLC0415 - optional

    client = AsyncConServeOpenAI(base_url=case.proxy.base_url)
    model = getattr(models, api)(case.model, provider=OpenAIProvider(openai_client=client))
    return client, pydantic_ai.Agent(model, tools=list(case.tools))


@pytest.mark.parametrize("api", ["OpenAIChatModel", "OpenAIResponsesModel"])
async def test_a_run_and_its_follow_up_are_one_conversation(api: str, case: Any) -> None:
    case.proxy.refuse(1, 3)
    client, agent = make_agent(case, api)
    async with client, conversation():
        result = await agent.run(case.question)
        assert "sunny" in result.output
        await agent.run(case.follow_up, message_history=result.all_messages())
    assert case.turns > 3
    case.served_as_one(turns=case.turns)


async def test_streamed(case: Any) -> None:
    case.proxy.refuse(2)
    client, agent = make_agent(case)
    async with client, conversation(), agent.run_stream(case.question) as result:
        assert "sunny" in await result.get_output()
    case.served_as_one(turns=3)


def test_without_async(case: Any) -> None:
    case.proxy.refuse(2)
    _, agent = make_agent(case)
    with conversation():
        assert "sunny" in agent.run_sync(case.question).output
    case.served_as_one(turns=3)
