"""ChatConServe and LangGraph against a scripted server: what arrives on the wire."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AnyMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Send
from pydantic import BaseModel

from conserve_agents import Gateway, ServerTokenCounter, conversation, wire
from conserve_agents.openai import AsyncConServeOpenAI, ConServeOpenAI
from langchain_conserve import ChatConServe

THREAD: Any = {"configurable": {"thread_id": "T"}}


@pytest.fixture
def model(server: Any) -> ChatConServe:
    return ChatConServe(model="m", base_url=server.base_url)


def tags(server: Any, name: str) -> list[str | None]:
    return [call.tag(name) for call in server.calls]


def ids(server: Any) -> list[str | None]:
    return tags(server, wire.CONVERSATION_ID)


# --- how it is made -------------------------------------------------------------------------


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-another-host")
    made = ChatConServe(model="m")
    assert isinstance(made, ChatOpenAI)
    assert isinstance(made.root_client, ConServeOpenAI)
    assert isinstance(made.root_async_client, AsyncConServeOpenAI)
    assert str(made.root_client.base_url) == "http://127.0.0.1:8000/v1/"
    assert made.root_client.api_key == made.root_async_client.api_key == "conserve"
    assert (made.stream_usage, made.use_responses_api) == (True, False)
    monkeypatch.setenv("CONSERVE_BASE_URL", "http://g:1/v1")
    monkeypatch.setenv("CONSERVE_API_KEY", "k")
    made = ChatConServe(model="m", timeout=7, max_retries=5, default_headers={"X-Mine": "1"})
    assert (str(made.root_client.base_url), made.root_client.api_key) == ("http://g:1/v1/", "k")
    for client in (made.root_client, made.root_async_client):
        assert (client.timeout, client.max_retries) == (7, 5)
        assert client.default_headers["X-Mine"] == "1"


def test_a_callable_key_is_asked(server: Any) -> None:
    made = ChatConServe(model="m", base_url=server.base_url, api_key=lambda: "rotating")
    made.invoke("hi", THREAD)
    assert server.calls[0].headers["authorization"] == "Bearer rotating"


# --- outside of a graph ---------------------------------------------------------------------


async def call_every_way(model: ChatConServe, config: Any) -> int:
    """Calls the model in each of LangChain's ways; returns how many that were."""
    model.invoke("hi", config)
    await model.ainvoke("hi", config)
    list(model.stream("hi", config))
    [chunk async for chunk in model.astream("hi", config)]
    [event async for event in model.astream_events("hi", config, version="v2")]
    model.batch(["hi", "hi"], [config, config])
    await model.abatch(["hi"], config)
    (model | str).invoke([HumanMessage("hi")], config)
    model.bind(temperature=0).invoke("hi", config)
    return 10


async def test_every_way_of_calling_finds_the_configs_thread(
    server: Any, model: ChatConServe
) -> None:
    calls = await call_every_way(model, THREAD)
    assert ids(server) == ["T"] * calls
    assert sorted(tags(server, wire.TURN_INDEX), key=lambda n: int(n or 0)) == [
        str(n) for n in range(1, calls + 1)
    ]
    assert tags(server, wire.PLACEMENT)[1] == "place-1"
    assert "conserve_call_site" not in str([call.body for call in server.calls])


async def test_every_way_of_calling_finds_the_current_conversation(
    server: Any, model: ChatConServe
) -> None:
    async with conversation("C"):
        calls = await call_every_way(model, THREAD)
    assert ids(server) == ["C"] * calls
    assert server.ended == ["C"]


async def test_without_a_thread_nothing_is_tagged(server: Any, model: ChatConServe) -> None:
    await call_every_way(model, None)
    assert not [n for call in server.calls for n in call.headers if n.startswith("x-conserve")]


def test_a_stream_belongs_to_the_conversation_it_was_made_in(
    server: Any, model: ChatConServe
) -> None:
    with conversation("made in", end_on_exit=False):
        stream = model.stream("hi")
    with conversation("read in", end_on_exit=False) as other:
        assert "".join(chunk.text for chunk in stream) == "hello"
        assert other.turns == 0
    assert ids(server) == [wire.safe_id("made in")]


def test_streaming_reports_usage(model: ChatConServe) -> None:
    chunks = list(model.stream("hi"))
    assert [c.usage_metadata["total_tokens"] for c in chunks if c.usage_metadata] == [9]


def test_structured_output_is_tagged(server: Any, model: ChatConServe, reply: Any) -> None:
    class City(BaseModel):
        name: str

    server.script.extend([reply(text='{"name": "Bern"}')] * 2)
    structured = model.with_structured_output(City, method="json_schema")
    assert structured.invoke("hi", THREAD) == City(name="Bern")
    assert list(structured.stream("hi", THREAD))[-1] == City(name="Bern")
    assert ids(server) == ["T", "T"]


def test_extra_headers_are_merged_and_a_hand_made_tag_wins(
    server: Any, model: ChatConServe
) -> None:
    model.bind(extra_headers={"X-Mine": "1"}).invoke("hi", THREAD)
    mine = {wire.CONVERSATION_ID: "by-hand"}
    model.bind(extra_headers=mine).invoke("hi", THREAD)
    ChatConServe(model="m", base_url=server.base_url, default_headers=mine).invoke("hi", THREAD)
    assert server.calls[0].headers["x-mine"] == "1"
    assert ids(server) == ["T", "by-hand", "by-hand"]
    assert tags(server, wire.TURN_ID)[1:] == [None, None]


def test_the_id_is_no_part_of_the_cache_key(server: Any, model: ChatConServe) -> None:
    set_llm_cache(InMemoryCache())
    try:
        model.invoke("hi", {"configurable": {"thread_id": "one"}})
        with conversation("two"):
            cached = model.invoke("hi")
        assert cached.text == "hello"
    finally:
        set_llm_cache(None)
    assert len(server.calls) == 1


def test_the_servers_tokenizer_may_count(server: Any) -> None:
    counter = ServerTokenCounter(Gateway(server.base_url))
    ChatConServe(model="m", base_url=server.base_url, token_counter=counter).invoke("hi", THREAD)
    assert tags(server, wire.FIRST_TURN_TOKENS) == ["4242"]
    assert tags(server, wire.TOKEN_COUNTER) == ["server"]


def test_two_models_share_a_threads_turns(server: Any, model: ChatConServe) -> None:
    model.invoke("hi", THREAD)
    ChatConServe(model="other", base_url=server.base_url).invoke("hi", THREAD)
    assert tags(server, wire.TURN_INDEX) == ["1", "2"]


def test_equal_threads_of_two_keys_are_two_threads(server: Any) -> None:
    ours, theirs = (ChatConServe(model="m", base_url=server.base_url, api_key=k) for k in "ab")
    ours.invoke("q", THREAD)
    ours.invoke("r", THREAD)
    theirs.invoke("s", THREAD)  # the gateway keeps them apart as well
    assert ids(server) == ["T", "T", "T"]
    assert tags(server, wire.TURN_INDEX) == ["1", "2", "1"]
    assert tags(server, wire.PARENT_ID) == [None] * 3
    assert tags(server, wire.PLACEMENT)[2] is None
    assert (ours.end_thread("T"), theirs.end_thread("T")) == (1, 1)


def test_tagging_that_fails_never_breaks_the_call(
    server: Any,
    model: ChatConServe,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        raise LookupError("LangChain moved it")

    monkeypatch.setattr("langchain_conserve.identity.known.begin", broken)
    assert model.invoke("hi", THREAD).text == "hello"
    assert ids(server) == [None]
    assert "LangChain moved it" in caplog.text


# --- LangGraph ------------------------------------------------------------------------------


@tool
def look(path: str) -> str:
    """Look at a file."""
    return f"contents of {path}"


def test_an_agent_is_one_conversation_by_class_swap_alone(
    server: Any, model: ChatConServe, reply: Any
) -> None:
    server.script.extend(
        [
            reply(tool_calls=(("look", {"path": "a"}),)),
            reply(tool_calls=(("look", {"path": "b"}),)),
            reply(text="done"),
        ]
    )
    agent = create_agent(model, [look], checkpointer=InMemorySaver())
    answer = agent.invoke({"messages": [("user", "question")]}, THREAD)
    assert answer["messages"][-1].text == "done"
    agent.invoke({"messages": [("user", "and?")]}, THREAD)
    assert ids(server) == ["T"] * 4
    assert tags(server, wire.TURN_INDEX) == ["1", "2", "3", "4"]
    assert tags(server, wire.PLACEMENT) == [None, "place-1", "place-2", "place-3"]
    assert len(set(tags(server, wire.FIRST_TURN_TOKENS))) == 1
    assert model.end_thread("T") == 1
    assert server.ended == ["T"]
    assert model.end_thread("T") == 0


async def test_async_agents_stream_and_keep_their_threads_apart(
    server: Any, model: ChatConServe
) -> None:
    agent = create_agent(model, [look], checkpointer=InMemorySaver())

    async def run(thread: str) -> None:
        config: Any = {"configurable": {"thread_id": thread}}
        for _ in range(2):
            question: Any = {"messages": [("user", f"question of {thread}")]}
            async for _ in agent.astream(question, config, stream_mode="messages"):
                pass

    await asyncio.gather(*(run(f"T{n}") for n in range(3)))
    for n in range(3):
        mine = [
            c.tag(wire.TURN_INDEX) for c in server.calls if c.tag(wire.CONVERSATION_ID) == f"T{n}"
        ]
        assert mine == ["1", "2"]
    assert await model.aend_thread("T1") == 1


def test_a_sub_agent_is_a_child_and_a_tools_own_call_is_apart(
    server: Any, model: ChatConServe, reply: Any
) -> None:
    sub = create_agent(model, [look])

    @tool
    def research(topic: str) -> str:
        """Research a topic."""
        model.invoke(f"rephrase {topic}")
        return sub.invoke({"messages": [("user", topic)]})["messages"][-1].text

    server.script.extend(
        [
            reply(tool_calls=(("research", {"topic": "kv"}),)),
            reply(text="rephrased"),
            reply(tool_calls=(("look", {"path": "a"}),)),
            reply(text="found"),
            reply(text="done"),
        ]
    )
    agent = create_agent(model, [research], checkpointer=InMemorySaver())
    agent.invoke({"messages": [("user", "question")]}, THREAD)
    root, aside, child, child_again, root_again = server.calls
    assert [c.tag(wire.CONVERSATION_ID) for c in (root, root_again)] == ["T", "T"]
    assert [c.tag(wire.TURN_INDEX) for c in (root, root_again)] == ["1", "2"]
    child_id = child.tag(wire.CONVERSATION_ID)
    assert child_id.startswith("T|tools:") and child.tag(wire.PARENT_ID) == "T"
    assert child_again.tag(wire.CONVERSATION_ID) == child_id
    assert aside.tag(wire.CONVERSATION_ID).startswith("T~")
    assert model.end_thread("T") == 3
    assert server.ended[-1] == "T"


def test_an_explicit_conversation_covers_the_graph_and_ends_its_children(
    server: Any, model: ChatConServe, reply: Any
) -> None:
    sub = create_agent(model, [look])

    @tool
    def research(topic: str) -> str:
        """Research a topic."""
        with conversation("inner"):
            return sub.invoke({"messages": [("user", topic)]})["messages"][-1].text

    @tool
    def ask(topic: str) -> str:
        """Ask a sub-agent."""
        return sub.invoke({"messages": [("user", topic)]})["messages"][-1].text

    server.script.extend(
        [
            reply(tool_calls=(("research", {"topic": "kv"}),)),
            reply(text="found"),
            reply(tool_calls=(("ask", {"topic": "kv"}),)),
            reply(text="asked"),
            reply(text="done"),
        ]
    )
    agent = create_agent(model, [research, ask])
    with conversation("C"):
        agent.invoke({"messages": [("user", "question")]}, THREAD)
    assert [i.partition("|")[0] for i in ids(server) if i] == ["C", "inner", "C", "C", "C"]
    assert tags(server, wire.PARENT_ID)[:2] == [None, "C"]
    child = ids(server)[3]
    assert child is not None and child.startswith("C|tools:")
    assert server.ended == ["inner", child, "C"]


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


def test_parallel_send_leaves_are_conversations_of_their_own(
    server: Any, model: ChatConServe
) -> None:
    def leaf(state: Any) -> dict[str, Any]:
        return {"messages": [model.invoke(f"about {state['topic']}")]}

    graph = StateGraph(State)
    graph.add_node("leaf", leaf)
    graph.add_conditional_edges(START, lambda _: [Send("leaf", {"topic": t}) for t in "abc"])
    graph.compile().invoke({"messages": []}, THREAD)
    assert len(set(ids(server))) == 3
    assert sorted(map(str, tags(server, wire.PARENT_ID))) == ["None", "T", "T"]


def test_subgraphs_and_the_functional_api(server: Any, model: ChatConServe) -> None:
    inner = StateGraph(State)
    inner.add_node("think", lambda s: {"messages": [model.invoke(s["messages"])]})
    inner.add_edge(START, "think")
    outer = StateGraph(State)
    outer.add_node("researcher", inner.compile())
    outer.add_edge(START, "researcher")
    graph = outer.compile(checkpointer=InMemorySaver())
    for text in ("question", "and?"):
        graph.invoke({"messages": [HumanMessage(text)]}, THREAD)
    first, second = server.calls
    assert first.tag(wire.CONVERSATION_ID) == second.tag(wire.CONVERSATION_ID) == "T"
    assert second.tag(wire.TURN_INDEX) == "2"

    @task
    def step(text: str) -> str:
        return model.invoke(text).text

    @entrypoint()
    def flow(text: str) -> str:
        return step(text).result()

    for _ in range(2):
        assert flow.invoke("hi", {"configurable": {"thread_id": "F"}}) == "hello"
    assert ids(server)[-2:] == ["F", "F"]
