"""Many LangGraph conversations at once, from threads and tasks; one, from several processes."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver

from conserve_agents import Gateway
from langchain_conserve import ChatConServe, ConversationMiddleware, identity
from langchain_conserve.identity import Conversations

EACH = 100
TURNS = 2


def config(kind: str, number: int) -> Any:
    return {"configurable": {"thread_id": f"{kind}-{number}"}}


def question(kind: str, number: int, turn: int) -> Any:
    return {"messages": [HumanMessage(f"question {turn} of {kind}-{number}")]}


@pytest.mark.asyncio(loop_scope="session")
async def test_threads_and_tasks(
    proxy: Any, gateway: Gateway, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "known", Conversations())
    ours = ChatConServe(model=model_name, base_url=proxy.base_url)
    stock = ChatOpenAI(model=model_name, base_url=proxy.base_url, api_key="conserve")  # type: ignore[arg-type] # SecretStr takes a str
    in_tasks = create_agent(ours, checkpointer=InMemorySaver())
    in_threads = create_agent(
        stock, middleware=[ConversationMiddleware()], checkpointer=InMemorySaver()
    )

    async def task(number: int) -> None:
        for turn in range(TURNS):
            await in_tasks.ainvoke(question("task", number, turn), config("task", number))

    def thread(number: int) -> None:
        for turn in range(TURNS):
            in_threads.invoke(question("thread", number, turn), config("thread", number))

    with ThreadPoolExecutor(20) as pool:
        loop = asyncio.get_running_loop()
        threads = [loop.run_in_executor(pool, thread, number) for number in range(EACH)]
        await asyncio.gather(*map(task, range(EACH)), *threads)

    assert len(proxy.calls) == 2 * EACH * TURNS
    for call in proxy.calls:
        asked = [m["content"] for m in call.body["messages"] if m["role"] == "user"]
        assert asked == [f"question {n} of {call.conversation}" for n in range(len(asked))]
        assert call.turn_index == len(asked)
    listed = gateway.conversations(limit=10 * EACH)
    turns = {c["id"]: c["turns"] for c in listed if c["id"].startswith(("task-", "thread-"))}
    assert turns == {f"{kind}-{n}": TURNS for kind in ("task", "thread") for n in range(EACH)}
    for id_ in turns:
        gateway.end_conversation(id_)


def test_two_processes_serve_one_thread(
    proxy: Any, gateway: Gateway, model_name: str, monkeypatch: pytest.MonkeyPatch, english: str
) -> None:
    """Web workers behind one persistent checkpointer: whichever is free takes the next turn."""
    ours = ChatConServe(model=model_name, base_url=proxy.base_url)
    agent = create_agent(ours, checkpointer=InMemorySaver())
    memories = [Conversations(), Conversations()]  # what each of them remembers
    for turn, worker in enumerate([0, 1, 1, 0]):
        monkeypatch.setattr(identity, "known", memories[worker])
        text = english if turn == 0 else f"question {turn}"
        agent.invoke({"messages": [HumanMessage(text)]}, config("workers", 0))
    # The first worker has not heard of the second's turns; the gateway has.
    assert [call.turn_index for call in proxy.calls] == [1, 2, 3, 2]
    seen = gateway.conversation("workers-0")
    assert [turn["index"] for turn in seen["recent_turns"]] == [1, 2, 3, 4]
    assert (seen["turns"], seen["transfers"]) == (4, 1)
    agent.invoke({"messages": [HumanMessage("and?")]}, config("workers", 0))
    assert proxy.calls[-1].turn_index == 5
    ours.end_thread("workers-0")
