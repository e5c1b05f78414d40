"""Many samples of one prompt at once, without any key, as reinforcement learning sends them."""

from __future__ import annotations

import asyncio
from typing import Any

SAMPLES = 16


async def test_every_sample_is_a_conversation_and_is_continued(
    make_cluster: Any, reply: Any
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    go = asyncio.Event()
    cluster.decoders[0].replies += [reply(before=go) for _ in range(SAMPLES)]
    asked = [asyncio.ensure_future(cluster.chat(None, "sample")) for _ in range(SAMPLES)]
    for _ in range(SAMPLES):
        await cluster.decoders[0].until("/v1/chat/completions")
    go.set()
    first = [(await answer).headers for answer in asked]
    ids = {headers["x-conserve-conversation-id"] for headers in first}
    assert len(ids) == SAMPLES
    await cluster.until(lambda: cluster.gateway.runtime.live_turns == 0)
    second = await asyncio.gather(
        *(cluster.chat(None, "sample", f"answer {n}", "go on") for n in range(SAMPLES))
    )
    assert {a.headers["x-conserve-conversation-id"] for a in second} == ids
    assert {a.headers["x-conserve-relation"] for a in second} == {"extend"}
    assert {a.headers["x-conserve-turn-index"] for a in second} == {"2"}
    assert len(cluster.gateway.conversations) == SAMPLES
    cluster.settled()


async def test_client_that_leaves_at_once_is_not_counted_for_ever(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    for _ in range(5):
        response = asyncio.ensure_future(
            cluster.send("POST", "/v1/chat/completions", {"model": "qwen", "messages": [{}]})
        )
        await asyncio.sleep(0)
        response.cancel()
    await cluster.chat("c", "hi")
    await cluster.until(lambda: cluster.gateway.runtime.live_turns == 0)
    await cluster.until(
        lambda: all(c.running == 0 for c in cluster.gateway.conversations.of_tenant(None, limit=9))
    )
    cluster.settled()
