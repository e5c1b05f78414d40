"""Clusters and loads for the simulator's tests."""

from __future__ import annotations

import random
from typing import Any

from conserve_serving.core import Scheduler, SchedulerSettings, make_policy
from conserve_serving.core.types import ConversationId, EngineId, Tier
from conserve_serving.engines.model_types import ModelConfig
from conserve_serving.engines.profile import HardwareProfile, load_profile
from conserve_serving.simulator import (
    SimulatedConversation,
    SimulatedEngine,
    SimulatedTurn,
    VirtualCluster,
)

A40 = load_profile("a40-qwen3-0.6b")


def scheduler(policy: str = "conserve", **settings: Any) -> Scheduler:
    made = SchedulerSettings(**settings)
    return Scheduler(made, make_policy(policy, made))


def engines(
    *,
    prefillers: int = 1,
    decoders: int = 2,
    profile: HardwareProfile = A40,
    **config: Any,
) -> list[SimulatedEngine]:
    setup = ModelConfig(store_writes=True, store_read_min_tokens=64, **config)
    tiers = [(f"p{i}", Tier.PREFILL) for i in range(prefillers)]
    tiers += [(f"d{i}", Tier.DECODE) for i in range(decoders)]
    return [
        SimulatedEngine(id=EngineId(name), tier=tier, profile=profile, config=setup)
        for name, tier in tiers
    ]


def conversation(
    name: str, *prompts: tuple[int, int], at_s: float = 0.0, gap_s: float = 1.0, **fields: Any
) -> SimulatedConversation:
    """A conversation of ``(appended, output)`` turns."""
    context, turns = 0, []
    for new, output in prompts:
        turns.append(
            SimulatedTurn(
                prompt_tokens=context + new, new_tokens=new, output_tokens=output, gap_s=gap_s
            )
        )
        context += new + output
    return SimulatedConversation(
        id=ConversationId(name), arrival_s=at_s, turns=tuple(turns), **fields
    )


def conversations(
    count: int, *, rate_per_s: float = 1.0, seed: int = 1
) -> list[SimulatedConversation]:
    """SWE-bench-like: a long first turn, short appends, Poisson arrivals."""
    draw = random.Random(seed)
    at_s = 0.0
    made = []
    for index in range(count):
        at_s += draw.expovariate(rate_per_s)
        turns = [(draw.randint(4_000, 24_000), draw.randint(20, 150))]
        turns += [(draw.randint(40, 400), draw.randint(20, 150)) for _ in range(draw.randint(1, 5))]
        gap_s = draw.uniform(0.1, 2.0)
        made.append(conversation(f"c{index}", *turns, at_s=at_s, gap_s=gap_s))
    return made


def run(
    load: list[SimulatedConversation], policy: str = "conserve", **config: Any
) -> VirtualCluster:
    virtual = VirtualCluster(scheduler(policy), engines(**config))
    virtual.feed(load)
    virtual.run()
    return virtual
