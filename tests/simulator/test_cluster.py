"""Whole conversations through core and engine model in virtual time."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from conserve_serving.core import Scheduler, SchedulerSettings, make_policy
from conserve_serving.core.types import (
    ConversationId,
    EngineId,
    Outcome,
    Reason,
    Tier,
    TransferReason,
)
from conserve_serving.engines.model_types import ModelConfig
from conserve_serving.engines.profile import load_profile
from conserve_serving.simulator import (
    SimulatedConversation,
    SimulatedEngine,
    SimulatedTurn,
    VirtualCluster,
)


def cluster(
    policy: str = "conserve",
    *,
    decoders: int = 2,
    kv_tokens: int | None = None,
    host_tokens: int | None = None,
    **settings: float,
) -> VirtualCluster:
    profile = load_profile("a40-qwen3-0.6b")
    config = ModelConfig(kv_capacity_tokens=kv_tokens, host_capacity_tokens=host_tokens)
    engines = [
        SimulatedEngine(
            id=EngineId("p0"),
            tier=Tier.PREFILL,
            profile=profile,
            config=ModelConfig(store_writes=True),
        )
    ]
    engines += [
        SimulatedEngine(id=EngineId(f"d{i}"), tier=Tier.DECODE, profile=profile, config=config)
        for i in range(decoders)
    ]
    scheduler_settings = SchedulerSettings(**settings)  # type: ignore[arg-type] # by keyword
    return VirtualCluster(
        Scheduler(scheduler_settings, make_policy(policy, scheduler_settings)), engines
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
        context, turns = 0, []
        for turn in range(draw.randint(2, 6)):
            new = draw.randint(4_000, 24_000) if turn == 0 else draw.randint(40, 400)
            output = draw.randint(20, 150)
            turns.append(
                SimulatedTurn(
                    prompt_tokens=context + new,
                    new_tokens=new,
                    output_tokens=output,
                    gap_s=0.0 if turn == 0 else draw.uniform(0.1, 2.0),
                )
            )
            context += new + output
        made.append(
            SimulatedConversation(
                id=ConversationId(f"c{index}"), arrival_s=at_s, turns=tuple(turns)
            )
        )
    return made


def run(virtual: VirtualCluster, load: list[SimulatedConversation]) -> None:
    for conversation in load:
        virtual.add(conversation)
    virtual.run()
    virtual.scheduler.check_invariants(recount=True)


def test_every_conversation_moves_once_and_stays() -> None:
    virtual = cluster()
    load = conversations(60)
    run(virtual, load)
    assert {r.outcome for r in virtual.results} == {Outcome.FINISHED}
    assert len(virtual.results) == sum(len(c.turns) for c in load)
    assert virtual.scheduler.counters.transfers == {TransferReason.FIRST_TURN: 60}
    assert virtual.scheduler.counters.shortfall_turns == 0
    homes: dict[str, set[str | None]] = {}
    for result in virtual.results:
        homes.setdefault(result.conversation, set()).add(result.decoder)
        assert (result.prefiller == "p0") == (result.index == 1)
    assert all(len(decoders) == 1 for decoders in homes.values())
    assert {d for decoders in homes.values() for d in decoders} == {"d0", "d1"}


def test_the_same_load_gives_the_same_run() -> None:
    runs = []
    for _ in range(2):
        virtual = cluster()
        run(virtual, conversations(25))
        runs.append((virtual.results, virtual.now_s, virtual.joules()))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("policy", ["conserve", "collocated", "round_robin"])
def test_every_policy_ends_every_turn(policy: str) -> None:
    virtual = cluster(policy)
    run(virtual, conversations(30))
    assert {r.outcome for r in virtual.results} == {Outcome.FINISHED}
    moved = virtual.scheduler.counters.transfers
    assert (moved == {}) == (policy != "conserve")


def test_short_of_room_it_parks_and_brings_back() -> None:
    virtual = cluster(decoders=1, kv_tokens=64_000, host_tokens=600_000)
    run(virtual, conversations(30, rate_per_s=0.6))
    counters = virtual.scheduler.counters
    assert {r.outcome for r in virtual.results} == {Outcome.FINISHED}
    assert counters.parks > 0
    assert counters.transfers == {TransferReason.FIRST_TURN: 30}
    # What was parked came back from the host: nothing was computed twice.
    assert counters.shortfall_turns == 0


def test_a_lost_decoder_loses_no_conversation() -> None:
    virtual = cluster(decoders=3)
    load = conversations(40)
    virtual.lose_engine(EngineId("d1"), at_s=20.0)
    run(virtual, load)
    assert {r.outcome for r in virtual.results} == {Outcome.FINISHED}
    assert len(virtual.results) == sum(len(c.turns) for c in load)
    counters = virtual.scheduler.counters
    assert counters.moves[TransferReason.ENGINE_LOST] > 0
    assert counters.transfers[TransferReason.FIRST_TURN] == 40
    by_reason = Counter(r.reason for r in virtual.results)
    assert by_reason[Reason.REPLACED_ENGINE_LOST] == counters.moves[TransferReason.ENGINE_LOST]


def test_a_lost_prefiller_leaves_the_decoders_to_prefill() -> None:
    virtual = cluster()
    virtual.lose_engine(EngineId("p0"), at_s=10.0)
    load = conversations(30)
    run(virtual, load)
    assert {r.outcome for r in virtual.results} == {Outcome.FINISHED}
    late = [r for r in virtual.results if r.index == 1 and r.arrived_s > 10.0]
    assert {r.reason for r in late} == {Reason.FIRST_TURN_NO_PREFILLER}


def test_an_idle_cluster_gives_the_physical_limit() -> None:
    """One conversation alone: turn 1 takes its prefill, the hand-off, and then its decode steps."""
    profile = load_profile("a40-qwen3-0.6b")
    virtual = cluster()
    turn = SimulatedTurn(prompt_tokens=16_000, new_tokens=16_000, output_tokens=50)
    run(
        virtual,
        [SimulatedConversation(id=ConversationId("c"), arrival_s=0.0, turns=(turn,))],
    )
    (result,) = virtual.results
    assert result.first_token_s is not None
    assert result.finished_s is not None
    prefill_s = 16_000 / profile.speeds().prefill_tokens_per_s
    assert result.first_token_s == pytest.approx(prefill_s + profile.handoff_s(16_000), rel=0.15)
    assert result.finished_s - result.first_token_s == pytest.approx(
        49 * profile.speeds().decode_step_s, rel=0.25
    )
    assert result.cached_tokens >= 16_000 - 64 - 1
