"""Conversations without any client: context, turns, tags, ending."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_agents import (
    Conversation,
    ConversationIdError,
    ConversationStateError,
    Gateway,
    GatewayUrlError,
    conversation,
    current_conversation,
    headers_for,
    propagate,
    wire,
)

ASK = [{"role": "user", "content": "x" * 400}]


def test_headers_outside_of_any_conversation_are_empty() -> None:
    assert current_conversation() is None
    assert headers_for(messages=ASK) == {}


def test_first_turn_is_counted_once_and_frozen() -> None:
    with conversation("c", end_on_exit=False) as talk:
        first = headers_for(messages=ASK, tools=[{"type": "function"}])
        second = headers_for(messages=[*ASK, *ASK, *ASK])
    # 400 bytes of text + 16 around the message + 21 of schema, over 4, rounded up
    assert first[wire.FIRST_TURN_TOKENS] == second[wire.FIRST_TURN_TOKENS] == "110"
    assert first[wire.TOKEN_COUNTER] == "bytes/4"
    assert (first[wire.TURN_INDEX], second[wire.TURN_INDEX]) == ("1", "2")
    assert first[wire.CONVERSATION_ID] == second[wire.CONVERSATION_ID] == "c"
    assert first[wire.TURN_ID] != second[wire.TURN_ID]
    assert talk.first_turn_tokens == 110
    assert wire.PARENT_ID not in first and wire.FINAL not in first


def test_ids_are_made_and_injected() -> None:
    ids = (f"id-{n}" for n in itertools.count())
    talk = Conversation(new_id=lambda: next(ids))
    assert talk.id == "id-0"
    assert talk.headers_for()[wire.TURN_ID] == "id-1"
    assert conversation().id != conversation().id


@given(st.text(min_size=1))
def test_any_given_id_becomes_a_legal_one(given_id: str) -> None:
    talk = Conversation(given_id)
    assert wire.is_legal_id(talk.id)
    assert talk.id == wire.safe_id(given_id)


@pytest.mark.parametrize("bad", ["", 7])
def test_ids_that_cannot_be_used_are_refused(bad: Any) -> None:
    with pytest.raises(ConversationIdError, match="conversation id"):
        conversation(bad)
    with pytest.raises(ConversationIdError, match="conversation parent"):
        conversation("ok", parent=bad)


def test_nested_conversations_name_their_parent() -> None:
    with conversation("outer", end_on_exit=False):
        with conversation("inner", end_on_exit=False):
            assert headers_for()[wire.PARENT_ID] == "outer"
        assert wire.PARENT_ID not in headers_for()
        with conversation("inner", parent="elsewhere", end_on_exit=False):
            assert headers_for()[wire.PARENT_ID] == "elsewhere"
        with conversation("outer", end_on_exit=False) as same:
            assert same.parent_id is None
    assert current_conversation() is None


def test_a_conversation_is_entered_once() -> None:
    talk = conversation("c", end_on_exit=False)
    with talk, pytest.raises(ConversationStateError, match="activate"):
        talk.__enter__()
    with talk.activate():
        assert current_conversation() is talk
    assert current_conversation() is None


def test_a_given_id_is_resumed_from_its_history() -> None:
    answer = {"role": "assistant", "content": "y" * 400}
    with conversation("resumed", end_on_exit=False):
        tags = headers_for(messages=[*ASK, answer, *ASK, answer, *ASK])
        assert tags[wire.TURN_INDEX] == "3"
        assert tags[wire.FIRST_TURN_TOKENS] == "104"
        assert headers_for(messages=ASK)[wire.TURN_INDEX] == "4"
    # A new conversation cannot have been answered: the assistant's message is an example.
    with conversation(end_on_exit=False):
        assert headers_for(messages=[*ASK, answer, *ASK])[wire.TURN_INDEX] == "1"


def test_final_marks_one_turn() -> None:
    talk = Conversation("c")
    assert talk.headers_for(final=True)[wire.FINAL] == "1"
    talk.mark_final()
    assert talk.headers_for()[wire.FINAL] == "1"
    assert wire.FINAL not in talk.headers_for()


def test_placement_is_echoed_and_the_latest_turn_wins() -> None:
    talk = Conversation("c")
    talk.headers_for()
    report = talk.observe(
        {
            wire.PLACEMENT: "second",
            wire.TURN_INDEX.upper(): "2",
            wire.CACHED_TOKENS: "64",
            wire.OVERHEAD_MS: "0.4",
            wire.DECODE_ENGINE: "d0",
        }
    )
    assert (report.cached_tokens, report.overhead_ms, report.decode_engine) == (64, 0.4, "d0")
    talk.observe({wire.PLACEMENT: "first, answered late", wire.TURN_INDEX: "1"})
    assert talk.headers_for()[wire.PLACEMENT] == "second"
    talk.observe({wire.TURN_INDEX: "not a number", wire.OVERHEAD_MS: "nor this"})
    assert wire.PLACEMENT not in talk.headers_for()


def test_threads_need_propagate_and_parallel_turns_get_their_own_index() -> None:
    with conversation("c", end_on_exit=False), ThreadPoolExecutor(8) as pool:
        assert pool.submit(current_conversation).result() is None
        tagged = propagate(lambda _: headers_for(messages=ASK))
        tags = list(pool.map(tagged, range(64)))
    assert sorted(int(t[wire.TURN_INDEX]) for t in tags) == list(range(1, 65))
    assert len({t[wire.TURN_ID] for t in tags}) == 64
    assert {t[wire.FIRST_TURN_TOKENS] for t in tags} == {"104"}


async def test_tasks_keep_their_own_conversation() -> None:
    inside = asyncio.Event()
    leave = asyncio.Event()

    async def talker() -> str:
        async with conversation("task", end_on_exit=False):
            inside.set()
            await leave.wait()
            in_thread = await asyncio.to_thread(headers_for)
            return in_thread[wire.CONVERSATION_ID]

    task = asyncio.create_task(talker())
    await inside.wait()
    assert current_conversation() is None
    leave.set()
    assert await task == "task"


def test_leaving_ends_at_the_gateway_and_later_calls_are_not_tagged(
    server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with conversation("a/b|ü", gateway=server.base_url) as talk:
        talk.headers_for()
    assert server.ended == [wire.safe_id("a/b|ü")]
    assert talk.end() is False
    assert len(server.ended) == 1
    assert talk.headers_for() == {} and talk.headers_for() == {}
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "not tagged" in warnings[0].getMessage()


def test_nothing_is_ended_that_never_was(server: Any) -> None:
    with conversation("unused", gateway=server.base_url):
        pass
    with conversation("goes on", gateway=server.base_url, end_on_exit=False) as talk:
        talk.headers_for()
    assert server.ended == []


def test_children_end_with_their_parent(server: Any) -> None:
    with conversation("p", gateway=Gateway(server.root + "/")) as talk:
        talk.headers_for()
        child = talk.child("p|tools")
        assert child is talk.child("p|tools")
        assert child.headers_for()[wire.PARENT_ID] == "p"
        talk.child("p|unused")
    assert server.ended == ["p|tools", "p"]


async def test_async_exit_ends_too(server: Any) -> None:
    async with conversation("c", gateway=server.base_url) as talk:
        talk.headers_for()
    assert server.ended == ["c"]


@pytest.mark.parametrize("status", [404, 500])
def test_an_end_that_fails_is_logged_and_never_raises(
    server: Any, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    server.end_status = status
    with conversation("c", gateway=server.base_url) as talk:
        talk.headers_for()
    assert server.ended == ["c"]
    assert ("HTTP 500" in caplog.text) == (status == 500)


def test_an_end_without_a_gateway_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(request: Any, timeout_s: float) -> bytes:
        raise ConnectionRefusedError("refused")

    for name in ("one", "two"):
        with conversation(name, gateway=Gateway("http://g", send=refuse)) as talk:
            talk.headers_for()
    assert caplog.text.count("was not ended") == 1
    with pytest.raises(GatewayUrlError, match="ftp"):
        conversation(gateway="ftp://g")


def test_a_dead_gateway_is_waited_for_once() -> None:
    tried: list[str] = []

    def hang(request: Any, timeout_s: float) -> bytes:
        tried.append(request.full_url)
        raise TimeoutError("timed out")

    with conversation("p", gateway=Gateway("http://g", send=hang)) as talk:
        for n in range(5):
            talk.child(f"c{n}").headers_for()
        talk.headers_for()
    assert len(tried) == 1
    assert talk.ended and talk.child("c0").ended and talk.child("late").ended


def test_an_exception_inside_passes_through_and_still_ends(server: Any) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        conversation("c", gateway=server.base_url) as talk,
    ):
        talk.headers_for()
        _ = 1 / 0
    assert server.ended == ["c"]


def test_ending_while_others_tag_is_safe(server: Any) -> None:
    talk = Conversation("c", gateway=server.base_url)
    start = threading.Barrier(4)

    def hammer() -> list[dict[str, str]]:
        start.wait()
        return [talk.headers_for(messages=ASK) for _ in range(200)]

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(hammer) for _ in range(3)]
        start.wait()
        talk.end()
        tags = [t for worker in workers for t in worker.result() if t]
    assert sorted(int(t[wire.TURN_INDEX]) for t in tags) == list(range(1, len(tags) + 1))
    assert talk.end() is False
    assert len(server.ended) <= 1
