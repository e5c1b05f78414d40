"""Turns take as long in the simulator as through the real gateway with emulated engines.

Conversations whose turns overlap, queue for the prefiller and decode side by side are played in
real time over HTTP, and in virtual time. Latencies are compared as distributions; decisions turn
by turn, as far as timing does not decide them.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from served import decided as journalled
from served import served

from conserve_agents import wire
from conserve_serving.core import Scheduler, make_policy
from conserve_serving.core.decisions import Place
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.types import ConversationId, EngineId, Tier
from conserve_serving.engines.http import HttpPool
from conserve_serving.engines.model_types import ModelConfig
from conserve_serving.engines.profile import load_profile
from conserve_serving.gateway.server import GatewayServer
from conserve_serving.replay.completion import CompletionStream
from conserve_serving.simulator import (
    SimulatedConversation,
    SimulatedEngine,
    SimulatedTurn,
    VirtualCluster,
)

ENGINES = (("p0", Tier.PREFILL), ("d0", Tier.DECODE), ("d1", Tier.DECODE))
PROFILE = "a40-qwen3-0.6b"
CONVERSATIONS = 30
RATE_PER_S = 1.1
#: Model time is wall time: what the gateway itself costs stays small beside a turn.
SPEED = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One turn, in seconds since its arrival."""

    ttft_s: float
    e2e_s: float


def workload() -> list[SimulatedConversation]:
    """Long first turns that queue for the prefiller, appends of some length, Poisson arrivals."""
    draw = random.Random(11)
    made, at_s = [], 1.0
    for index in range(CONVERSATIONS):
        at_s += draw.expovariate(RATE_PER_S)
        context, turns = 0, []
        for number in range(3):
            new = draw.randrange(9_000, 16_000) if number == 0 else draw.randrange(2_000, 5_000)
            output = draw.randrange(15, 60)
            turns.append(
                SimulatedTurn(
                    prompt_tokens=context + new,
                    new_tokens=new,
                    output_tokens=output,
                    gap_s=draw.uniform(0.2, 1.5),
                )
            )
            context += new + output
        made.append(
            SimulatedConversation(
                id=ConversationId(f"c{index}"), arrival_s=at_s, turns=tuple(turns)
            )
        )
    return made


Decisions = dict[tuple[str, int], tuple[Any, ...]]


def decided(place: Place) -> tuple[Any, ...]:
    """What of a placement does not depend on timing: which decoder it is does."""
    return (place.prefiller, place.reason, place.transfer, place.expected_cached_tokens)


def in_virtual_time() -> tuple[list[Seen], Decisions]:
    settings, profile = SchedulerSettings(), load_profile(PROFILE)
    decisions: Decisions = {}

    def observe(_s: float, _event: object, given: list[Any]) -> None:
        for decision in given:
            if isinstance(decision, Place):
                decisions[decision.conversation, decision.turn_index] = decided(decision)

    cluster = VirtualCluster(
        Scheduler(settings, make_policy("conserve", settings)),
        [
            SimulatedEngine(
                id=EngineId(name),
                tier=tier,
                profile=profile,
                config=ModelConfig(store_writes=tier is Tier.PREFILL),
            )
            for name, tier in ENGINES
        ],
        observer=observe,
    )
    cluster.feed(workload())
    cluster.run()
    seen = [
        Seen(ttft_s=r.first_token_s - r.arrived_s, e2e_s=r.finished_s - r.arrived_s)
        for r in cluster.results
        if r.first_token_s is not None and r.finished_s is not None
    ]
    return seen, decisions


async def over_http(folder: Path) -> tuple[list[Seen], Decisions]:
    async with served(
        ENGINES, policy="conserve", profile=PROFILE, speed=SPEED, folder=folder
    ) as server:
        seen = await drive(server)
    decisions: Decisions = {}
    for made in journalled(folder):
        for decision in made:
            if isinstance(decision, Place):
                name = decision.conversation.rpartition("\x1f")[2]  # behind tenant and model
                decisions[name, decision.turn_index] = decided(decision)
    return seen, decisions


async def drive(server: GatewayServer) -> list[Seen]:
    """Play the workload in its own time, every conversation by itself."""
    pool = HttpPool("127.0.0.1", server.port)
    begins = time.perf_counter()
    try:
        played = await asyncio.gather(*(play(pool, one, begins) for one in workload()))
    finally:
        pool.close()
    return [turn for turns in played for turn in turns]


async def play(pool: HttpPool, one: SimulatedConversation, begins: float) -> list[Seen]:
    """Not through the OpenAI SDK, which takes 0.3 s to look at a prompt of 15,000 token ids."""
    number = int(one.id.removeprefix("c"))
    headers = [
        (b"content-type", b"application/json"),
        (wire.CONVERSATION_ID.lower().encode(), one.id.encode()),
    ]
    context: list[int] = []
    seen: list[Seen] = []
    at = begins + one.arrival_s / SPEED
    for index, turn in enumerate(one.turns):
        base = number * 977 + index * 131
        context += [1_000 + (base + i * 13) % 20_000 for i in range(turn.new_tokens)]
        body = {
            "model": "m",
            "prompt": context,
            "max_tokens": turn.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "return_token_ids": True,
        }
        encoded = msgspec.json.encode(body)
        await asyncio.sleep(at - time.perf_counter())  # the workload's own pace
        sent, stream = time.perf_counter(), CompletionStream()
        async with await pool.request("POST", "/v1/completions", headers, encoded) as reply:
            assert reply.status == 200
            async for chunk in reply:
                stream.feed(chunk, time.perf_counter())
        first, over = stream.token_times[0], stream.token_times[-1]
        context += stream.token_ids
        usage = stream.finish()
        assert usage.prompt_tokens == turn.prompt_tokens
        assert len(context) == turn.prompt_tokens + turn.output_tokens
        seen.append(Seen(ttft_s=(first - sent) * SPEED, e2e_s=(over - sent) * SPEED))
        if index + 1 < len(one.turns):
            at = over + one.turns[index + 1].gap_s / SPEED
    path = f"/conserve/v1/conversations/{one.id}"
    async with await pool.request("DELETE", path, [], b"") as reply:
        await reply.read()
    return seen


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@pytest.mark.slow
async def test_turns_take_as_long_as_over_http(tmp_path: Path) -> None:
    over_wire, served_decisions = await over_http(tmp_path)
    simulated, simulated_decisions = in_virtual_time()
    different = {
        turn: (served_decisions.get(turn), simulated)
        for turn, simulated in simulated_decisions.items()
        if served_decisions.get(turn) != simulated
    }
    assert not different
    assert len(over_wire) == len(simulated) == CONVERSATIONS * 3
    differences = {}
    for name in ("ttft_s", "e2e_s"):
        for share in (0.5, 0.95):
            real = quantile([getattr(turn, name) for turn in over_wire], share)
            virtual = quantile([getattr(turn, name) for turn in simulated], share)
            differences[name, share] = (virtual / real - 1.0, real, virtual)
    print(differences)  # noqa: T201 -- shown where the test fails
    assert all(abs(relative) <= 0.10 for relative, _, _ in differences.values()), differences
