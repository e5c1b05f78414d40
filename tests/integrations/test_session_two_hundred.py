"""Two hundred conversations at once, from threads, tasks and processes, never mix their ids."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conserve_agents import ContextExecutor, Gateway, conversation, current_conversation, wire
from conserve_agents.openai import ConServeOpenAI


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import session_worker  # noqa: PLC0415 - importable only here

    return session_worker


@pytest.fixture
def processes() -> Iterator[ContextExecutor]:
    context = multiprocessing.get_context("spawn")
    with ContextExecutor(ProcessPoolExecutor(2, mp_context=context)) as pool:
        yield pool


def run_all(worker: Any, processes: Any, where: tuple[str, str], mark: str) -> set[str]:
    """Run all two hundred together; returns their ids when they are done."""

    def names(kind: str, count: int) -> list[str]:
        return [f"{mark}-{kind}-{number}" for number in range(count)]

    threads, tasks = names("thread", 64), names("task", 64)
    own, handed = names("process", 40), names("handed", 32)
    base_url, model = where
    client = ConServeOpenAI(base_url=base_url)
    together = threading.Barrier(64, timeout=60)

    def agent(name: str) -> None:
        together.wait()  # all of them really are at once
        worker.run_agent(client, model, name)

    pending: list[Future[Any]] = [
        processes.submit(worker.run_many, where, half) for half in (own[:20], own[20:])
    ]
    with client, ThreadPoolExecutor(64) as pool:
        for name in handed:
            with conversation(name, end_on_exit=False):
                worker.ask(client, model, name, 1)
                pending.append(processes.submit(worker.go_on, where, name))
        pending += [pool.submit(agent, name) for name in threads]
        asyncio.run(worker.run_tasks(where, tasks))
        for future in pending:
            future.result(timeout=120)
    assert current_conversation() is None
    return {*threads, *tasks, *own, *handed}


def test_what_arrives_is_tagged_with_its_own(worker: Any, processes: Any, server: Any) -> None:
    def placement(seen: Any, number: int) -> str:
        return f"{seen.tag(wire.CONVERSATION_ID)}@{seen.tag(wire.TURN_INDEX)}"

    server.placement = placement
    expected = run_all(worker, processes, (server.base_url, "m"), "sent")
    assert len(expected) == 200
    turns: dict[str, list[int]] = defaultdict(list)
    for call in server.calls:
        name, _, turn = call.body["messages"][0]["content"].split(" ")
        assert call.tag(wire.CONVERSATION_ID) == name
        assert call.tag(wire.TURN_INDEX) == turn
        # What it echoes is what the turn before it was given, in this very conversation.
        before = None if turn == "1" else f"{name}@{int(turn) - 1}"
        assert call.tag(wire.PLACEMENT) == before
        turns[name].append(int(turn))
    assert turns == {name: [1, 2, 3] for name in expected}
    assert len({call.tag(wire.TURN_ID) for call in server.calls}) == 600


def test_the_gateway_keeps_them_apart(
    worker: Any, processes: Any, cluster: str, gateway: Gateway, model_name: str
) -> None:
    expected = run_all(worker, processes, (cluster, model_name), "served")
    for name in expected:
        seen = gateway.conversation(name)
        assert (seen["source"], seen["turns"]) == ("conserve", worker.TURNS)
        assert {turn["outcome"] for turn in seen["recent_turns"]} == {"finished"}
