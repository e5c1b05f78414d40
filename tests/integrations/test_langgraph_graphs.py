"""Graphs that branch, nest and travel in time: each call gets the right conversation and parent."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, RetryPolicy, Send, interrupt

from conserve_agents import wire
from langchain_conserve import ChatConServe, identity
from langchain_conserve.identity import Conversations

CONFIG: Any = {"configurable": {"thread_id": "T"}}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "known", Conversations())


@pytest.fixture
def model(server: Any) -> ChatConServe:
    return ChatConServe(model="m", base_url=server.base_url, max_retries=0)


def ids(server: Any) -> list[str]:
    return [call.tag(wire.CONVERSATION_ID) for call in server.calls]


def tags(server: Any, name: str) -> list[str | None]:
    return [call.tag(name) for call in server.calls]


def chat(model: ChatConServe, checkpointer: Any = None) -> Any:
    """A graph of one node that answers."""
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda s: {"messages": [model.invoke(s["messages"])]})
    graph.add_edge(START, "model")
    return graph.compile(checkpointer=checkpointer or InMemorySaver())


def before_turn(graph: Any, number: int) -> Any:
    """The checkpoint from which the thread's ``number``-th turn was made."""
    states = list(graph.get_state_history(CONFIG))
    return [state for state in reversed(states) if state.next == ("model",)][number - 1]


# --- time travel --------------------------------------------------------------------------------


def test_a_replay_is_a_fork_with_its_parent_and_the_thread_goes_on_there(
    server: Any, model: ChatConServe, reply: Any
) -> None:
    server.script.extend([reply(text="a1"), reply(text="a2"), reply(text="b1"), reply(text="b2")])
    graph = chat(model)
    graph.invoke({"messages": [HumanMessage("q1")]}, CONFIG)
    graph.invoke({"messages": [HumanMessage("q2")]}, CONFIG)
    graph.invoke(None, before_turn(graph, 1).config)
    graph.invoke({"messages": [HumanMessage("r2")]}, CONFIG)
    assert ids(server)[:2] == ["T", "T"]
    fork = ids(server)[2]
    assert fork.startswith("T~") and ids(server)[3] == fork
    assert tags(server, wire.PARENT_ID) == [None, None, "T", "T"]
    assert tags(server, wire.TURN_INDEX) == ["1", "2", "1", "2"]
    # All of a thread's conversations end together.
    assert model.end_thread("T") == 2


def test_an_edited_state_is_a_fork(server: Any, model: ChatConServe) -> None:
    graph = chat(model)
    graph.invoke({"messages": [HumanMessage("q1", id="1")]}, CONFIG)
    graph.invoke({"messages": [HumanMessage("q2", id="2")]}, CONFIG)
    old = before_turn(graph, 2)
    edited = graph.update_state(old.config, {"messages": [HumanMessage("other q2", id="2")]})
    graph.invoke(None, edited)
    assert ids(server)[2].startswith("T~")
    assert tags(server, wire.PARENT_ID)[2] == "T"
    # a new conversation: its first turn is all of its prompt
    first, second = (int(server.calls[n].tag(wire.FIRST_TURN_TOKENS)) for n in (0, 2))
    assert second > first


def test_two_forks_from_one_checkpoint_are_two_conversations(
    server: Any, model: ChatConServe
) -> None:
    graph = chat(model)
    graph.invoke({"messages": [HumanMessage("q1")]}, CONFIG)
    graph.invoke({"messages": [HumanMessage("q2")]}, CONFIG)
    old = before_turn(graph, 2).config
    for question in ("r2", "s2"):
        graph.invoke({"messages": [HumanMessage(question)]}, old)
    assert len(set(ids(server))) == 3


def test_going_on_from_the_newest_checkpoint_by_its_id_is_no_fork(
    server: Any, model: ChatConServe
) -> None:
    graph = chat(model)
    graph.invoke({"messages": [HumanMessage("q1")]}, CONFIG)
    newest = graph.get_state(CONFIG).config
    graph.invoke({"messages": [HumanMessage("q2")]}, newest)
    assert ids(server) == ["T", "T"]
    assert tags(server, wire.TURN_INDEX) == ["1", "2"]


def test_a_sub_agent_of_a_replayed_run_belongs_to_the_fork(
    server: Any, model: ChatConServe, reply: Any
) -> None:
    sub = create_agent(model)

    @tool
    def research(topic: str) -> str:
        """Research a topic."""
        return str(sub.invoke({"messages": [("user", topic)]})["messages"][-1].text)

    call = reply(tool_calls=(("research", {"topic": "kv"}),))
    server.script.extend([call, reply(text="found"), reply(text="done")] * 2)
    graph = create_agent(model, [research], checkpointer=InMemorySaver())
    graph.invoke({"messages": [HumanMessage("q")]}, CONFIG)
    graph.invoke(None, before_turn(graph, 1).config)
    trunk, child, _, fork, fork_child, fork_again = server.calls
    assert trunk.tag(wire.CONVERSATION_ID) == child.tag(wire.PARENT_ID) == "T"
    assert fork.tag(wire.CONVERSATION_ID).startswith("T~")
    assert fork_child.tag(wire.PARENT_ID) == fork.tag(wire.CONVERSATION_ID)
    assert fork_again.tag(wire.CONVERSATION_ID) == fork.tag(wire.CONVERSATION_ID)
    assert fork_child.tag(wire.CONVERSATION_ID) != child.tag(wire.CONVERSATION_ID)


# --- interrupts, retries, rewrites --------------------------------------------------------------


def test_an_interrupted_run_goes_on_in_its_conversation(server: Any, model: ChatConServe) -> None:
    def ask(state: MessagesState) -> dict[str, Any]:
        draft = model.invoke(state["messages"])
        answer = interrupt("is this fine?")
        return {"messages": [draft, HumanMessage(answer)]}

    graph = StateGraph(MessagesState)
    graph.add_node("ask", ask)
    graph.add_node("model", lambda s: {"messages": [model.invoke(s["messages"])]})
    graph.add_edge(START, "ask")
    graph.add_edge("ask", "model")
    compiled = graph.compile(checkpointer=InMemorySaver())
    compiled.invoke({"messages": [HumanMessage("q")]}, CONFIG)
    compiled.invoke(Command(resume="yes"), CONFIG)  # runs "ask" again from its start
    assert ids(server) == ["T"] * 3


def test_a_node_that_langgraph_retries_repeats_its_turn(
    server: Any, model: ChatConServe, reply: Any
) -> None:
    server.script.extend([reply(), reply(status=503), reply(status=503), reply()])
    graph = StateGraph(MessagesState)
    retry = RetryPolicy(initial_interval=0.0, jitter=False, max_attempts=3)
    node = lambda s: {"messages": [model.invoke(s["messages"])]}  # noqa: E731 - see the next line
    graph.add_node("model", node, retry_policy=retry)
    graph.add_edge(START, "model")
    compiled = graph.compile(checkpointer=InMemorySaver())
    compiled.invoke({"messages": [HumanMessage("q1")]}, CONFIG)
    compiled.invoke({"messages": [HumanMessage("q2")]}, CONFIG)
    assert ids(server) == ["T"] * 4
    assert tags(server, wire.TURN_INDEX) == ["1", "2", "2", "2"]
    assert len(set(tags(server, wire.TURN_ID))) == 2


def test_a_compacted_history_stays_in_its_conversation(server: Any, model: ChatConServe) -> None:
    """With a checkpointer and without: an application that keeps the history itself."""
    graph = chat(model, checkpointer=False)
    system = SystemMessage("be brief")
    graph.invoke({"messages": [system, HumanMessage("q1 " * 50)]}, CONFIG)
    graph.invoke({"messages": [system, HumanMessage("summary of q1"), HumanMessage("q2")]}, CONFIG)
    assert ids(server) == ["T", "T"]
    assert tags(server, wire.TURN_INDEX) == ["1", "2"]


# --- side by side -------------------------------------------------------------------------------


async def test_parallel_leaves_and_their_sub_agents(server: Any, model: ChatConServe) -> None:
    sub = create_agent(model, name="sub")

    async def plan(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    async def leaf(state: Any) -> dict[str, Any]:
        await model.ainvoke(state["messages"])  # the leaf's own call; all leaves say the same
        await sub.ainvoke({"messages": state["messages"]})
        return {"messages": []}

    graph = StateGraph(MessagesState)
    graph.add_node("plan", plan)
    graph.add_node("leaf", leaf)
    graph.add_edge(START, "plan")
    leaves = [Send("leaf", {"messages": [HumanMessage("same task")]})] * 3
    graph.add_conditional_edges("plan", lambda _: leaves)
    await graph.compile().ainvoke({"messages": [HumanMessage("q")]}, CONFIG)
    by_id = {c.tag(wire.CONVERSATION_ID): c.tag(wire.PARENT_ID) for c in server.calls}
    assert len(by_id) == len(server.calls) == 7
    own = {id_ for id_ in by_id if id_.startswith("T~")}
    below = {id_ for id_ in by_id if id_.startswith("T|leaf:")}
    assert (len(own), len(below)) == (3, 3)
    assert {by_id[id_] for id_ in own | below} == {"T"} and by_id["T"] is None


def test_parallel_tasks_of_the_functional_api(server: Any, model: ChatConServe) -> None:
    @task
    def ask(text: str) -> str:
        return model.invoke([HumanMessage(text)]).text

    @entrypoint(checkpointer=InMemorySaver())
    def flow(texts: list[str]) -> list[str]:
        return [future.result() for future in [ask(text) for text in texts]]

    flow.invoke(["a", "b", "c"], CONFIG)
    assert len(set(ids(server))) == 3 and "T" in ids(server)
    assert {parent for parent in tags(server, wire.PARENT_ID) if parent} == {"T"}


def test_a_batch_inside_a_node_is_no_conversation_with_itself(
    server: Any, model: ChatConServe, reply: Any
) -> None:
    def rate(state: MessagesState) -> dict[str, Any]:
        model.batch([[HumanMessage(f"rate {n}")] for n in range(2)])
        return {"messages": []}

    both_are_there = threading.Barrier(2)
    server.script.extend([reply(after=lambda: both_are_there.wait(timeout=30))] * 2)
    graph = StateGraph(MessagesState)
    graph.add_node("rate", rate)
    graph.add_edge(START, "rate")
    graph.compile().invoke({"messages": []}, CONFIG)
    assert len(set(ids(server))) == 2
