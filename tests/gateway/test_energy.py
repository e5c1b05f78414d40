"""Joules of turns and conversations, as the gateway tells them."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from conserve_serving.engines.emulated.config import EngineConfig, Role
from conserve_serving.engines.emulated.server import EmulatedEngine

SOURCE = "modelled: a40-qwen3-0.6b (assumed)"


@pytest.fixture
async def emulated(make_cluster: Any, tmp_path: Path) -> AsyncIterator[Any]:
    """A gateway with one prefiller and two decoders, emulated."""
    cluster = await make_cluster(0, 0)
    ack = f"http://127.0.0.1:{cluster.server.port}/conserve/v1/handoffs"
    async with contextlib.AsyncExitStack() as stack:
        for id, role in (("p0", "prefill"), ("d0", "decode"), ("d1", "decode")):
            engine = await stack.enter_async_context(
                EmulatedEngine(
                    EngineConfig(
                        model_name="qwen",
                        engine_id=id,
                        speed=5.0,
                        role=Role(role),
                        store_dir=tmp_path,
                        ack_url=ack,
                    )
                )
            )
            new = {"id": id, "url": engine.url, "tier": role}
            assert (await cluster.ask("POST", "/conserve/v1/engines", new)).status == 201
        for id in ("p0", "d0", "d1"):
            await cluster.state(id, "ready")
        yield cluster
        for id in ("p0", "d0", "d1"):
            await cluster.ask("DELETE", f"/conserve/v1/engines/{id}")


async def conversation(cluster: Any, name: str, text: str, *, stream: bool) -> None:
    """Three turns."""
    messages = [{"role": "user", "content": f"{name}: {text}"}]
    for _ in range(3):
        asked = {
            "model": "qwen",
            "messages": messages,
            "max_tokens": 40,
            "ignore_eos": True,
            "stream": stream,
        }
        headers = {"x-conserve-conversation-id": name}
        answer = await cluster.ask("POST", "/v1/chat/completions", asked, headers)
        assert answer.status == 200, answer.body
        messages = [
            *messages,
            {"role": "assistant", "content": "so"},
            {"role": "user", "content": "?"},
        ]


async def settled(cluster: Any, *names: str) -> dict[str, dict[str, Any]]:
    """The conversations, once every engine has reported after their last turns."""
    async with asyncio.timeout(20):
        while True:
            await cluster.gateway.fleet.refresh()
            found = {
                name: (await cluster.ask("GET", f"/conserve/v1/conversations/{name}")).json()
                for name in names
            }
            if all(one["energy"]["settled"] for one in found.values()):
                return found


async def test_every_joule_of_the_engines_is_a_conversations_or_idle_or_nobodys(
    emulated: Any, long_text: str
) -> None:
    names = ["a", "b", "c", "d"]
    await asyncio.gather(
        *(conversation(emulated, name, long_text, stream=name in "ab") for name in names)
    )
    found = await settled(emulated, *names)
    emulated.gateway.energy.check_invariants()
    engines = (await emulated.ask("GET", "/conserve/v1/cluster")).json()["engines"]
    booked = [engine["energy"] for engine in engines]
    active_j = math.fsum(part["prefill_j"] + part["decode_j"] for part in booked)
    idle_j = math.fsum(part["idle_j"] for part in booked)
    nobodys_j = math.fsum(part["unattributed_j"] + part["pending_j"] for part in booked)
    total_j = math.fsum(part["total_j"] for part in booked)
    charged_j = math.fsum(one["energy"]["total_j"] for one in found.values())
    assert charged_j == pytest.approx(active_j)
    assert charged_j + idle_j + nobodys_j == pytest.approx(total_j)
    # Most of what is not idle has an owner: what has none fell between two readings.
    assert charged_j > 0.7 * (total_j - idle_j)
    for one in found.values():
        energy = one["energy"]
        assert energy["source"] == SOURCE and energy["unknown_engines"] == []
        assert energy["prefill_j"] > 0 and energy["decode_j"] > 0
        turns = [turn["energy"] for turn in one["recent_turns"]]
        assert len(turns) == 3
        assert math.fsum(t["total_j"] for t in turns) == pytest.approx(energy["total_j"])
    for engine in engines:
        assert engine["energy_source"] == SOURCE
        assert engine["energy_j"] >= engine["energy"]["total_j"] - 1e-6
        assert engine["energy"]["idle_w"] == 75.0


async def test_joules_are_exported_by_engine_tier_kind_and_source(
    emulated: Any, long_text: str
) -> None:
    await conversation(emulated, "a", long_text, stream=True)
    await settled(emulated, "a")
    text = (await emulated.ask("GET", "/metrics")).body.decode()
    rows = [row for row in text.splitlines() if row.startswith("conserve_energy_joules_total{")]
    kinds = {
        (engine, tier, kind)
        for engine, tier in (("p0", "prefill"), ("d0", "decode"), ("d1", "decode"))
        for kind in ("idle", "prefill", "decode")
        if f'engine="{engine}",kind="{kind}",source="{SOURCE}",tier="{tier}"' in "\n".join(rows)
    }
    assert {("p0", "prefill", "prefill"), ("p0", "prefill", "idle")} <= kinds
    assert any(kind == "decode" and tier == "decode" for _, tier, kind in kinds)


async def test_engines_without_gpu_and_profile_have_no_joules(make_cluster: Any) -> None:
    cluster = await make_cluster(0, 1)
    assert (await cluster.chat("a", "hello")).status == 200
    one = (await cluster.ask("GET", "/conserve/v1/conversations/a")).json()
    nothing = {"total_j": None, "prefill_j": None, "decode_j": None, "source": None}
    missing = {**nothing, "settled": True, "unknown_engines": ["d0"]}
    assert one["energy"] == missing
    assert one["recent_turns"][0]["energy"] == missing
    (engine,) = (await cluster.ask("GET", "/conserve/v1/cluster")).json()["engines"]
    assert (engine["energy_j"], engine["energy"]) == (None, None)
    assert engine["energy_note"] == "no GPU and no profile is known of it"


async def test_an_engine_added_at_run_time_may_name_its_gpus(
    make_cluster: Any, fake_engine: Any
) -> None:
    cluster = await make_cluster(0, 1)
    engine = await fake_engine().start()
    try:
        new = {"id": "d9", "url": engine.url, "tier": "decode", "gpus": ["0", "GPU-x"]}
        assert (await cluster.ask("POST", "/conserve/v1/engines", new)).status == 201
        assert cluster.gateway.fleet.get("d9").gpus == ("0", "GPU-x")
        refused = await cluster.ask("POST", "/conserve/v1/engines", {**new, "gpus": [0]})
        assert refused.status == 400 and "gpus" in refused.body.decode()
        assert (await cluster.ask("DELETE", "/conserve/v1/engines/d9")).status == 200
    finally:
        await engine.kill()


async def test_a_profile_models_the_joules_of_attached_engines(make_cluster: Any) -> None:
    cluster = await make_cluster(0, 1, tiers={"profile": "h100-qwen3-8b"})
    assert (await cluster.chat("a", "hello", stream=True)).status == 200
    one = (await settled(cluster, "a"))["a"]
    assert one["energy"]["total_j"] == 0.0  # this engine's counters do not move
    (engine,) = (await cluster.ask("GET", "/conserve/v1/cluster")).json()["engines"]
    assert engine["energy_source"] == "modelled: h100-qwen3-8b (measured)"
    assert engine["energy"]["idle_j"] > 0
