"""``ChatConServe`` in LangChain's ways of wrapping a call: retries, fallbacks, caches, events."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool

from conserve_agents import Gateway, wire
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


# --- retries and fallbacks ----------------------------------------------------------------------


def calls_in_every_way(model: ChatConServe) -> Iterator[Any]:
    chain = model.with_retry(wait_exponential_jitter=False)
    yield lambda: chain.invoke("hi", CONFIG)
    yield lambda: list(model.with_retry(wait_exponential_jitter=False).batch(["hi"], [CONFIG]))
    yield lambda: asyncio.run(chain.ainvoke("hi", CONFIG))
    bound = model.bind(temperature=0).with_retry(wait_exponential_jitter=False)
    yield lambda: bound.invoke([HumanMessage("hi")], CONFIG)


@pytest.mark.parametrize("way", range(4))
def test_with_retry_repeats_the_turn(
    server: Any, model: ChatConServe, reply: Any, way: int
) -> None:
    server.script.extend([reply(status=503), reply(status=429), reply()])
    list(calls_in_every_way(model))[way]()
    assert ids(server) == ["T"] * 3
    assert tags(server, wire.TURN_INDEX) == ["1"] * 3
    assert len(set(tags(server, wire.TURN_ID))) == 1


def test_what_a_batch_repeats_is_what_failed(server: Any, model: ChatConServe, reply: Any) -> None:
    server.script.extend([reply(), reply(status=503)])
    chain = model.with_retry(wait_exponential_jitter=False)
    config: Any = {**CONFIG, "max_concurrency": 1}
    assert [m.text for m in chain.batch(["one", "two"], config)] == ["hello", "hello"]
    assert tags(server, wire.TURN_INDEX) == ["1", "2", "2"]
    assert len(set(tags(server, wire.TURN_ID))) == 2


def test_with_fallbacks_goes_on_in_the_turn(server: Any, model: ChatConServe, reply: Any) -> None:
    server.script.append(reply(status=503))
    other = ChatConServe(model="other", base_url=server.base_url)
    chain = model.with_fallbacks([other])
    assert chain.invoke("hi", CONFIG).text == "hello"
    assert [call.body["model"] for call in server.calls] == ["m", "other"]
    assert (ids(server), len(set(tags(server, wire.TURN_ID)))) == (["T", "T"], 1)


async def test_a_cancelled_call_made_again_is_the_same_turn(
    server: Any, model: ChatConServe, reply: Any
) -> None:
    arrived, loop, release = asyncio.Event(), asyncio.get_running_loop(), threading.Event()

    def hold() -> None:
        loop.call_soon_threadsafe(arrived.set)
        release.wait(timeout=30)

    server.script.append(reply(after=hold))
    call = asyncio.create_task(model.ainvoke("hi", CONFIG))
    await arrived.wait()
    call.cancel()
    await asyncio.wait([call])
    release.set()
    assert (await model.ainvoke("hi", CONFIG)).text == "hello"
    assert tags(server, wire.TURN_INDEX) == ["1", "1"]
    assert len(set(tags(server, wire.TURN_ID))) == 1


def test_a_stream_that_is_left_is_over(server: Any, model: ChatConServe) -> None:
    stream = model.stream("hi", CONFIG)
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined] # a generator
    model.invoke("other", CONFIG)
    assert tags(server, wire.TURN_INDEX) == ["1", "2"]


# --- events, caches, bindings -------------------------------------------------------------------


async def test_events_of_every_version(server: Any, model: ChatConServe) -> None:
    seen = [e["event"] async for e in model.astream_events("hi", CONFIG, version="v2")]
    assert "on_chat_model_stream" in seen
    stream = await model.astream_events("hi", CONFIG, version="v3")
    assert [event async for event in stream]
    assert list(model.stream_events("hi", CONFIG, version="v3"))
    assert ids(server) == ["T"] * 3
    assert tags(server, wire.TURN_INDEX) == ["1", "2", "3"]


def test_an_event_stream_belongs_where_it_was_asked_for(server: Any, model: ChatConServe) -> None:
    """v3 starts when it is first read, wherever that is."""
    stream = model.stream_events("hi", CONFIG, version="v3")
    with ThreadPoolExecutor(1) as elsewhere:
        assert elsewhere.submit(lambda: list(stream)).result()
    assert ids(server) == ["T"]


def test_a_cached_answer_is_no_turn(server: Any, model: ChatConServe) -> None:
    set_llm_cache(InMemoryCache())
    try:
        for thread in ("T", "U", "T"):
            model.invoke("hi", {"configurable": {"thread_id": thread}})
        model.invoke("other", CONFIG)
    finally:
        set_llm_cache(None)
    assert ids(server) == ["T", "T"]
    assert tags(server, wire.TURN_INDEX) == ["1", "2"]


def test_bindings_merge_their_headers(server: Any, model: ChatConServe) -> None:
    @tool
    def look(path: str) -> str:
        """Look at a file."""
        return path

    bound = model.bind_tools([look], extra_headers={"X-Mine": "1"})
    bound.invoke("hi", CONFIG)
    bound.invoke("hi", CONFIG, extra_headers={"X-Mine": "2"})  # the call's own, as in LangChain
    assert tags(server, "X-Mine") == ["1", "2"]
    assert ids(server) == ["T", "T"]
    assert server.calls[0].body["tools"][0]["function"]["name"] == "look"


async def test_generate_without_invoke(server: Any, model: ChatConServe) -> None:
    """The lower doors: nothing but the graph's context can say where the call belongs."""
    model.generate([[HumanMessage("a")], [HumanMessage("b")]])
    await model.agenerate([[HumanMessage("a")]])
    assert ids(server) == [None, None, None]


# --- the Responses API, through the gateway -----------------------------------------------------


@pytest.mark.asyncio(loop_scope="session")
async def test_the_responses_api_is_tagged_as_well(
    proxy: Any, gateway: Gateway, model_name: str, english: str
) -> None:
    model = ChatConServe(model=model_name, base_url=proxy.base_url, use_responses_api=True)
    config: Any = {"configurable": {"thread_id": "responses"}}
    history: list[Any] = [HumanMessage(english)]
    history.append(await model.ainvoke(history, config))
    history.append(HumanMessage("And decode?"))
    assert [chunk async for chunk in model.astream(history, config)]
    assert {call.path for call in proxy.calls} == {"/v1/responses"}
    assert [call.turn_index for call in proxy.calls] == [1, 2]
    assert {call.conversation for call in proxy.calls} == {"responses"}
    seen = gateway.conversation("responses")
    assert (seen["source"], seen["transfers"]) == ("conserve", 1)
    assert await model.aend_thread("responses") == 1
