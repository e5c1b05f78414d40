"""Gateway and simulator run the same scheduler and come to the same decisions.

One workload goes through the real gateway over HTTP with emulated engines, and through the
virtual cluster. Turns follow each other, so that nothing depends on the wall clock; what is
compared is every decision about where a turn runs, what is moved and what is freed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI
from served import decided, journal_of, served

from conserve_agents import wire
from conserve_serving.core import Scheduler, make_policy
from conserve_serving.core.decisions import Decision, Park, Place, Reject, Release
from conserve_serving.core.journal import from_record
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.types import ConversationId, EngineId, Tier
from conserve_serving.engines.model_types import ModelConfig
from conserve_serving.engines.profile import load_profile
from conserve_serving.simulator import (
    SimulatedConversation,
    SimulatedEngine,
    SimulatedTurn,
    VirtualCluster,
)

ENGINES = (("p0", Tier.PREFILL), ("d0", Tier.DECODE), ("d1", Tier.DECODE), ("d2", Tier.DECODE))
CONVERSATIONS, TURNS = 9, 3
KV_TOKENS, HOST_TOKENS = 16_000, 200_000
SPEED = 40.0
PROFILE = "a40-qwen3-0.6b"


def workload() -> list[list[SimulatedTurn]]:
    """Conversations of unlike sizes: some parked on the way, one too short for a hand-off."""
    draw = random.Random(7)
    made = []
    for index in range(CONVERSATIONS):
        context, turns = 0, []
        for number in range(TURNS):
            first = 40 if index == 4 else draw.randrange(3_000, 9_000)
            new = first if number == 0 else draw.randrange(50, 900)
            output = draw.randrange(8, 40)
            turns.append(
                SimulatedTurn(
                    prompt_tokens=context + new,
                    new_tokens=new,
                    output_tokens=output,
                    gap_s=100.0 * CONVERSATIONS,
                )
            )
            context += new + output
        made.append(turns)
    return made


def summary(decisions: list[Decision], names: dict[str, int]) -> list[tuple[Any, ...]]:
    """What was decided, with conversations numbered in order of appearance."""
    found: list[tuple[Any, ...]] = []
    for decision in decisions:
        if not isinstance(decision, Place | Park | Release | Reject):
            continue
        number = names.setdefault(decision.conversation, len(names))
        if isinstance(decision, Place):
            found.append(
                (
                    "place",
                    number,
                    decision.turn_index,
                    decision.decoder,
                    decision.prefiller,
                    decision.reason,
                    decision.transfer,
                    decision.expected_cached_tokens,
                    decision.priority,
                )
            )
        elif isinstance(decision, Park | Release):
            kind = type(decision).__name__.lower()
            found.append((kind, number, decision.engine, decision.tokens, decision.reason))
        else:
            found.append(("reject", number, decision.reason))
    return found


def in_virtual_time(policy: str) -> list[tuple[Any, ...]]:
    settings = SchedulerSettings()
    profile = load_profile(PROFILE)
    found: list[tuple[Any, ...]] = []
    names: dict[str, int] = {}
    cluster = VirtualCluster(
        Scheduler(settings, make_policy(policy, settings)),
        [
            SimulatedEngine(
                id=EngineId(name),
                tier=tier,
                profile=profile,
                config=ModelConfig(
                    store_writes=tier is Tier.PREFILL,
                    kv_capacity_tokens=KV_TOKENS,
                    host_capacity_tokens=HOST_TOKENS,
                ),
            )
            for name, tier in ENGINES
        ],
        observer=lambda _now_s, _event, decisions: found.extend(summary(decisions, names)),
    )
    for index, turns in enumerate(workload()):
        cluster.add(
            SimulatedConversation(
                id=ConversationId(f"c{index}"), arrival_s=100.0 * index, turns=tuple(turns)
            )
        )
    cluster.run()
    return found


async def over_http(policy: str, folder: Path) -> list[tuple[Any, ...]]:
    async with served(
        ENGINES,
        policy=policy,
        profile=PROFILE,
        speed=SPEED,
        folder=folder,
        kv_tokens=KV_TOKENS,
        host_tokens=HOST_TOKENS,
        gateway_settings="poll_interval_s = 0.05",
    ) as server:
        await drive(server.url)
    found: list[tuple[Any, ...]] = []
    names: dict[str, int] = {}
    for decisions in decided(folder):
        found.extend(summary(decisions, names))
    return found


async def drive(url: str) -> None:
    """Send the workload's turns one after the other, conversation by conversation in rounds."""
    load = workload()
    contexts: list[list[int]] = [[] for _ in load]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for number in range(TURNS):
            for index, turns in enumerate(load):
                turn = turns[number]
                fresh = [1_000 + (index * 977 + i * 13) % 20_000 for i in range(turn.new_tokens)]
                contexts[index] += fresh
                reply = await client.completions.create(
                    model="m",
                    prompt=contexts[index],
                    max_tokens=turn.output_tokens,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                    extra_headers={wire.CONVERSATION_ID: f"c{index}"},
                )
                usage = reply.usage
                assert usage is not None
                counted = (usage.prompt_tokens, usage.completion_tokens)
                assert counted == (turn.prompt_tokens, turn.output_tokens)
                contexts[index] += reply.choices[0].model_extra["token_ids"]  # type: ignore[index] # SGLang's field
                if number == TURNS - 1:
                    path = f"{url}/conserve/v1/conversations/c{index}"
                    await client.delete(path, cast_to=object)


@pytest.mark.parametrize(
    "policy",
    ["conserve", "collocated", "round_robin", "full_disaggregation"],
)
async def test_gateway_and_simulator_decide_alike(policy: str, tmp_path: Path) -> None:
    over_wire = await over_http(policy, tmp_path)
    simulated = in_virtual_time(policy)
    assert over_wire == simulated
    places = [entry for entry in over_wire if entry[0] == "place"]
    assert len(places) == CONVERSATIONS * TURNS
    if policy == "conserve":
        assert {entry[0] for entry in over_wire} == {"place", "park", "release"}
        assert len({entry[3] for entry in places}) == 3
    replay(journal_of(tmp_path), policy)


def replay(journal: Path, policy: str) -> None:
    """The gateway's own journal, handed to a fresh scheduler, gives the same decisions."""
    scheduler: Scheduler | None = None
    settings = SchedulerSettings()
    lines = journal.read_text().splitlines()
    assert len(lines) > CONVERSATIONS * TURNS * 2
    for line in lines:
        now_s, event, decisions = from_record(json.loads(line))
        scheduler = scheduler or Scheduler(settings, make_policy(policy, settings))
        assert scheduler.handle(event, now_s=now_s) == decisions
