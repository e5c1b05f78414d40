"""Sessions on engines: opened once, closed to park or to release, opened again."""

from __future__ import annotations

import asyncio
from typing import Any

CHAT = "/v1/chat/completions"


async def test_parked_conversation_gives_its_session_back_and_returns(
    make_cluster: Any, fake_engine: Any
) -> None:
    cluster = await make_cluster(
        0, [fake_engine(kv_capacity_tokens=1200)], tiers={"host_capacity_tokens": 5000}
    )
    decoder = cluster.decoders[0]
    await cluster.chat("idle", "x" * 3000, max_tokens=1)
    await cluster.chat("busy", "y" * 3000, max_tokens=1)  # room for one: the idle one is parked
    await decoder.until("/close_session")
    (opened, _) = decoder.bodies("/open_session")
    assert decoder.bodies("/close_session") == [{"session_id": opened["session_id"]}]
    path = "/conserve/v1/conversations/idle"
    assert (await cluster.ask("GET", path)).json()["phase"] == "parked"
    counters = (await cluster.ask("GET", "/conserve/v1/cluster")).json()["counters"]
    assert counters["parks"] == 1
    back = await cluster.chat("idle", "x" * 3000, "a", "b", max_tokens=1)
    assert back.headers["x-conserve-reason"] == "pinned"
    again = decoder.bodies("/open_session")[-1]
    assert again["session_id"] == opened["session_id"]
    assert (await cluster.ask("GET", path)).json()["phase"] == "idle"
    cluster.settled()


async def test_session_moves_with_its_conversation(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, scheduler={"policy": "round_robin"})
    for number in range(3):
        await cluster.chat("c", "hi", *["x"] * (2 * number))
    first, second = cluster.decoders
    homes = sorted(len(d.bodies(CHAT)) for d in cluster.decoders)
    assert homes == [1, 2]
    await first.until("/open_session")
    await second.until("/open_session")
    # At most one session is left open, wherever the last turn ran.
    await cluster.until(lambda: sum(len(d.bodies("/close_session")) for d in cluster.decoders) == 2)
    assert sum(len(d.bodies("/open_session")) for d in cluster.decoders) == 3


async def test_expired_conversation_is_released(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1, scheduler={"idle_timeout_s": 0.05})
    await cluster.chat("c", "hi")
    await cluster.decoders[0].until("/close_session")
    seen = (await cluster.ask("GET", "/conserve/v1/conversations/c")).json()
    assert seen["state"] == "ended"
    assert cluster.gateway.runtime.scheduler.open_conversations == 0
    cluster.settled()


async def test_messages_of_an_expired_conversation_lead_nowhere(
    make_cluster: Any, reply: Any
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1, scheduler={"idle_timeout_s": 0.05})
    first = (await cluster.chat(None, "hi")).headers["x-conserve-conversation-id"]
    await cluster.decoders[0].until("/close_session")
    go = asyncio.Event()
    cluster.decoders[0].replies += [reply(before=go), reply(before=go)]
    pending = []
    for _ in range(2):  # at once, so that none of them expires in between
        pending.append(asyncio.ensure_future(cluster.chat(None, "hi")))
        await cluster.decoders[0].until("/v1/chat/completions")
    go.set()
    anew, twin = [await one for one in pending]
    assert [r.headers["x-conserve-relation"] for r in (anew, twin)] == ["new", "fork"]
    assert first not in {r.headers["x-conserve-conversation-id"] for r in (anew, twin)}


async def test_memory_of_conversations_is_bounded(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1, gateway={"max_conversations": 3})
    for number in range(8):
        assert (await cluster.chat(f"c{number}", "hi")).status == 200
    assert len(cluster.gateway.conversations) == 3
    assert cluster.gateway.runtime.scheduler.open_conversations == 3
    assert (await cluster.ask("GET", "/conserve/v1/conversations/c0")).status == 404
    cluster.settled()


async def test_session_that_the_engine_forgot_is_opened_again(
    make_cluster: Any, reply: Any
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    decoder = cluster.decoders[0]
    await cluster.chat("c", "hi")
    gone = b'{"message": "Invalid request: session id cs-1 does not exist", "code": 400}'
    decoder.replies.append(reply(status=400, body=gone))
    assert (await cluster.chat("c", "hi", "a", "b")).status == 200
    assert len(decoder.bodies("/open_session")) == 2
    cluster.settled()


async def test_an_ended_conversation_leaves_its_engine_and_the_store(
    make_cluster: Any, fake_engine: Any, long_text: str
) -> None:
    """Where engines run our store: a park is a plain close, an end says more, in order."""
    decoder = fake_engine(store_role="decode")
    cluster = await make_cluster([fake_engine(store_role="prefill")], [decoder])
    await cluster.chat("c", long_text)
    name = decoder.bodies("/open_session")[0]["session_id"]
    await cluster.ask("DELETE", "/conserve/v1/conversations/c")
    await cluster.until(lambda: len(decoder.bodies("/close_session")) == 3)
    closed = [body["session_id"] for body in decoder.bodies("/close_session")]
    assert closed == [name, f"{name}!free", f"{name}!end"]
    assert cluster.prefillers[0].bodies("/close_session") == []
    cluster.settled()


async def test_a_conversation_that_ends_in_its_turn_is_cleared_after_it(
    make_cluster: Any, fake_engine: Any, reply: Any, long_text: str
) -> None:
    held = asyncio.Event()
    decoder = fake_engine(store_role="decode")
    decoder.replies.append(reply(before=held))
    cluster = await make_cluster([fake_engine(store_role="prefill")], [decoder])
    turn = asyncio.create_task(cluster.chat("c", long_text))
    await decoder.until(CHAT)
    await cluster.ask("DELETE", "/conserve/v1/conversations/c")
    assert decoder.bodies("/close_session") == []
    held.set()
    assert (await turn).status == 200
    await cluster.until(lambda: len(decoder.bodies("/close_session")) == 3)
    cluster.settled()


async def test_what_was_never_handed_over_is_in_no_store(
    make_cluster: Any, fake_engine: Any
) -> None:
    decoder = fake_engine(store_role="decode")
    cluster = await make_cluster([fake_engine(store_role="prefill")], [decoder])
    await cluster.chat("c", "short")
    await cluster.ask("DELETE", "/conserve/v1/conversations/c")
    await cluster.until(lambda: len(decoder.bodies("/close_session")) == 2)
    name = decoder.bodies("/open_session")[0]["session_id"]
    closed = [body["session_id"] for body in decoder.bodies("/close_session")]
    assert closed == [name, f"{name}!free"]
    cluster.settled()


async def test_sglang_without_our_store_is_no_prefiller(
    make_cluster: Any, fake_engine: Any
) -> None:
    """Every first turn would wait for its acknowledgement in vain."""
    bare = [fake_engine(version="0.5.23")]
    cluster = await make_cluster(bare, [fake_engine(version="0.5.23")], wait=False)
    await cluster.until(lambda: cluster.gateway.fleet.get("p0").state == "unfit")
    assert "without our hand-off store" in str(cluster.gateway.fleet.get("p0").note)
    await cluster.until(lambda: cluster.gateway.fleet.get("d0").state == "ready")
    other = await make_cluster(bare, 1, scheduler={"policy": "collocated"}, wait=False)
    await other.until(lambda: other.gateway.fleet.get("p0").state == "ready")


async def test_a_prefiller_whose_store_only_reads_is_unfit(
    make_cluster: Any, fake_engine: Any
) -> None:
    cluster = await make_cluster([fake_engine(store_role="decode")], wait=False)
    await cluster.until(lambda: cluster.gateway.fleet.get("p0").state == "unfit")
    assert "only reads (role 'decode'): start it with role 'prefill'" in str(
        cluster.gateway.fleet.get("p0").note
    )


async def test_room_to_park_is_what_the_host_holds_beyond_a_full_device(
    make_cluster: Any, fake_engine: Any
) -> None:
    """SGLang writes through: the device's KV is in the host tier as well."""
    cluster = await make_cluster(
        0, [fake_engine(kv_capacity_tokens=1000, host_total_tokens=2500), fake_engine()]
    )
    engines = cluster.gateway.runtime.scheduler.engines
    assert [engines[name].host_capacity_tokens for name in ("d0", "d1")] == [1500, 0]


async def test_drift_is_what_an_engine_holds_beyond_the_ledger(
    make_cluster: Any, fake_engine: Any
) -> None:
    cluster = await make_cluster(0, [fake_engine(held_tokens=640)])
    await cluster.gateway.fleet.refresh()
    (engine,) = (await cluster.ask("GET", "/conserve/v1/cluster")).json()["engines"]
    assert engine["kv_drift_tokens"] == 640
    metrics = (await cluster.ask("GET", "/metrics")).body.decode()
    assert 'conserve_engine_kv_drift_tokens{engine="d0",tier="decode"} 640.0' in metrics


async def test_a_parked_conversation_that_is_forgotten_leaves_its_engine(
    make_cluster: Any, fake_engine: Any
) -> None:
    decoder = fake_engine(kv_capacity_tokens=1200, store_role="decode")
    cluster = await make_cluster(
        0, [decoder], tiers={"host_capacity_tokens": 5000}, gateway={"max_conversations": 2}
    )
    await cluster.chat("idle", "x" * 3000, max_tokens=1)
    await cluster.chat("busy", "y" * 3000, max_tokens=1)  # parks the idle one
    await decoder.until("/close_session")
    name = decoder.bodies("/close_session")[0]["session_id"]
    assert (await cluster.chat("third", "hi", max_tokens=1)).status == 200  # one too many
    freed = {"session_id": f"{name}!free"}
    await cluster.until(lambda: freed in decoder.bodies("/close_session"))
    cluster.settled()
