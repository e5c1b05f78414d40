"""What may be handed over: prompts that are their token ids, and nothing besides."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


@pytest.mark.parametrize(
    "more",
    [
        {"cache_salt": "mine"},
        {"extra_key": "mine"},
        {"lora_path": "adapter"},
        {"messages": [{"role": "user", "content": [PICTURE, {"type": "text", "text": "What?"}]}]},
    ],
    ids=lambda more: next(iter(more)),
)
async def test_a_prompt_that_is_more_than_its_token_ids_is_not_handed_over(
    make_cluster: Any, long_text: str, more: dict[str, Any]
) -> None:
    """With ``input_ids`` SGLang drops pictures; page keys would lack the salt or the adapter."""
    cluster = await make_cluster()
    if "messages" in more:
        more["messages"][0]["content"][1]["text"] = long_text
    answer = await cluster.chat("c", long_text, **more)
    assert answer.status == 200
    assert answer.headers["x-conserve-transfers"] == "0"
    assert cluster.prefillers[0].bodies("/generate") == []
    (sent,) = (
        body for engine in cluster.decoders for body in engine.bodies("/v1/chat/completions")
    )
    assert "input_ids" not in sent
    counters = (await cluster.ask("GET", "/conserve/v1/cluster")).json()["counters"]
    assert counters["fallbacks_by_reason"] == {"not_only_tokens": 1}
    cluster.settled()


async def test_text_in_parts_is_handed_over(make_cluster: Any, long_text: str) -> None:
    cluster = await make_cluster()
    parts = [{"type": "text", "text": long_text}]
    messages = [{"role": "user", "content": parts}]
    answer = await cluster.chat("c", long_text, messages=messages, cache_salt=None)
    assert answer.headers["x-conserve-prefill-engine"] == "p0"
    assert answer.headers["x-conserve-transfers"] == "1"
    cluster.settled()


async def test_what_is_stored_after_its_conversation_ended_leaves_the_store(
    make_cluster: Any, fake_engine: Any, long_text: str
) -> None:
    """The prefiller keeps the pages for a conversation when it acknowledges them, however late."""
    late: list[dict[str, Any]] = []

    async def keep(ack: dict[str, Any]) -> None:
        late.append(ack)

    prefiller, decoder = fake_engine(store_role="prefill"), fake_engine(store_role="decode")
    cluster = await make_cluster([prefiller], [decoder], gateway={"handoff_ack_timeout_s": 0.05})
    prefiller.acknowledge = keep
    assert (await cluster.chat("c", long_text)).headers["x-conserve-transfers"] == "0"
    await cluster.ask("DELETE", "/conserve/v1/conversations/c")
    await cluster.until(lambda: len(decoder.bodies("/close_session")) == 3)
    await cluster.ask("POST", "/conserve/v1/handoffs", late[0])
    await cluster.until(lambda: len(decoder.bodies("/close_session")) == 4)
    assert decoder.bodies("/close_session")[-1] == decoder.bodies("/close_session")[-2]
    cluster.settled()


async def test_an_end_comes_before_the_prefill_of_what_follows_it(
    make_cluster: Any, fake_engine: Any, long_text: str
) -> None:
    """Else it would take the pages of the new conversation of that name out of the store."""
    gate = asyncio.Event()
    prefiller, decoder = fake_engine(store_role="prefill"), fake_engine(store_role="decode")
    cluster = await make_cluster([prefiller], [decoder])
    await cluster.chat("c", long_text)
    decoder.close_gate = gate
    await cluster.ask("DELETE", "/conserve/v1/conversations/c")
    await decoder.until("/close_session")
    turn = asyncio.create_task(cluster.chat("c", long_text))
    await cluster.until(lambda: cluster.gateway.runtime.live_turns == 1)
    for _ in range(3):  # time enough for a prefill to be sent
        await cluster.gateway.fleet.refresh()
    assert len(prefiller.bodies("/generate")) == 1
    gate.set()
    assert (await turn).headers["x-conserve-transfers"] == "1"
    assert len(prefiller.bodies("/generate")) == 2
    assert len(decoder.bodies("/close_session")) == 3  # and none after it
    cluster.settled()


async def test_pages_of_a_conversation_that_lived_before_this_gateway_leave_the_store(
    make_cluster: Any, fake_engine: Any, long_text: str
) -> None:
    key = {"placement_key": "0123456789abcdef"}
    decoder = fake_engine(store_role="decode")
    cluster = await make_cluster([fake_engine(store_role="prefill")], [decoder], gateway=key)
    first = await cluster.chat("c", long_text)
    assert first.headers["x-conserve-transfers"] == "1"
    restarted = await make_cluster(0, [decoder], gateway=key)
    named = {"x-conserve-placement": first.headers["x-conserve-placement"]}
    await restarted.chat("c", long_text, "a", "b", headers=named)
    await restarted.ask("DELETE", "/conserve/v1/conversations/c")
    await restarted.until(lambda: len(decoder.bodies("/close_session")) >= 3)
    assert decoder.bodies("/close_session")[-1]["session_id"].endswith("!end")
    restarted.settled()


async def test_another_engine_clears_the_store_where_the_first_cannot(
    make_cluster: Any, fake_engine: Any, long_text: str
) -> None:
    prefiller, decoder = fake_engine(store_role="prefill"), fake_engine(store_role="decode")
    cluster = await make_cluster([prefiller], [decoder])
    await cluster.chat("c", long_text)
    decoder.healthy = False  # it answers 503, and has not been missed yet
    await cluster.ask("DELETE", "/conserve/v1/conversations/c")
    await cluster.until(lambda: len(prefiller.bodies("/close_session")) == 1)
    assert prefiller.bodies("/close_session")[0]["session_id"].endswith("!end")
    cluster.settled()
