"""The matrix for LangChain and LangGraph: what each way of using them gets, on a real gateway.

For each client: one id per conversation, right turn index, first-turn length within 15 % of the
server's count (English and code), the same tag on every retry, exactly one transfer, and the tail
on one decoder.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AnyMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.message import add_messages

from conserve_agents import Gateway, wire
from langchain_conserve import ChatConServe, ConversationMiddleware, identity
from langchain_conserve.identity import Conversations

#: A client: runs three questions as one conversation and returns its id, where it chose one.
Client = Callable[[str, str, list[str]], Awaitable[str | None]]

THREAD = "matrix-thread"
CONFIG: Any = {"configurable": {"thread_id": THREAD}}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "known", Conversations())


@tool
def measure(thing: str) -> str:
    """Measure a thing."""
    return f"{thing} measures 42"


# --- the clients --------------------------------------------------------------------------------


async def plain_model(base_url: str, model: str, questions: list[str]) -> str | None:
    llm = ChatConServe(model=model, base_url=base_url, max_retries=2)
    history: list[AnyMessage] = []
    for question in questions:
        history.append(HumanMessage(question))
        history.append(llm.invoke(history, CONFIG))
    return THREAD


async def streaming_model(base_url: str, model: str, questions: list[str]) -> str | None:
    llm = ChatConServe(model=model, base_url=base_url, max_retries=2)
    history: list[AnyMessage] = []
    for question in questions:
        history.append(HumanMessage(question))
        whole = None
        async for chunk in llm.astream(history, CONFIG):
            whole = chunk if whole is None else whole + chunk
        assert whole is not None
        history.append(whole)
    return THREAD


async def retrying_chain(base_url: str, model: str, questions: list[str]) -> str | None:
    """The SDK tries once; LangChain tries again."""
    llm = ChatConServe(model=model, base_url=base_url, max_retries=0)
    chain = llm.with_retry(wait_exponential_jitter=False)
    history: list[AnyMessage] = []
    for question in questions:
        history.append(HumanMessage(question))
        history.append(await chain.ainvoke(history, CONFIG))
    return THREAD


async def agent(base_url: str, model: str, questions: list[str]) -> str | None:
    llm = ChatConServe(model=model, base_url=base_url, max_retries=2)
    graph = create_agent(llm, checkpointer=InMemorySaver())
    for question in questions:
        await graph.ainvoke({"messages": [HumanMessage(question)]}, CONFIG)
    return THREAD


async def sync_agent(base_url: str, model: str, questions: list[str]) -> str | None:
    llm = ChatConServe(model=model, base_url=base_url, max_retries=2)
    graph = create_agent(llm, checkpointer=InMemorySaver())
    for question in questions:
        list(graph.stream({"messages": [HumanMessage(question)]}, CONFIG, stream_mode="messages"))
    return THREAD


async def agent_with_stock_model(base_url: str, model: str, questions: list[str]) -> str | None:
    llm = ChatOpenAI(model=model, base_url=base_url, api_key="conserve", max_retries=2)  # type: ignore[arg-type] # SecretStr takes a str
    graph = create_agent(llm, middleware=[ConversationMiddleware()], checkpointer=InMemorySaver())
    for question in questions:
        await graph.ainvoke({"messages": [HumanMessage(question)]}, CONFIG)
    return THREAD


async def stock_model_without_checkpointer(
    base_url: str, model: str, questions: list[str]
) -> str | None:
    llm = ChatOpenAI(model=model, base_url=base_url, api_key="conserve", max_retries=2)  # type: ignore[arg-type] # SecretStr takes a str
    graph = create_agent(llm, middleware=[ConversationMiddleware()])
    state: Any = {"messages": []}
    for question in questions:
        state = await graph.ainvoke({"messages": [*state["messages"], HumanMessage(question)]})
    return None


async def subgraph(base_url: str, model: str, questions: list[str]) -> str | None:
    llm = ChatConServe(model=model, base_url=base_url, max_retries=2)

    async def think(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await llm.ainvoke(state["messages"])]}

    inner = StateGraph(MessagesState)
    inner.add_node("think", think)
    inner.add_edge(START, "think")
    outer = StateGraph(MessagesState)
    outer.add_node("inner", inner.compile())
    outer.add_edge(START, "inner")
    graph = outer.compile(checkpointer=InMemorySaver())
    for question in questions:
        await graph.ainvoke({"messages": [HumanMessage(question)]}, CONFIG)
    return THREAD


async def functional_api(base_url: str, model: str, questions: list[str]) -> str | None:
    llm = ChatConServe(model=model, base_url=base_url, max_retries=2)

    @task
    def ask(messages: list[AnyMessage]) -> AnyMessage:
        return llm.invoke(messages)

    @entrypoint(checkpointer=InMemorySaver())
    def flow(question: str, *, previous: Any = None) -> Any:
        messages = add_messages(previous or [], [HumanMessage(question)])
        reply = ask(messages).result()  # type: ignore[arg-type] # add_messages takes either form
        whole = add_messages(messages, [reply])
        return entrypoint.final(value=reply.text, save=whole)

    for question in questions:
        flow.invoke(question, CONFIG)
    return THREAD


CLIENTS: list[Client] = [
    *(plain_model, streaming_model, retrying_chain, agent, sync_agent, agent_with_stock_model),
    *(stock_model_without_checkpointer, subgraph, functional_api),
]


def settled(gateway: Gateway, id_: str) -> dict[str, Any]:
    """What the gateway knows of a conversation, once its last turn is booked."""
    while (seen := gateway.conversation(id_))["running_turns"]:
        pass
    return seen


# --- what each of them gets ---------------------------------------------------------------------


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("client", CLIENTS, ids=lambda c: c.__name__)
async def test_matrix(
    client: Client, proxy: Any, gateway: Gateway, model_name: str, english: str
) -> None:
    proxy.refuse(2, 4)  # the second turn and, once repeated, the third are refused once each
    thread = await client(
        proxy.base_url, model_name, [english, "And what follows from that?", "Thank you."]
    )
    assert [call.status for call in proxy.calls] == [200, 503, 200, 503, 200]
    ids = {call.conversation for call in proxy.calls}
    assert len(ids) == 1
    (id_,) = ids
    assert id_ is not None and id_ == (thread or id_)
    assert [call.turn_index for call in proxy.calls] == [1, 2, 2, 3, 3]
    turn_ids = [call.turn_id for call in proxy.calls]
    assert turn_ids[1] == turn_ids[2] and turn_ids[3] == turn_ids[4]
    assert len(set(turn_ids)) == 3
    seen = settled(gateway, id_)
    assert (seen["turns"], seen["transfers"]) == (3, 1)
    assert len({turn["decode_engine"] for turn in seen["recent_turns"]}) == 1
    said = {call.tag(wire.FIRST_TURN_TOKENS) for call in proxy.calls}
    assert len(said) == 1
    assert int(said.pop() or 0) == pytest.approx(seen["first_turn_tokens"], rel=0.15)
    gateway.end_conversation(id_)


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("client", [agent, agent_with_stock_model], ids=lambda c: c.__name__)
async def test_code_is_counted_well_enough(
    client: Client, proxy: Any, gateway: Gateway, model_name: str, code: str
) -> None:
    await client(proxy.base_url, model_name, [f"Review this:\n{code}"])
    (call,) = proxy.calls
    seen = settled(gateway, call.conversation)
    counted = int(call.tag(wire.FIRST_TURN_TOKENS) or 0)
    assert counted == pytest.approx(seen["first_turn_tokens"], rel=0.15)
    gateway.end_conversation(call.conversation)


@pytest.mark.asyncio(loop_scope="session")
async def test_tools_are_counted_and_the_loop_is_one_conversation(
    proxy: Any, gateway: Gateway, model_name: str, english: str
) -> None:
    llm = ChatConServe(model=model_name, base_url=proxy.base_url)
    graph = create_agent(llm, [measure], system_prompt=english)
    await graph.ainvoke({"messages": [HumanMessage("Measure the thing 'kv'.")]}, CONFIG)
    assert [call.turn_index for call in proxy.calls] == [1, 2]
    seen = settled(gateway, THREAD)
    assert (seen["turns"], seen["transfers"]) == (2, 1)
    counted = int(proxy.calls[0].tag(wire.FIRST_TURN_TOKENS) or 0)
    assert counted == pytest.approx(seen["first_turn_tokens"], rel=0.15)
    assert await llm.aend_thread(THREAD) == 1
