"""``ConversationMiddleware``: agents whose model is a stock ``ChatOpenAI``."""

from __future__ import annotations

from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelFallbackMiddleware, ModelRetryMiddleware
from langchain.agents.structured_output import ProviderStrategy
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel

from conserve_agents import Gateway, ServerTokenCounter, conversation, wire
from langchain_conserve import ChatConServe, ConversationMiddleware, identity
from langchain_conserve.identity import Conversations

CONFIG: Any = {"configurable": {"thread_id": "T"}}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "known", Conversations())


@pytest.fixture
def stock(server: Any) -> ChatOpenAI:
    return ChatOpenAI(model="m", base_url=server.base_url, api_key="k", max_retries=0)  # type: ignore[arg-type] # SecretStr takes a str


@tool
def look(path: str) -> str:
    """Look at a file."""
    return f"contents of {path}"


def ask(text: str) -> Any:
    return {"messages": [HumanMessage(text)]}


def ids(server: Any) -> list[str]:
    return [call.tag(wire.CONVERSATION_ID) for call in server.calls]


def tags(server: Any, name: str) -> list[str | None]:
    return [call.tag(name) for call in server.calls]


def idled(server: Any) -> list[str]:
    """Ids of conversations that were reported idle, in order."""
    return [
        seen.path.split("/")[-2]
        for seen in server.seen
        if seen.method == "POST" and seen.path.endswith("/idle")
    ]


# --- with a thread ------------------------------------------------------------------------------


def test_a_threads_agent_is_one_conversation(server: Any, stock: ChatOpenAI, reply: Any) -> None:
    server.script.extend([reply(tool_calls=(("look", {"path": "a"}),)), reply(), reply()])
    watch = ConversationMiddleware()
    agent = create_agent(stock, [look], middleware=[watch], checkpointer=InMemorySaver())
    state = agent.invoke(ask("question"), CONFIG)
    agent.invoke(ask("and?"), CONFIG)
    assert ids(server) == ["T"] * 3
    assert tags(server, wire.TURN_INDEX) == ["1", "2", "3"]
    # placement is echoed, and nothing of how it was read is left in the messages
    assert tags(server, wire.PLACEMENT) == [None, "place-1", "place-2"]
    assert not [m for m in state["messages"] if "headers" in m.response_metadata]
    assert "conserve_thread" not in state
    assert idled(server) == ["T", "T"]  # once per run, not per turn
    assert server.ended == []
    assert watch.end_thread("T") == 1
    assert server.ended == ["T"]
    assert {call.headers["authorization"] for call in server.calls} == {"Bearer k"}
    ends = [seen for seen in server.seen if seen.method == "DELETE"]
    assert ends[0].headers["authorization"] == "Bearer k"


async def test_async_and_streamed(server: Any, stock: ChatOpenAI, reply: Any) -> None:
    server.script.extend([reply(tool_calls=(("look", {"path": "a"}),)), reply()])
    counter = ServerTokenCounter(Gateway(server.base_url))
    watch = ConversationMiddleware(token_counter=counter)
    agent = create_agent(stock, [look], middleware=[watch], checkpointer=InMemorySaver())
    streamed: list[Any] = [
        part async for part in agent.astream(ask("question"), CONFIG, stream_mode="messages")
    ]
    assert "hello" in "".join(str(chunk.content) for chunk, _ in streamed)
    assert ids(server) == ["T", "T"]
    assert tags(server, wire.FIRST_TURN_TOKENS) == ["4242", "4242"]
    assert tags(server, wire.PLACEMENT) == [None, "place-1"]
    assert idled(server) == ["T"]
    assert await watch.aend_thread("T") == 1


def test_an_agent_that_fails_sends_no_signal(server: Any, stock: ChatOpenAI, reply: Any) -> None:
    server.script.append(reply(status=500))
    agent = create_agent(stock, middleware=[ConversationMiddleware()], checkpointer=InMemorySaver())
    with pytest.raises(Exception, match="scripted"):
        agent.invoke(ask("question"), CONFIG)
    assert idled(server) == [] and server.ended == []


def test_end_after_run(server: Any, stock: ChatOpenAI) -> None:
    watch = ConversationMiddleware(end_after_run=True)
    agent = create_agent(stock, middleware=[watch], checkpointer=InMemorySaver())
    for text in ("question", "and yet?"):
        agent.invoke(ask(text), CONFIG)
    assert (server.ended, idled(server)) == (["T", "T"], [])
    assert tags(server, wire.TURN_INDEX) == ["1", "2"]


def test_within_an_explicit_conversation_that_one_counts(server: Any, stock: ChatOpenAI) -> None:
    agent = create_agent(stock, middleware=[ConversationMiddleware()])
    with conversation("mine"):
        agent.invoke(ask("question"), CONFIG)
    assert ids(server) == ["mine"]
    assert (server.ended, idled(server)) == (["mine"], [])


# --- without one --------------------------------------------------------------------------------


def test_a_run_without_a_thread_is_a_conversation(
    server: Any, stock: ChatOpenAI, reply: Any
) -> None:
    server.script.extend([reply(tool_calls=(("look", {"path": "a"}),)), reply(), reply()])
    agent = create_agent(stock, [look], middleware=[ConversationMiddleware()])
    agent.invoke(ask("question"))
    agent.invoke(ask("question"))  # another user with the same question
    first, second = ids(server)[0], ids(server)[2]
    assert first.startswith("run-") and second.startswith("run-")
    assert ids(server) == [first, first, second] and first != second
    assert idled(server) == [first, second]


async def test_a_history_that_comes_back_goes_on_in_its_conversation(
    server: Any, stock: ChatOpenAI
) -> None:
    agent = create_agent(stock, middleware=[ConversationMiddleware()])
    state = await agent.ainvoke(ask("question"))
    as_json = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "hello"}]
    assert [m.text for m in state["messages"]] == [str(m["content"]) for m in as_json]
    await agent.ainvoke({"messages": [*as_json, {"role": "user", "content": "and?"}]})  # type: ignore[list-item] # a dict is a message, too
    assert len(set(ids(server))) == 1
    assert tags(server, wire.TURN_INDEX) == ["1", "2"]


def test_what_a_tool_calls_belongs_to_the_run(server: Any, stock: ChatOpenAI, reply: Any) -> None:
    watch = ConversationMiddleware()
    ours = ChatConServe(model="m", base_url=server.base_url, api_key="k")  # type: ignore[arg-type] # SecretStr takes a str
    sub = create_agent(stock, [look], middleware=[watch], name="sub")

    @tool
    def research(topic: str) -> str:
        """Research a topic."""
        ours.invoke(f"rephrase {topic}")
        return str(sub.invoke(ask(topic))["messages"][-1].text)

    server.script.extend([reply(tool_calls=(("research", {"topic": "kv"}),)), reply(text="kv?")])
    server.script.extend([reply(tool_calls=(("look", {"path": "a"}),)), reply(text="found")])
    agent = create_agent(stock, [research], middleware=[watch])
    agent.invoke(ask("question"))
    root, aside, child, child_again, root_again = ids(server)
    assert root == root_again and aside.startswith(f"{root}~")
    assert child == child_again and child.startswith(f"{root}|tools:")
    assert tags(server, wire.PARENT_ID) == [None, root, root, root, None]
    assert server.ended == [child]  # a sub-agent is over with its tool call
    assert idled(server) == [root]


async def test_async_sub_agents_belong_to_the_run(
    server: Any, stock: ChatOpenAI, reply: Any
) -> None:
    watch = ConversationMiddleware()
    sub = create_agent(stock, middleware=[watch])

    @tool
    async def research(topic: str) -> str:
        """Research a topic."""
        return str((await sub.ainvoke(ask(topic)))["messages"][-1].text)

    server.script.append(reply(tool_calls=(("research", {"topic": "kv"}),) * 2))
    agent = create_agent(stock, [research], middleware=[watch])
    await agent.ainvoke(ask("question"))
    root, one, other, root_again = ids(server)
    assert root == root_again and len({root, one, other}) == 3
    assert tags(server, wire.PARENT_ID) == [None, root, root, None]
    assert sorted(server.ended) == sorted([one, other])


# --- beside other middleware and models ---------------------------------------------------------


@pytest.mark.parametrize("outermost", [True, False])
def test_a_retry_by_another_middleware_is_no_new_turn(
    server: Any, stock: ChatOpenAI, reply: Any, outermost: bool
) -> None:
    server.script.extend([reply(status=503), reply(), reply(), reply(status=429), reply()])
    both: list[Any] = [ConversationMiddleware(), ModelRetryMiddleware(initial_delay=0.0)]
    order = both if outermost else both[::-1]
    agent = create_agent(stock, [look], middleware=order, checkpointer=InMemorySaver())
    for text in ("question", "other question", "last question"):
        agent.invoke(ask(text), CONFIG)
    assert tags(server, wire.TURN_INDEX) == ["1", "1", "2", "3", "3"]
    assert len(set(tags(server, wire.TURN_ID))) == 3
    assert len(set(tags(server, wire.FIRST_TURN_TOKENS))) == 1


def test_a_fallback_goes_on_in_the_same_turn(server: Any, stock: ChatOpenAI, reply: Any) -> None:
    server.script.extend([reply(status=503), reply()])
    fallback = ModelFallbackMiddleware(
        ChatOpenAI(model="other", base_url=server.base_url, api_key="k")  # type: ignore[arg-type] # SecretStr takes a str
    )
    agent = create_agent(stock, middleware=[ConversationMiddleware(), fallback])
    agent.invoke(ask("question"), CONFIG)
    assert [call.body["model"] for call in server.calls] == ["m", "other"]
    assert len(set(tags(server, wire.TURN_ID))) == 1


def test_chat_conserve_tags_by_itself_and_gets_the_signals(server: Any) -> None:
    watch = ConversationMiddleware()
    agent = create_agent(ChatConServe(model="m", base_url=server.base_url), middleware=[watch])
    agent.invoke(ask("question"), CONFIG)
    agent.invoke(ask("question"))
    assert ids(server)[0] == "T" and ids(server)[1].startswith("run-")
    assert idled(server) == ids(server)
    assert tags(server, wire.TURN_INDEX) == ["1", "1"]
    assert watch.end_thread("T") == 1


def test_structured_output(server: Any, stock: ChatOpenAI, reply: Any) -> None:
    class City(BaseModel):
        name: str

    server.script.append(reply(text='{"name": "Bern"}'))
    agent = create_agent(
        stock, response_format=ProviderStrategy(City), middleware=[ConversationMiddleware()]
    )
    assert agent.invoke(ask("question"), CONFIG)["structured_response"] == City(name="Bern")
    assert ids(server) == ["T"]


def test_headers_of_others_are_kept_and_a_tag_made_by_hand_wins(server: Any) -> None:
    mine = {wire.CONVERSATION_ID: "by-hand"}

    def model(**more: Any) -> ChatOpenAI:
        return ChatOpenAI(model="m", base_url=server.base_url, api_key="k", **more)  # type: ignore[arg-type] # SecretStr takes a str

    for made in (model(default_headers=mine), model(default_headers={"X-Mine": "1"})):
        create_agent(made, middleware=[ConversationMiddleware()]).invoke(ask("question"), CONFIG)
    assert ids(server) == ["by-hand", "T"]
    assert server.calls[1].headers["x-mine"] == "1"
    assert tags(server, wire.TURN_ID)[0] is None


def test_models_that_go_elsewhere_are_left_alone(
    server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    other = GenericFakeChatModel(messages=iter([AIMessage("from elsewhere")]))
    agent = create_agent(other, middleware=[ConversationMiddleware(gateway=server.base_url)])
    assert agent.invoke(ask("question"), CONFIG)["messages"][-1].text == "from elsewhere"
    assert "GenericFakeChatModel are not tagged" in caplog.text
    assert server.seen == []


def test_what_cannot_be_tagged_is_sent(
    server: Any, stock: ChatOpenAI, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        raise LookupError("LangChain moved it")

    monkeypatch.setattr(identity.known, "begin", broken)
    agent = create_agent(stock, middleware=[ConversationMiddleware()])
    assert agent.invoke(ask("question"), CONFIG)["messages"][-1].text == "hello"
    assert ids(server) == [None]
    assert "LangChain moved it" in caplog.text


# --- the real gateway ---------------------------------------------------------------------------


@pytest.mark.asyncio(loop_scope="session")
async def test_the_gateway_hears_that_an_agent_is_idle(
    cluster: str, gateway: Gateway, model_name: str
) -> None:
    watch = ConversationMiddleware()
    stock = ChatOpenAI(model=model_name, base_url=cluster, api_key="conserve")  # type: ignore[arg-type] # SecretStr takes a str
    agent = create_agent(stock, middleware=[watch], checkpointer=InMemorySaver())
    await agent.ainvoke(ask("question"), {"configurable": {"thread_id": "idle-thread"}})
    assert gateway.conversation("idle-thread")["state"] == "open"
    assert gateway.idle_conversation("idle-thread") is True
    assert gateway.idle_conversation("nobody") is False
    assert await watch.aend_thread("idle-thread") == 1
    assert gateway.conversation("idle-thread")["state"] == "ended"
