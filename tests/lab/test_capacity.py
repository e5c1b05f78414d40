"""Capacity by arithmetic: against sums done by hand, and against simulated saturation."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_serving.core.policies import make_policy
from conserve_serving.core.scheduler import Scheduler
from conserve_serving.core.types import ConversationId, EngineId, Tier
from conserve_serving.engines.mixed import MixedTable
from conserve_serving.engines.model_types import ModelConfig
from conserve_serving.engines.profile import (
    DecodeKnee,
    HandoffAffine,
    HardwareProfile,
    PrefillScan,
    load_profile,
)
from conserve_serving.lab.advantage import advantage
from conserve_serving.lab.capacity import capacity
from conserve_serving.lab.clusters import cluster
from conserve_serving.lab.contenders import CONTENDERS
from conserve_serving.lab.demand import Demand
from conserve_serving.lab.errors import LabError
from conserve_serving.simulator import (
    SimulatedConversation,
    SimulatedEngine,
    SimulatedTurn,
    TurnResult,
    VirtualCluster,
)

#: 100 µs per prompt token, 1 ms at least per step; 10 ms per decode step of any batch; hand-off in
#: 10 ms + 1 µs per token. Ten conversations of 1,250 tokens fill the KV.
SIMPLE = load_profile("a40-qwen3-0.6b").replace(
    kv_capacity_tokens=12_500,
    kv_bytes_per_token=1_000,
    chunk_tokens=1_000,
    prefill=PrefillScan(
        floor_ms=1.0,
        knee_tokens=10**6,
        offset_ms=1.0,
        us_per_prefix_token=0.0,
        us_per_new_token=100.0,
    ),
    decode=DecodeKnee(
        floor_batch=(1, 1_000),
        floor_ms=(10.0, 10.0),
        line_ms=1.0,
        line_us_per_request=0.0,
        line_us_per_kv_token=1e-6,
    ),
    handoff=HandoffAffine(setup_ms=10.0, bytes_per_s=1e9, via_store=False),
)


def _conversation(*turns: tuple[int, int, int], **more: Any) -> SimulatedConversation:
    return SimulatedConversation(
        id=ConversationId("c"),
        arrival_s=0.0,
        turns=tuple(
            SimulatedTurn(prompt_tokens=prompt, new_tokens=new, output_tokens=output)
            for prompt, new, output in turns
        ),
        **more,
    )


#: First prompt 1,000; 101 tokens of answer; then 5 and 43 more. Held while decoding: 1,101 tokens
#: in 100 steps, 1,149 in 42.
CONVERSATION = _conversation((1_000, 1_000, 101), (1_106, 5, 43))
DEMAND = Demand.of([CONVERSATION])


def _engines(
    prefill: int, decode: int, profile: HardwareProfile = SIMPLE, **config: Any
) -> list[SimulatedEngine]:
    tiers = [Tier.PREFILL] * prefill + [Tier.DECODE] * decode
    return [
        SimulatedEngine(
            id=EngineId(f"e{index}"),
            tier=tier,
            profile=profile,
            config=ModelConfig(store_writes=True, token_events=False, **config),
        )
        for index, tier in enumerate(tiers)
    ]


def test_the_demand_of_one_conversation() -> None:
    assert (DEMAND.first_tokens, DEMAND.tail_turns, DEMAND.tail_tokens) == (1_000, 1, 5)
    assert DEMAND.first_pairs == 1_000 * 500
    assert (DEMAND.output_tokens, DEMAND.decode_tokens) == (144, 142)
    held = (100 * 1_101 + 42 * 1_149) / 142
    assert DEMAND.context_held_tokens == pytest.approx(held)
    read = (100 * (1_000 + 50.5) + 42 * (1_106 + 21.5)) / 142
    assert DEMAND.context_read_tokens == pytest.approx(read)


def test_demands_are_means_over_conversations() -> None:
    other = _conversation((3_000, 3_000, 1))
    both = Demand.of([CONVERSATION, other])
    assert (both.conversations, both.first_tokens, both.tail_turns) == (2, 2_000, 0.5)
    assert both.decode_tokens == 71
    assert both.context_held_tokens == DEMAND.context_held_tokens  # its one token needs no step


def test_a_shared_prefix_is_cached_and_a_prompt_without_news_computes_one_token() -> None:
    shared = _conversation((1_000, 1_000, 10), (1_010, 0, 10), shared_prefix=("tools", 600))
    found = Demand.of([shared])
    assert found.first_prompts == ((400, 600),)
    assert found.first_pairs == 400 * (600 + 200)
    assert found.tail_prompts == ((1, 1_009),)
    with pytest.raises(LabError, match="no conversation"):
        Demand.of([])


def test_dedicated_tiers_by_hand() -> None:
    found = capacity(_engines(1, 2), DEMAND)
    # one full chunk of 1,000 tokens: 100 ms
    assert found.prefill_per_s == pytest.approx(1 / 0.100)
    # 12,500 // 1,115 = 11 decode together; the tail is a step of 1 ms; no interference
    each = found.engines[1]
    assert (each.batch, each.step_s) == (11, 0.010)
    assert each.tail_s == pytest.approx(0.001)
    assert each.decode_s == pytest.approx(142 / 11 * 0.010)
    assert found.decode_per_s == pytest.approx(2 / (0.001 + 142 / 11 * 0.010))
    # 10 ms + 1 MB at 1 GB/s out; device to device, nothing in
    assert found.link_per_s == pytest.approx(1 / 0.011)
    assert (found.dedicated_per_s, found.bottleneck) == (found.prefill_per_s, "prefill")
    assert found.link_busy == pytest.approx(0.11)
    hosting_s = 0.100 + 0.001 + 142 / 11 * 0.010
    assert found.hosting_per_s == pytest.approx(3 / hosting_s)
    # what the prefiller cannot take, decoders do in the time that is left to them
    left = 1 - found.prefill_per_s / found.decode_per_s
    assert found.valve_per_s == pytest.approx(10 + left * 2 / hosting_s)


def test_interference_by_hand() -> None:
    found = capacity(_engines(1, 1, SIMPLE.replace(mixed_slowdown=1.5)), DEMAND)
    decode_steps = 142 / 11
    # the tail's one step shares its time with one decode step
    assert found.decode_per_s == pytest.approx(
        1 / (0.001 + decode_steps * 0.010 + 0.5 * (0.001 + 0.010))
    )
    # hosting: 1 step of 100 ms and 1 of 1 ms, each with a decode step beside it
    assert found.hosting_per_s == pytest.approx(
        2 / (0.101 + decode_steps * 0.010 + 0.5 * (0.101 + 0.020))
    )


def test_no_more_steps_are_mixed_than_there_are_decode_steps() -> None:
    few = Demand.of([_conversation((1_000, 1_000, 2), (1_010, 8, 2), (1_020, 8, 2))])
    found = capacity(_engines(0, 1, SIMPLE.replace(mixed_slowdown=2.0)), few)
    steps = 3 / 12  # three tokens, batches of 12: a quarter of a decode step, three of prefill
    alone_s = 0.102 + steps * 0.010
    assert found.hosting_per_s == pytest.approx(1 / (alone_s + steps / 3 * 0.102 + steps * 0.010))


def test_a_measured_table_of_interference_counts_by_its_cells() -> None:
    table = MixedTable(
        chunk_tokens=(5, 1_000), batch=(11,), ctx_tokens=(1,), slowdown=(((1.0,),), ((1.4,),))
    )
    found = capacity(_engines(1, 1, SIMPLE.replace(mixed=table)), DEMAND)
    assert found.decode_per_s == pytest.approx(1 / (0.001 + 142 / 11 * 0.010))
    assert found.hosting_per_s == pytest.approx(
        2 / (0.101 + 142 / 11 * 0.010 + 0.4 * (0.100 + 0.010))
    )


def test_a_slow_link_is_the_bottleneck() -> None:
    slow = SIMPLE.replace(handoff=HandoffAffine(setup_ms=0.0, bytes_per_s=1e6, via_store=True))
    found = capacity(_engines(1, 3, slow), DEMAND)
    assert (found.bottleneck, found.dedicated_per_s) == ("link", pytest.approx(1.0))
    assert found.link_busy == 1.0
    assert not found.dedicate
    into = SIMPLE.replace(
        handoff=HandoffAffine(setup_ms=0.0, bytes_per_s=1e9), host_link_bytes_per_s=1e5
    )
    assert capacity(_engines(1, 3, into), DEMAND).link_per_s == pytest.approx(3 / 10)


def test_an_engine_that_only_hosts() -> None:
    found = capacity(_engines(0, 4), DEMAND)
    assert found.prefill_per_s == found.dedicated_per_s == found.link_busy == 0.0
    assert found.hosting_per_s == found.valve_per_s
    assert not found.dedicate


def test_a_latency_limit_shrinks_the_batch() -> None:
    engines = cluster("4h100").engines()
    free = capacity(engines, DEMAND).engines[1]
    limit_s = 0.9 * free.step_s
    limited = capacity(engines, DEMAND, step_limit_s=limit_s).engines[1]
    assert 1 < limited.batch < free.batch
    assert limited.step_s <= limit_s
    assert limited.decode_s > free.decode_s
    assert capacity(engines, DEMAND, step_limit_s=1e-6).engines[1].batch == 1


def test_the_engines_own_limits_count() -> None:
    assert capacity(_engines(0, 1, max_running_requests=4), DEMAND).engines[0].batch == 4
    assert capacity(_engines(0, 1, kv_capacity_tokens=2_300), DEMAND).engines[0].batch == 2
    half = capacity(_engines(1, 1, chunk_tokens=500), DEMAND)
    assert half.prefill_per_s == pytest.approx(10.0)  # twice as many steps of half the time
    with pytest.raises(LabError, match=r"e0 \(a40-qwen3-0.6b\) holds 1,000 KV tokens"):
        capacity(_engines(0, 1, kv_capacity_tokens=1_000), DEMAND)
    with pytest.raises(LabError, match="at least one engine"):
        capacity([], DEMAND)


def test_the_rule_dedicates_where_it_should() -> None:
    demand = Demand.of(_swebench(300, seed=3))
    by_name = {
        name: capacity(cluster(name).engines(mixed_slowdown=1.25), demand)
        for name in ("4h100", "h100-3a100", "h100-3a100-kv80", "h100-3l40s", "h100-3a40")
    }
    assert [name for name, found in by_name.items() if found.dedicate] == ["h100-3a100-kv80"]
    assert by_name["4h100"].equal_tiers
    assert not by_name["h100-3a100"].equal_tiers
    slow = capacity(cluster("h100-3a100-kv80").engines(link="tcp_25g"), demand)
    assert slow.bottleneck == "link"
    assert not slow.dedicate


@pytest.mark.parametrize(
    ("name", "slowdowns"),
    [
        ("a100-qwen3-8b", (2.8, 1.8, 3.5)),
        ("a100-kv80-qwen3-8b", (2.8, 1.8, 1.9)),
        ("l40s-qwen3-8b", (3.6, 3.4, 4.3)),
        ("a40-qwen3-8b", (5.4, 4.2, 5.3)),
        ("h100-qwen3-8b", (1.0, 1.0, 1.0)),
    ],
)
def test_advantages_of_an_h100(name: str, slowdowns: tuple[float, float, float]) -> None:
    found = advantage(load_profile(name), load_profile("h100-qwen3-8b"))
    assert (found.prefill, found.decode_alone, found.kv_read) == pytest.approx(slowdowns, rel=0.06)
    assert found.favours_prefill == (name == "a100-kv80-qwen3-8b")


_TURN = st.tuples(st.integers(1, 4_000), st.integers(1, 600))
_CONVERSATIONS = st.lists(st.lists(_TURN, min_size=1, max_size=4), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(turns=_CONVERSATIONS, slowdown=st.floats(1.0, 3.0), count=st.integers(1, 4))
def test_what_any_demand_must_obey(
    turns: list[list[tuple[int, int]]], slowdown: float, count: int
) -> None:
    sample = []
    for of in turns:
        context, rows = 0, []
        for new, output in of:
            rows.append((context + new, new, output))
            context += new + output
        sample.append(_conversation(*rows))
    demand = Demand.of(sample)
    roomy = SIMPLE.replace(kv_capacity_tokens=100_000)
    one = capacity(_engines(1, 1, roomy), demand)
    many = capacity(_engines(count, count, roomy), demand)
    slowed = capacity(_engines(1, 1, roomy.replace(mixed_slowdown=slowdown)), demand)
    for figure in ("prefill_per_s", "decode_per_s", "link_per_s", "hosting_per_s", "valve_per_s"):
        assert getattr(many, figure) == pytest.approx(count * getattr(one, figure))
        assert getattr(slowed, figure) <= getattr(one, figure) * (1 + 1e-9)
    assert slowed.prefill_per_s == one.prefill_per_s  # nothing decodes there
    assert one.dedicated_per_s <= one.valve_per_s * (1 + 1e-9)
    assert one.dedicated_per_s == min(one.prefill_per_s, one.decode_per_s, one.link_per_s)
    both = [engine.hosting_s for engine in slowed.engines]
    parts = slowed.engines[0]
    assert both[0] == both[1] <= slowdown * (parts.first_s + parts.tail_s + parts.decode_s) * 1.001


# --- against the simulator ------------------------------------------------------------------------


def _swebench(count: int, *, seed: int) -> Iterator[SimulatedConversation]:
    """Long first prompts, small appends, answers with a long tail; all there at once."""
    draw = random.Random(seed)
    for number in range(count):
        turns: list[SimulatedTurn] = []
        context = 0
        for index in range(5):
            new = int(draw.lognormvariate(9.6, 0.3)) if index == 0 else 67
            output = int(min(draw.lognormvariate(4.4, 1.1), 3_500)) + 2
            context += new
            turns.append(SimulatedTurn(prompt_tokens=context, new_tokens=new, output_tokens=output))
            context += output
        yield SimulatedConversation(
            id=ConversationId(f"c{number}"), arrival_s=number / 100, turns=tuple(turns)
        )


@pytest.mark.parametrize(
    ("name", "contender", "mixed_slowdown", "figure"),
    [
        ("4h100", "collocated", 1.0, "hosting_per_s"),
        ("4h100", "collocated", 1.5, "hosting_per_s"),
        ("h100-3l40s", "collocated_speed", 1.0, "hosting_per_s"),
        ("h100-3a100", "conserve", 1.0, "dedicated_per_s"),
        ("4a100", "conserve", 1.25, "dedicated_per_s"),
    ],
)
def test_saturation_in_the_simulator(
    name: str, contender: str, mixed_slowdown: float, figure: str
) -> None:
    """Within 10 %: the middle half of 300 conversations that are all there, by when they end."""
    engines = cluster(name).engines(mixed_slowdown=mixed_slowdown)
    chosen = CONTENDERS[contender]
    tuned = chosen.scheduler_settings()
    ends: list[float] = []

    def closed(turn: TurnResult) -> None:
        if turn.index == 5:
            assert turn.finished_s is not None
            ends.append(turn.finished_s)

    virtual = VirtualCluster(
        Scheduler(tuned, make_policy(chosen.policy, tuned)), engines, on_turn=closed
    )
    virtual.feed(_swebench(300, seed=11))
    virtual.run()
    ends.sort()
    assert len(ends) == 300
    simulated = 150 / (ends[225] - ends[75])
    expected = getattr(capacity(engines, Demand.of(_swebench(300, seed=11))), figure)
    assert math.isclose(simulated, expected, rel_tol=0.1), (simulated, expected)
