"""The client layer against the real gateway: the tag arrives, and what it is for happens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from conserve_agents import Gateway, ServerTokenCounter, TurnReport, conversation, propagate
from conserve_agents.openai import AsyncConServeOpenAI, ConServeOpenAI
from langchain_conserve import ChatConServe


@pytest.fixture
def gateway(cluster: str) -> Gateway:
    return Gateway(cluster)


@pytest.fixture
def model_name(gateway: Gateway) -> str:
    return gateway.models()[0]


def test_a_conversation_is_served_as_one(cluster: str, gateway: Gateway, model_name: str) -> None:
    messages: list[Any] = [{"role": "user", "content": "Tell me about prefill. " * 200}]
    reports: list[TurnReport] = []
    client = ConServeOpenAI(base_url=cluster, token_counter=ServerTokenCounter(gateway))
    with client, conversation("served/as|one%2F") as talk:
        for n in range(3):
            call = {"model": model_name, "messages": messages, "max_tokens": 30}
            reply = client.chat.completions.create(**call).choices[0].message
            assert talk.last_report is not None
            reports.append(talk.last_report)
            messages += [reply.model_dump(exclude_none=True), {"role": "user", "content": f"{n}?"}]
        seen = gateway.conversation(talk.id)
    assert {r.identity_source for r in reports} == {"conserve"}
    assert [r.turn_index for r in reports] == [1, 2, 3]
    assert len({r.decode_engine for r in reports}) == 1
    assert [r.transfers for r in reports] == [1, 1, 1]
    assert reports[2].cached_tokens > reports[1].cached_tokens > 0  # type: ignore[operator]
    assert all(r.placement for r in reports)
    assert seen["first_turn_tokens"] == talk.first_turn_tokens
    assert gateway.conversation(talk.id)["state"] == "ended"


async def test_async_streams_are_one_conversation_too(
    cluster: str, gateway: Gateway, model_name: str
) -> None:
    async with AsyncConServeOpenAI(base_url=cluster) as client, conversation() as talk:
        for _ in range(2):
            call: Any = {"model": model_name, "messages": [{"role": "user", "content": "hi"}]}
            async with client.chat.completions.stream(**call) as stream:
                assert (await stream.get_final_completion()).choices[0].message.content
        seen = gateway.conversation(talk.id)
    assert (seen["turns"], seen["state"]) == (2, "open")
    assert gateway.conversation(talk.id)["state"] == "ended"


def test_final_ends_it_with_its_last_turn(cluster: str, gateway: Gateway, model_name: str) -> None:
    call: Any = {"model": model_name, "messages": [{"role": "user", "content": "once"}]}
    with ConServeOpenAI(base_url=cluster) as client, conversation(end_on_exit=False) as talk:
        talk.mark_final()
        client.chat.completions.create(**call)
    assert gateway.conversation(talk.id)["state"] == "ended"


def test_parallel_turns_are_tolerated(cluster: str, gateway: Gateway, model_name: str) -> None:
    client = ConServeOpenAI(base_url=cluster)
    call: Any = {"model": model_name, "messages": [{"role": "user", "content": "at once"}]}
    with client, conversation() as talk, ThreadPoolExecutor(4) as pool:
        ask = propagate(lambda _: client.chat.completions.create(**call))
        assert all(reply.choices for reply in pool.map(ask, range(4)))
        assert gateway.conversation(talk.id)["running_turns"] == 0


def test_an_agent_and_its_sub_agent_are_parent_and_child(
    cluster: str, gateway: Gateway, model_name: str
) -> None:
    llm = ChatConServe(model=model_name, base_url=cluster)

    @tool
    def look(path: str) -> str:
        """Look at a file."""
        return f"{path} holds 42"

    sub = create_agent(llm, [look])

    @tool
    def research(topic: str) -> str:
        """Research a topic in depth."""
        return str(
            sub.invoke({"messages": [("user", f"look at {topic}.txt")]})["messages"][-1].text
        )

    agent = create_agent(llm, [research], checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "agent-thread"}}
    state = agent.invoke({"messages": [("user", "research the topic kv")]}, config)
    assert "42" in state["messages"][-1].text
    family = [c for c in gateway.conversations() if c["id"].startswith("agent-thread")]
    (child,) = (c for c in family if c["id"] != "agent-thread")
    assert child["parent"] == "agent-thread" and child["turns"] == 2
    assert gateway.conversation("agent-thread")["turns"] == 2
    assert llm.end_thread("agent-thread") == 2
    assert {gateway.conversation(c["id"])["state"] for c in family} == {"ended"}
