"""The drop-in OpenAI clients, with the real SDK (2.45+ or 3.x, whichever is installed)."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pydantic
import pytest

from conserve_agents import (
    Conversation,
    Gateway,
    ServerTokenCounter,
    conversation,
    current_conversation,
    propagate,
    wire,
)
from conserve_agents.openai import AsyncConServeOpenAI, ConServeOpenAI

ASK: list[Any] = [{"role": "user", "content": "hi"}]
CALL: dict[str, Any] = {"model": "m", "messages": ASK}
#: The SDK's own header for a pause before a retry, so that no test waits.
AT_ONCE = {"retry-after-ms": "1"}


@pytest.fixture
def client(server: Any) -> Iterator[ConServeOpenAI]:
    with ConServeOpenAI(base_url=server.base_url) as made:
        yield made


def tags(server: Any, name: str) -> list[str | None]:
    return [call.tag(name) for call in server.calls]


class City(pydantic.BaseModel):
    name: str


# --- how it is made -------------------------------------------------------------------------


def test_defaults_need_no_arguments_and_never_take_openais_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-another-host")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.openai.com/v1")
    for cls in (ConServeOpenAI, AsyncConServeOpenAI):
        plain = cls()
        assert str(plain.base_url) == "http://127.0.0.1:8000/v1/"
        assert plain.api_key == "conserve"
    monkeypatch.setenv("CONSERVE_BASE_URL", "http://gateway:9/v1")
    monkeypatch.setenv("CONSERVE_API_KEY", "k")
    assert str(ConServeOpenAI().base_url) == "http://gateway:9/v1/"
    assert ConServeOpenAI(base_url=None).api_key == "k"
    assert ConServeOpenAI(base_url="http://other/v1", api_key="z").api_key == "z"
    assert isinstance(ConServeOpenAI(), openai.OpenAI)
    assert isinstance(AsyncConServeOpenAI(), openai.AsyncOpenAI)


# --- what is tagged -------------------------------------------------------------------------


def test_every_way_of_calling_is_tagged_once(
    server: Any, client: ConServeOpenAI, reply: Any
) -> None:
    chat = client.chat.completions
    with conversation("c") as talk:
        assert chat.create(**CALL).choices[0].message.content == "hello"
        chunks = list(chat.create(**CALL, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello"
        with chat.stream(**CALL) as stream:
            assert stream.get_final_completion().choices[0].message.content == "hello"
        server.script.append(reply(text='{"name": "Bern"}'))
        parsed = chat.parse(**CALL, response_format=City)
        assert parsed.choices[0].message.parsed == City(name="Bern")
        raw = chat.with_raw_response.create(**CALL)
        assert raw.parse().choices[0].message.content == "hello"
        with chat.with_streaming_response.create(**CALL) as streamed:
            assert "hello" in streamed.read().decode()
        assert client.completions.create(model="m", prompt="x" * 40).choices[0].text == "hello"
        client.post("/chat/completions", body=CALL, cast_to=object)
        assert talk.turns == 8
    assert tags(server, wire.TURN_INDEX) == [str(n) for n in range(1, 9)]
    assert set(tags(server, wire.CONVERSATION_ID)) == {"c"}
    assert len(set(tags(server, wire.TURN_ID))) == 8
    assert len(set(tags(server, wire.FIRST_TURN_TOKENS))) == 1
    assert server.ended == ["c"]


async def test_every_async_way_too(server: Any, reply: Any) -> None:
    async with AsyncConServeOpenAI(base_url=server.base_url) as client:
        chat = client.chat.completions
        async with conversation("c"):
            assert (await chat.create(**CALL)).choices[0].message.content == "hello"
            stream = await chat.create(**CALL, stream=True)
            pieces = [c.choices[0].delta.content or "" async for c in stream if c.choices]
            assert "".join(pieces) == "hello"
            async with chat.stream(**CALL) as events:
                final = await events.get_final_completion()
            assert final.choices[0].message.content == "hello"
            server.script.append(reply(text='{"name": "Bern"}'))
            parsed = await chat.parse(**CALL, response_format=City)
            assert parsed.choices[0].message.parsed == City(name="Bern")
            raw = await chat.with_raw_response.create(**CALL)
            assert raw.parse().choices[0].message.content == "hello"
    assert tags(server, wire.TURN_INDEX) == ["1", "2", "3", "4", "5"]
    assert server.ended == ["c"]
    assert tags(server, wire.PLACEMENT) == [None, "place-1", "place-2", "place-3", "place-4"]


def test_responses_are_tagged_in_every_way_too(
    server: Any, client: ConServeOpenAI, reply: Any
) -> None:
    call: dict[str, Any] = {"model": "m", "input": "x" * 384, "instructions": "y" * 96}
    with conversation("c") as talk:
        assert client.responses.create(**call).output_text == "hello"
        kinds = [event.type for event in client.responses.create(**call, stream=True)]
        assert kinds[-1] == "response.completed"
        with client.responses.stream(**call) as stream:
            assert stream.get_final_response().output_text == "hello"
        server.script.append(reply(text='{"name": "Bern"}'))
        assert client.responses.parse(**call, text_format=City).output_parsed == City(name="Bern")
        raw = client.responses.with_raw_response.create(**call)
        assert raw.parse().output_text == "hello"
        with client.responses.with_streaming_response.create(**call) as streamed:
            assert "hello" in streamed.read().decode()
        follow_up = [{"role": "user", "content": "and?"}]
        client.responses.create(model="m", input=follow_up, previous_response_id="r")
        assert talk.turns == 7
    assert tags(server, wire.TURN_INDEX) == [str(n) for n in range(1, 8)]
    # Instructions and input, 16 bytes around each.
    assert set(tags(server, wire.FIRST_TURN_TOKENS)) == {str((384 + 96 + 32) // 4)}


async def test_async_responses_are_too(server: Any) -> None:
    call: dict[str, Any] = {"model": "m", "input": "hi"}
    async with AsyncConServeOpenAI(base_url=server.base_url) as client, conversation("c"):
        assert (await client.responses.create(**call)).output_text == "hello"
        async with client.responses.stream(**call) as stream:
            assert (await stream.get_final_response()).output_text == "hello"
        raw = await client.responses.with_raw_response.create(**call)
        assert raw.parse().output_text == "hello"
    assert tags(server, wire.TURN_INDEX) == ["1", "2", "3"]


def test_wrapped_clients_are_the_same_client(server: Any, client: ConServeOpenAI) -> None:
    with conversation("c"):
        raw = client.with_raw_response.chat.completions.create(**CALL)
        assert raw.headers[wire.PLACEMENT] == "place-1"
        with client.with_streaming_response.chat.completions.create(**CALL) as streamed:
            assert "hello" in streamed.read().decode()
        other = client.with_options(timeout=3).with_raw_response
        assert other.responses.create(model="m", input="hi").parse().output_text == "hello"
    assert tags(server, wire.TURN_INDEX) == ["1", "2", "3"]
    assert tags(server, wire.PLACEMENT) == [None, "place-1", "place-2"]


def test_token_id_prompts_are_counted_exactly(server: Any, client: ConServeOpenAI) -> None:
    with conversation("c"):
        client.completions.create(model="m", prompt=[11, 12, 13])
    assert tags(server, wire.FIRST_TURN_TOKENS) == ["3"]
    assert tags(server, wire.TOKEN_COUNTER) == ["token-ids"]


def test_outside_of_a_conversation_nothing_is_tagged(server: Any, client: ConServeOpenAI) -> None:
    client.chat.completions.create(**CALL)
    with conversation("c") as talk:
        client.models.list()
        assert talk.turns == 0
    assert not [name for name in server.seen[0].headers if name.startswith("x-conserve")]
    assert server.ended == []


def test_a_tag_given_by_hand_is_left_alone(server: Any, client: ConServeOpenAI) -> None:
    mine = {wire.CONVERSATION_ID.upper(): "mine"}
    with conversation("c"):
        client.chat.completions.create(**CALL, extra_headers=mine)
        client.with_options(default_headers=mine).chat.completions.create(**CALL)
        client.chat.completions.create(**CALL, extra_headers={"X-Other": "kept"})
    assert tags(server, wire.CONVERSATION_ID) == ["mine", "mine", "c"]
    assert tags(server, wire.TURN_ID)[:2] == [None, None]
    assert server.calls[2].headers["x-other"] == "kept"


def test_retries_keep_the_tag_of_their_call(
    server: Any, client: ConServeOpenAI, reply: Any
) -> None:
    server.script.extend([reply(status=503, headers=AT_ONCE)] * 2)
    with conversation("c") as talk:
        client.chat.completions.create(**CALL)
        client.chat.completions.create(**CALL)
        assert talk.turns == 2
    turn_ids = tags(server, wire.TURN_ID)
    assert turn_ids[0] == turn_ids[1] == turn_ids[2] != turn_ids[3]
    assert tags(server, wire.TURN_INDEX) == ["1", "1", "1", "2"]
    assert tags(server, "x-stainless-retry-count") == ["0", "1", "2", "0"]


async def test_async_retries_keep_it_too(server: Any, reply: Any) -> None:
    server.script.append(reply(status=429, headers=AT_ONCE))
    async with AsyncConServeOpenAI(base_url=server.base_url) as client, conversation("c"):
        await client.chat.completions.create(**CALL)
    assert len(set(tags(server, wire.TURN_ID))) == 1
    assert tags(server, wire.TURN_INDEX) == ["1", "1"]


def test_an_application_that_tries_again_repeats_the_turn(
    server: Any, client: ConServeOpenAI, reply: Any
) -> None:
    once = client.with_options(max_retries=0)
    server.script.extend([reply(status=503), reply(status=400), reply()])
    with conversation("c") as talk:
        for _ in range(2):
            with pytest.raises(openai.APIStatusError):
                once.chat.completions.create(**CALL)
        once.chat.completions.create(**CALL)
        once.chat.completions.create(**CALL)
        assert talk.turns == 2
    turn_ids = tags(server, wire.TURN_ID)
    assert turn_ids[0] == turn_ids[1] == turn_ids[2] != turn_ids[3]
    assert tags(server, wire.TURN_INDEX) == ["1", "1", "1", "2"]


async def test_a_cancelled_call_made_again_is_the_same_turn(server: Any, reply: Any) -> None:
    arrived, gone = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hang() -> None:
        loop.call_soon_threadsafe(arrived.set)
        gone.wait(20)

    server.script.append(reply(after=hang))
    async with AsyncConServeOpenAI(base_url=server.base_url) as client, conversation("c"):
        call = asyncio.create_task(client.chat.completions.create(**CALL))
        await arrived.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        gone.set()
        await client.chat.completions.create(**CALL)
    assert len(set(tags(server, wire.TURN_ID))) == 1
    assert tags(server, wire.TURN_INDEX) == ["1", "1"]


def test_a_tag_by_hand_that_failed_is_noted_too(
    server: Any, client: ConServeOpenAI, reply: Any
) -> None:
    server.script.append(reply(status=400))
    with conversation("c") as talk:
        mine = talk.headers_for(ASK)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**CALL, extra_headers=mine)
        assert talk.headers_for(ASK)[wire.TURN_ID] == mine[wire.TURN_ID]


def test_errors_come_through_as_the_sdk_raises_them(
    server: Any, client: ConServeOpenAI, reply: Any
) -> None:
    server.script.append(reply(status=400))
    with conversation("c"):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**CALL)
        other = [{"role": "user", "content": "shorter"}]
        client.chat.completions.create(model="m", messages=other)
    assert tags(server, wire.TURN_INDEX) == ["1", "2"]
    assert server.ended == ["c"]


# --- state ----------------------------------------------------------------------------------


def test_copies_go_on_in_the_same_conversation(server: Any) -> None:
    client = ConServeOpenAI(base_url=server.base_url, conversation_id="own", api_key="k")
    client.chat.completions.create(**CALL)
    client.with_options(timeout=9).chat.completions.create(**CALL)
    client.copy(max_retries=0).with_options(timeout=9).chat.completions.create(**CALL)
    with conversation("context wins"):
        client.chat.completions.create(**CALL)
    assert tags(server, wire.TURN_INDEX) == ["1", "2", "3", "1"]
    assert tags(server, wire.PLACEMENT) == [None, "place-1", "place-2", None]
    assert client.conversation is not None and client.conversation.turns == 3
    assert server.ended == [wire.safe_id("context wins")]
    client.close()
    assert server.ended[1:] == ["own"]
    assert server.seen[-1].headers["authorization"] == "Bearer k"


async def test_closing_an_async_client_ends_its_own_conversation(server: Any) -> None:
    async with AsyncConServeOpenAI(base_url=server.base_url, conversation_id="own") as client:
        await client.with_options(timeout=9).chat.completions.create(**CALL)
    assert server.ended == ["own"]


def test_the_report_says_where_the_turn_ran(
    server: Any, client: ConServeOpenAI, reply: Any
) -> None:
    server.script.append(
        reply(headers={wire.DECODE_ENGINE: "d1", wire.PREFILL_ENGINE: "p0", wire.TRANSFERS: "1"})
    )
    with conversation("c") as talk:
        client.chat.completions.create(**CALL)
        report = talk.last_report
    assert report is not None
    assert (report.prefill_engine, report.decode_engine, report.transfers) == ("p0", "d1", 1)


def test_parallel_calls_overlap_and_each_is_a_turn(
    server: Any, client: ConServeOpenAI, reply: Any
) -> None:
    together = threading.Barrier(4, timeout=20)
    server.script.extend([reply(after=together.wait)] * 4)
    with conversation("c"), ThreadPoolExecutor(4) as pool:
        call = propagate(lambda _: client.chat.completions.create(**CALL))
        assert len(list(pool.map(call, range(4)))) == 4
    assert sorted(tags(server, wire.TURN_INDEX)) == ["1", "2", "3", "4"]
    assert server.ended == ["c"]


async def test_parallel_tasks_keep_to_their_conversations(server: Any) -> None:
    async with AsyncConServeOpenAI(base_url=server.base_url) as client:

        async def agent(name: str) -> None:
            async with conversation(name):
                for _ in range(3):
                    await client.chat.completions.create(**CALL)

        await asyncio.gather(*(agent(f"a{n}") for n in range(4)))
    for n in range(4):
        turns = [c for c in server.calls if c.tag(wire.CONVERSATION_ID) == f"a{n}"]
        assert [c.tag(wire.TURN_INDEX) for c in turns] == ["1", "2", "3"]
    assert sorted(server.ended) == ["a0", "a1", "a2", "a3"]


def test_equal_ids_at_two_gateways_are_not_mixed_up(server: Any, client: ConServeOpenAI) -> None:
    talk, other = Conversation("same"), Conversation("same")
    with talk.activate():
        client.chat.completions.create(**CALL)
    assert talk.last_report is not None
    assert other.last_report is None
    assert wire.PLACEMENT not in other.headers_for(ASK)


async def test_a_blocking_counter_does_not_block_the_loop(server: Any) -> None:
    threads: list[int] = []

    class Counter(ServerTokenCounter):
        def count(self, prompt: Any, tools: Any) -> int:
            threads.append(threading.get_ident())
            return super().count(prompt, tools)

    counter = Counter(Gateway(server.base_url))
    async with (
        AsyncConServeOpenAI(base_url=server.base_url, token_counter=counter) as client,
        conversation("c"),
    ):
        await client.chat.completions.create(**CALL)
        await client.chat.completions.create(**CALL)
    assert len(threads) == 1 and threads[0] != threading.get_ident()
    assert tags(server, wire.FIRST_TURN_TOKENS) == ["4242", "4242"]
    assert tags(server, wire.TOKEN_COUNTER) == ["server", "server"]


def test_tagging_that_fails_never_breaks_the_call(
    server: Any,
    client: ConServeOpenAI,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        raise AttributeError("the SDK moved it")

    with conversation("c") as talk:
        monkeypatch.setattr(talk, "headers_for", broken)
        for _ in range(2):
            assert client.chat.completions.create(**CALL).choices
    assert tags(server, wire.CONVERSATION_ID) == [None, None]
    assert caplog.text.count("the SDK moved it") == 1


def test_a_conversation_nobody_holds_is_forgotten(server: Any, client: ConServeOpenAI) -> None:
    from conserve_agents.conversation import conversation_of  # noqa: PLC0415 - internal

    with conversation("short", end_on_exit=False) as talk:
        turn_id = talk.headers_for(messages=ASK)[wire.TURN_ID]
        assert conversation_of(turn_id) is talk
        client.chat.completions.create(**CALL)
    del talk
    gc.collect()
    assert conversation_of(turn_id) is None
    assert current_conversation() is None
