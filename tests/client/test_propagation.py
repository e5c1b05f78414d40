"""The current conversation in threads, executors, tasks and other processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conserve_agents import (
    ContextExecutor,
    conversation,
    current_conversation,
    headers_for,
    in_conversation,
    propagate,
    run_in_executor,
    wire,
)

ASK: list[Any] = [{"role": "user", "content": "hi"}]


def name() -> str | None:
    current = current_conversation()
    return current.id if current else None


def test_an_executor_that_keeps_the_conversation() -> None:
    with ThreadPoolExecutor(2) as inner:
        pool = ContextExecutor(inner)
        with conversation("a", end_on_exit=False):
            inside = pool.submit(name)
            mapped = pool.map(lambda n: (n, name()), range(3))
        with conversation("b", end_on_exit=False):
            other = pool.submit(name)
        assert (inside.result(), other.result(), pool.submit(name).result()) == ("a", "b", None)
        assert list(mapped) == [(0, "a"), (1, "a"), (2, "a")]
    with ContextExecutor(ThreadPoolExecutor(1)) as pool:
        assert pool.submit(pow, 2, exp=3).result() == 8
    with pytest.raises(RuntimeError, match="shutdown"):
        pool.submit(name)


def test_what_runs_there_cannot_change_the_callers_conversation() -> None:
    def enter() -> str | None:
        conversation("inner").__enter__()
        return name()

    with ContextExecutor(ThreadPoolExecutor(1)) as pool, conversation("a", end_on_exit=False):
        assert pool.submit(enter).result() == "inner"
        assert pool.submit(name).result() == "a"
        assert name() == "a"


def test_a_process_pool_is_handed_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from talk_on_in_another_process import tag  # noqa: PLC0415 - importable only here

    context = multiprocessing.get_context("spawn")
    with ContextExecutor(ProcessPoolExecutor(1, mp_context=context)) as pool:
        with conversation("a", end_on_exit=False) as talk:
            first = talk.headers_for(ASK)
            there = pool.submit(tag, ASK).result(60)
        outside = pool.submit(tag, ASK).result(60)
    assert there[wire.CONVERSATION_ID] == "a"
    assert there[wire.TURN_INDEX] == "2"
    assert there[wire.FIRST_TURN_TOKENS] == first[wire.FIRST_TURN_TOKENS]
    assert outside == {}


async def test_run_in_executor_keeps_it_with_any_pool() -> None:
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as pool:
        async with conversation("a", end_on_exit=False):
            assert await loop.run_in_executor(pool, name) is None  # what this is for
            assert await run_in_executor(pool, name) == "a"
            assert await run_in_executor(None, name) == "a"
            assert await run_in_executor(ContextExecutor(pool), name) == "a"
            assert await loop.run_in_executor(ContextExecutor(pool), name) == "a"
            assert await run_in_executor(pool, pow, 2, exp=3) == 8
            with pytest.raises(ZeroDivisionError):
                await run_in_executor(None, lambda: 1 // 0)


def test_a_plain_thread_needs_propagate() -> None:
    seen: list[str | None] = []
    with conversation("a", end_on_exit=False):
        work = [lambda: seen.append(name()), propagate(lambda: seen.append(name()))]
        for target in work:
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert seen == [None, "a"]


def test_every_call_of_a_decorated_function_is_a_conversation(server: Any) -> None:
    @in_conversation(gateway=server.base_url)
    def run(task: str) -> tuple[str, str | None]:
        """Runs."""
        headers_for(messages=ASK)
        return task, name()

    (one, first), (two, second) = run("x"), run(task="y")
    assert (one, two) == ("x", "y")
    assert first and second and first != second
    assert server.ended == [first, second]
    assert run.__doc__ == "Runs." and name() is None


async def test_a_decorated_coroutine_too_with_an_id_from_its_arguments(server: Any) -> None:
    @in_conversation(lambda chat, text: f"chat-{chat}", end_on_exit=False, gateway=server.base_url)
    async def answer(chat: int, text: str) -> str | None:
        await asyncio.sleep(0)
        headers_for(messages=ASK)
        return name()

    ids = await asyncio.gather(*(answer(n, text="t") for n in range(3)))
    assert ids == ["chat-0", "chat-1", "chat-2"]
    assert server.ended == []


def test_generators_are_refused() -> None:
    def numbers() -> Iterator[int]:
        yield 1

    async def later() -> AsyncIterator[int]:
        yield 1

    for generator in (numbers, later):
        with pytest.raises(TypeError, match="leak"):
            in_conversation()(generator)
