"""The gateway over emulated engines, in one process: the protocol as the product runs it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from conserve_serving.engines.emulated.config import EngineConfig, Role
from conserve_serving.engines.emulated.server import EmulatedEngine

SPEED = 20.0


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
                        speed=SPEED,
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


async def test_conversations_cross_the_link_once_and_stay(emulated: Any, long_text: str) -> None:
    for name in ("a", "b", "c"):
        messages: list[dict[str, Any]] = [{"role": "user", "content": f"{name}: {long_text}"}]
        home = None
        for number in range(1, 5):
            asked = {"model": "qwen", "messages": messages, "max_tokens": 24, "ignore_eos": True}
            answer = await emulated.ask(
                "POST",
                "/v1/chat/completions",
                asked,
                {"x-conserve-conversation-id": name},
            )
            assert answer.status == 200, answer.body
            home = home or answer.headers["x-conserve-decode-engine"]
            assert answer.headers["x-conserve-decode-engine"] == home
            assert answer.headers["x-conserve-transfers"] == "1"
            assert answer.headers["x-conserve-prefill-engine"] == ("p0" if number == 1 else home)
            reply = answer.json()
            assert reply["usage"]["completion_tokens"] == 24
            messages += [reply["choices"][0]["message"], {"role": "user", "content": "go on"}]
    cluster = (await emulated.ask("GET", "/conserve/v1/cluster")).json()
    counters = cluster["counters"]
    assert cluster["speed"] == SPEED
    assert counters["transfers_by_reason"] == {"first_turn": 3}
    assert counters["placements_by_reason"] == {"first_turn_handoff": 3, "pinned": 9}
    assert counters["shortfall_turns"] == 0
    assert counters["fallbacks_by_reason"] == {}
    for engine in cluster["engines"]:
        assert engine["energy_j"] >= 0
        assert engine["energy_source"].startswith("modelled")
    emulated.settled()


async def test_token_ids_and_streams(emulated: Any) -> None:
    prompt = [number % 5000 + 10 for number in range(700)]
    expected = 0
    for _ in range(3):
        asked = {
            "model": "qwen",
            "prompt": prompt,
            "max_tokens": 16,
            "min_tokens": 16,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer = await emulated.ask(
            "POST", "/v1/completions", asked, {"x-conserve-conversation-id": "t"}
        )
        assert answer.status == 200
        events = [e.removeprefix(b"data: ") for e in answer.body.split(b"\n\n") if e]
        usage = json.loads(events[-2])["usage"]
        assert usage["prompt_tokens"] == len(prompt)
        assert usage["completion_tokens"] == 16
        assert usage["prompt_tokens_details"]["cached_tokens"] >= expected - 64 - 1
        prompt = [*prompt, *range(100, 150)]
        expected = len(prompt) - 50
    emulated.settled()
