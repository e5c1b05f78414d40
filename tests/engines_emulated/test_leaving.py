"""Clients that leave and requests that are aborted: nothing stays behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest


async def settled(client: Any) -> Any:
    """The engine's figures once no request is in it."""
    runtime = client.engine.service.runtime
    while runtime.rids():
        await runtime.changed()
    return runtime.stats()


LONG = {"max_tokens": 4000, "ignore_eos": True}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("stage", ["queued", "prefill", "decode"])
async def test_a_client_that_leaves_frees_its_request(
    start_engine: Any, manual_clock: Any, streaming: bool, stage: str
) -> None:
    clock = manual_clock()
    client = await start_engine(clock=clock, max_running_requests=1)
    runtime = client.engine.service.runtime
    if stage == "queued":
        blocker = asyncio.create_task(
            client.post("/v1/completions", {"prompt": [2] * 10_000, **LONG, "rid": "blocker"})
        )
        await clock.armed()
    body = {"prompt": [1] * 10_000, **LONG, "stream": streaming, "rid": "leaver"}
    call = asyncio.create_task(client.post("/v1/completions", body))
    while "leaver" not in runtime.rids():
        await runtime.changed()
    await clock.armed()
    if stage == "decode":
        while not runtime.stats().running:
            await clock.fire_next()
    call.cancel()
    while "leaver" in runtime.rids():
        await runtime.changed()
    assert runtime.stats().aborted_requests == 1
    if stage == "queued":
        assert runtime.rids() == ["blocker"]
        blocker.cancel()
    stats = await settled(client)
    assert (stats.used_tokens, stats.running, stats.queued, stats.prefilling) == (0, 0, 0, 0)


async def test_abort_request_ends_a_stream_with_abort(start_engine: Any, manual_clock: Any) -> None:
    clock = manual_clock()
    client = await start_engine(clock=clock)
    runtime = client.engine.service.runtime
    body = {"messages": [{"role": "user", "content": "hi"}], **LONG, "stream": True, "rid": "r"}
    call = asyncio.create_task(client.post("/v1/chat/completions", body))
    await clock.armed()
    while not runtime.stats().running:
        await clock.fire_next()
    assert (await client.post("/abort_request", {"rid": "r"})).status == 200
    events = (await call).events
    assert events[-1]["choices"][0]["finish_reason"] == "abort"
    assert (await settled(client)).used_tokens == 0
    assert (await client.post("/abort_request", {"rid": "unknown"})).status == 200


async def test_abort_all_and_abort_of_ids_that_begin_alike(
    start_engine: Any, manual_clock: Any
) -> None:
    client = await start_engine(clock=manual_clock())
    runtime = client.engine.service.runtime

    def begin(rid: str) -> asyncio.Task[Any]:
        body = {"text": "x", "rid": rid, "sampling_params": {"max_new_tokens": 50}}
        return asyncio.create_task(client.post("/generate", body))

    calls = [begin("a"), begin("ab"), begin("b")]
    while len(runtime.rids()) < 3:
        await runtime.changed()
    await client.post("/abort_request", {"rid": "a"})
    for call in calls[:2]:
        assert (await call).json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert runtime.rids() == ["b"]
    await client.post("/abort_request", {"abort_all": True})
    await calls[2]
    assert runtime.rids() == []


async def test_a_refused_batch_leaves_nothing_running(engine: Any) -> None:
    answer = await engine.post("/v1/completions", {"prompt": [[1], [2], [2**31]], "max_tokens": 5})
    assert answer.status == 400
    assert (await settled(engine)).used_tokens == 0


async def test_stopping_ends_open_streams(start_engine: Any, manual_clock: Any) -> None:
    clock = manual_clock()
    client = await start_engine(clock=clock)
    body = {"messages": [{"role": "user", "content": "hi"}], **LONG, "stream": True}
    call = asyncio.create_task(client.post("/v1/chat/completions", body))
    await clock.armed()
    while not client.engine.service.runtime.stats().running:
        await clock.fire_next()
    await client.engine.stop()
    assert (await call).events[-1]["choices"][0]["finish_reason"] == "abort"


async def test_many_streams_at_once_lose_no_token(engine: Any) -> None:
    body = {"max_tokens": 200, "ignore_eos": True, "stream": True, "return_token_ids": True}

    async def one(number: int) -> int:
        answer = await engine.post("/v1/completions", {**body, "prompt": [number] * 10})
        return sum(len(event["choices"][0]["token_ids"]) for event in answer.events)

    assert await asyncio.gather(*map(one, range(1, 33))) == [200] * 32
    info = (await engine.get("/server_info")).json()["conserve"]
    assert info["model_time_s"] > 0
