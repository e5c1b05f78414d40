"""Requests that are aborted, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

CHAT = "/v1/chat/completions"


def long_chat(engine: Any, **fields: Any) -> dict[str, Any]:
    """A turn that goes on for as long as the test lets it."""
    messages = [{"role": "user", "content": engine.text(30)}]
    base = {"model": "tiny", "messages": messages, "max_tokens": 15_000}
    return {**base, "ignore_eos": True, "temperature": 0, **fields}


async def running(engine: Any) -> int:
    return int((await engine.driver.loads()).running_requests)


async def is_idle(engine: Any) -> bool:
    loads = await engine.driver.loads()
    return not (loads.running_requests or loads.waiting_requests)


async def first_event(response: Any) -> bytes:
    text = b""
    async with asyncio.timeout(60):
        while b"\n\n" not in text:
            text += await anext(response)
    return text


async def test_an_aborted_stream_ends_and_says_so(engine: Any) -> None:
    body = long_chat(engine, stream=True, rid="turn-7", stream_options={"include_usage": True})
    response = await engine.send("POST", CHAT, body)
    async with response:
        text = await first_event(response)
        await engine.until(lambda: _is_running(engine), "running")
        await engine.driver.abort("turn-7")
        async with asyncio.timeout(60):
            text += await response.read()
    await engine.until(lambda: is_idle(engine), "idle")
    blocks = [block for block in text.decode().split("\n\n") if block]
    assert blocks[-1] == "data: [DONE]"
    events = [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]
    reasons = [e["choices"][0]["finish_reason"] for e in events if e.get("choices")]
    errors = [event["error"] for event in events if "error" in event]
    assert "abort" in reasons or errors


async def test_an_aborted_whole_answer(engine: Any) -> None:
    asked = asyncio.create_task(engine.ask("POST", CHAT, long_chat(engine, rid="turn-8")))
    await engine.until(lambda: _is_running(engine), "running")
    await engine.driver.abort("turn-8")
    answer = await asked
    if answer.status == 200:
        assert answer.json()["choices"][0]["finish_reason"] == "abort"
    else:
        assert "bort" in answer.body.decode()
    await engine.until(lambda: is_idle(engine), "idle")


async def _is_running(engine: Any) -> bool:
    return await running(engine) == 1


async def test_an_abort_takes_along_ids_that_begin_with_it(engine: Any) -> None:
    """A trap: ids of the driver's are therefore never the beginning of one another."""
    bodies = [long_chat(engine, stream=True, rid=rid) for rid in ("turn-9", "turn-90")]
    first, second = [await engine.send("POST", CHAT, body) for body in bodies]
    async with first, second:
        await first_event(first)
        await first_event(second)
        await engine.driver.abort("turn-")  # of nobody: nothing happens
        await first_event(first)
        await engine.driver.abort("turn-9")
        async with asyncio.timeout(60):
            await first.read()
            await second.read()
    await engine.until(lambda: is_idle(engine), "idle")


async def test_a_batch_is_aborted_prompt_by_prompt(engine: Any) -> None:
    """Each prompt gets an id of its own; nothing answers to the batch's."""
    sampling = {"max_new_tokens": 15_000, "ignore_eos": True}
    body = {"input_ids": [engine.ids(20), engine.ids(20)], "sampling_params": sampling}
    asked = asyncio.create_task(engine.ask("POST", "/generate", {**body, "rid": "batch"}))

    async def both() -> bool:
        return await running(engine) == 2

    await engine.until(both, "running")
    await engine.driver.abort("batch")
    await engine.driver.abort("batch_0")
    await engine.until(lambda: _is_running(engine), "one left")
    await engine.driver.abort("batch_1")
    await asked
    await engine.until(lambda: is_idle(engine), "idle")


async def test_unknown_ids_are_ignored(engine: Any) -> None:
    await engine.driver.abort("never-heard-of")
    answer = await engine.ask("POST", "/abort_request", {"rid": "never-heard-of"})
    assert (answer.status, answer.body) == (200, b"")


async def test_a_client_that_leaves_a_stream_ends_its_request(engine: Any) -> None:
    response = await engine.send("POST", CHAT, long_chat(engine, stream=True))
    await first_event(response)
    await engine.until(lambda: _is_running(engine), "running")
    response.close()
    await engine.until(lambda: is_idle(engine), "idle")


async def test_a_client_that_leaves_a_whole_answer_ends_its_request(engine: Any) -> None:
    asked = asyncio.create_task(engine.ask("POST", CHAT, long_chat(engine)))
    await engine.until(lambda: _is_running(engine), "running")
    asked.cancel()
    await engine.until(lambda: is_idle(engine), "idle")


async def test_the_more_urgent_request_goes_first(engine: Any) -> None:
    """Two that wait for the same room: the later one has the larger ``priority``."""
    big = engine.ids(12_000)
    first = await engine.send("POST", CHAT, long_chat(engine, stream=True, input_ids=big))
    await first_event(first)
    ended: list[str] = []

    async def wait_in_line(rid: str, priority: int) -> None:
        await engine.driver.prefill(engine.ids(10_500), rid=rid, priority=priority)
        ended.append(rid)

    calls = []
    for place, (rid, priority) in enumerate((("patient", 0), ("urgent", 5)), start=1):
        calls.append(asyncio.create_task(wait_in_line(rid, priority)))

        async def in_line(place: int = place) -> bool:
            return bool((await engine.driver.loads()).waiting_requests == place)

        await engine.until(in_line, "waiting")
    first.close()
    await asyncio.gather(*calls)
    assert ended == ["urgent", "patient"]


async def test_a_waiting_request_can_be_aborted(engine: Any) -> None:
    """One that finds no room waits; it goes without having run."""
    seen = engine.ids(2_000)
    for ask in ("computed", "cached"):  # SGLang estimates what waits by its recent hits
        await engine.driver.prefill(seen, rid=ask)
    first = await engine.send("POST", CHAT, long_chat(engine, stream=True, rid="first"))
    await first_event(first)
    prompt = {"input_ids": engine.ids(19_000), "sampling_params": {"max_new_tokens": 0}}
    waits = asyncio.create_task(engine.ask("POST", "/generate", {**prompt, "rid": "second"}))

    async def waiting() -> bool:
        return bool((await engine.driver.loads()).waiting_requests)

    await engine.until(waiting, "waiting")

    async def counted() -> bool:
        return 0 < (await engine.driver.loads()).waiting_uncached_tokens <= 19_000

    await engine.until(counted, "counted")
    await engine.driver.abort("second")
    answer = await waits
    if answer.status == 200:
        assert answer.json()["meta_info"]["finish_reason"]["type"] == "abort"
    first.close()
    await engine.until(lambda: is_idle(engine), "idle")


@pytest.mark.parametrize("body", [{}, {"rid": ""}])
async def test_an_abort_of_nothing_is_harmless(engine: Any, body: dict[str, str]) -> None:
    assert (await engine.ask("POST", "/abort_request", body)).status == 200
