"""The driver: what is fed, told, refused, copied, shared and lost; deadlocks are no results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from virtual_load import A40, conversation, conversations, engines, run, scheduler

from conserve_serving.core import Scheduler
from conserve_serving.core.decisions import Decision, Place, WakeAt
from conserve_serving.core.events import Event, HandoffFinished, PrefillFinished, TurnArrived
from conserve_serving.core.types import ConversationId, EngineId, Outcome, Reason, TransferReason
from conserve_serving.engines.model_types import ModelConfig
from conserve_serving.engines.profile import load_profile
from conserve_serving.simulator import (
    DeadlockError,
    SimulatedConversation,
    SimulatedTurn,
    SimulationError,
    TurnResult,
    VirtualCluster,
)


# --- feeding ---------------------------------------------------------------------------------
def test_conversations_are_taken_as_they_arrive_and_forgotten() -> None:
    load = conversations(40)
    turns = sum(len(c.turns) for c in load)
    taken = 0
    most = 0

    def stream() -> Iterator[SimulatedConversation]:
        nonlocal taken
        for made in load:
            taken += 1
            assert made.arrival_s >= virtual.now_s
            yield made

    told: list[tuple[str, int]] = []

    def on_turn(result: TurnResult) -> None:
        nonlocal most
        told.append((result.conversation, result.index))
        most = max(most, taken - len({c for c, _ in told}))

    virtual = VirtualCluster(scheduler(), engines(), on_turn=on_turn)
    virtual.feed(stream())
    assert taken == 1
    summary = virtual.run()
    assert summary.turns == turns == len(told) == len(set(told))
    assert virtual.results == []
    assert most < 20  # never far ahead of what has begun


def test_several_streams_and_single_conversations_run_together() -> None:
    virtual = VirtualCluster(scheduler(), engines())
    virtual.feed([conversation("a", (5_000, 20), at_s=1.0)])
    virtual.feed([conversation("b", (5_000, 20), at_s=0.5), conversation("c", (900, 9), at_s=2.0)])
    virtual.add(conversation("d", (100, 5), at_s=0.1))
    assert virtual.run().conversations == 4
    assert [r.conversation for r in virtual.results] == ["d", "b", "a", "c"]


def test_out_of_order_is_refused() -> None:
    virtual = VirtualCluster(scheduler(), engines())
    virtual.feed([conversation("a", (500, 5), at_s=9.0), conversation("b", (500, 5), at_s=8.0)])
    with pytest.raises(SimulationError, match=r"conversation b arrives at 8.0 s.*in order"):
        virtual.run()


def test_progress_is_told_every_thousand_turns() -> None:
    told: list[int] = []
    virtual = VirtualCluster(scheduler("collocated"), engines(), on_progress=told.append)
    virtual.feed(conversation(f"c{i}", (70, 1), at_s=i * 0.1) for i in range(2_100))
    virtual.run()
    assert told == [1_000, 2_000]


# --- what makes no sense ---------------------------------------------------------------------
def bad(**changes: Any) -> SimulatedConversation:
    turn = SimulatedTurn(prompt_tokens=100, new_tokens=100, output_tokens=10)
    turns = (dataclasses.replace(turn, **changes),)
    return SimulatedConversation(id=ConversationId("x"), arrival_s=0.0, turns=turns)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (bad(output_tokens=0), "turn 1: a prompt of 100 tokens, 100 of them new, and an output of"),
        (bad(new_tokens=101), "and no more new than all"),
        (bad(new_tokens=-1), "give 1 token or more of each"),
        (dataclasses.replace(bad(), turns=()), "turns is empty"),
        (dataclasses.replace(bad(), shared_prefix=("s", 101)), "shared_prefix has 101 tokens"),
    ],
)
def test_impossible_conversations(wrong: SimulatedConversation, text: str) -> None:
    virtual = VirtualCluster(scheduler(), engines())
    virtual.add(wrong)
    with pytest.raises(SimulationError, match=text):
        virtual.run()


def test_impossible_clusters() -> None:
    d0, d1 = engines(prefillers=0)
    with pytest.raises(SimulationError, match="two engines are called d0"):
        VirtualCluster(scheduler(), [d0, d0])
    small = dataclasses.replace(d1, config=ModelConfig(page_tokens=16))
    with pytest.raises(SimulationError, match=r"pages of \[16, 64\] tokens"):
        VirtualCluster(scheduler(), [d0, small])
    broken = dataclasses.replace(d1, config=ModelConfig(max_running_requests=0))
    with pytest.raises(SimulationError, match="engine d1: max_running_requests"):
        VirtualCluster(scheduler(), [d0, broken])


def test_a_prefiller_that_cannot_hand_over_is_named() -> None:
    p0, d0 = engines(decoders=1)
    virtual = VirtualCluster(scheduler(), [dataclasses.replace(p0, config=ModelConfig()), d0])
    virtual.add(conversation("a", (9_000, 5)))
    with pytest.raises(SimulationError, match=r"engine p0 .* set store_writes"):
        virtual.run()


def test_two_conversations_of_one_name() -> None:
    virtual = VirtualCluster(scheduler(), engines())
    virtual.feed([conversation("a", (5_000, 50)), conversation("a", (5_000, 50))])
    with pytest.raises(SimulationError, match="two conversations are called a"):
        virtual.run()


# --- refusals and failures -------------------------------------------------------------------
def test_a_turn_that_fits_no_engine_fails_as_the_engine_says() -> None:
    virtual = run([conversation("a", (39_000, 3_000), (10, 5))], kv_capacity_tokens=40_000)
    (result,) = virtual.results
    assert result.outcome is Outcome.FAILED


@pytest.mark.parametrize("again", [False, True])
def test_refused_turns_are_sent_again_or_not(again: bool) -> None:
    tight = scheduler("collocated", max_hold_s=2.0)
    virtual = VirtualCluster(
        tight,
        engines(decoders=1, prefillers=0, kv_capacity_tokens=40_000, host_capacity_tokens=0),
        retry_refused=again,
    )
    virtual.feed(conversation(f"c{i}", (20_000, 150), at_s=i * 0.1) for i in range(12))
    summary = virtual.run()
    outcomes = {r.outcome for r in virtual.results}
    assert summary.turns == summary.conversations == 12
    if not again:
        assert outcomes == {Outcome.FINISHED, Outcome.REJECTED}
        assert {r.reason for r in virtual.results if r.outcome is Outcome.REJECTED} == {
            Reason.HELD_TOO_LONG
        }
        return
    assert outcomes == {Outcome.FINISHED}
    assert summary.refusals == sum(r.refusals for r in virtual.results) > 0
    late = max(virtual.results, key=lambda r: r.refusals)
    assert late.placed_s is not None
    assert late.placed_s - late.arrived_s > 2.0  # from when it was sent first
    assert summary.finished_turns == 12


# --- deadlocks -------------------------------------------------------------------------------
class Mute(Scheduler):
    """Forgets to place a turn."""

    def handle(self, event: Event, *, now_s: float) -> list[Decision]:
        decisions = super().handle(event, now_s=now_s)
        return [d for d in decisions if not (isinstance(d, Place) and d.turn == "c3#2")]


def test_a_run_that_stalls_is_a_deadlock_with_everyone_s_state() -> None:
    fresh = scheduler()
    virtual = VirtualCluster(Mute(fresh.settings, fresh.policy), engines(), stall_s=500.0)
    virtual.feed(conversations(6))
    with pytest.raises(DeadlockError) as caught:
        virtual.run()
    text = str(caught.value)
    assert "no turn has ended for 500.0 s, and 1 conversations are open" in text
    assert "c3#2: waits" in text
    assert "p0 (prefill): idle" in text
    assert "books of d1" in text


def test_long_gaps_are_no_deadlock() -> None:
    load = [conversation("a", (500, 5), (50, 5), gap_s=100_000.0)]
    virtual = VirtualCluster(scheduler(), engines(), stall_s=50.0, report_interval_s=500.0)
    virtual.feed(load)
    assert virtual.run().finished_turns == 2


def test_a_turn_as_long_as_conversations_may_idle_lets_time_go_on() -> None:
    """The alarm for idle conversations, set while one is at work, must not go off for ever."""
    virtual = VirtualCluster(scheduler(idle_timeout_s=1.1), engines(), report_interval_s=50.0)
    virtual.feed([conversation(f"c{i}", (900 + i, 400), at_s=0.137 * i) for i in range(30)])
    assert virtual.run().finished_turns == 30


class Restless(Scheduler):
    """Wishes to be woken, each time at another far time."""

    def handle(self, event: Event, *, now_s: float) -> list[Decision]:
        return [*super().handle(event, now_s=now_s), WakeAt(at_s=1e9 + now_s)]


def test_alarms_that_are_never_heard_are_forgotten() -> None:
    """Else memory would grow with the length of a run: one in which nothing expires has many."""
    fresh = scheduler()
    virtual = VirtualCluster(
        Restless(fresh.settings, fresh.policy), engines(), report_interval_s=0.01
    )
    virtual.feed([conversation("a", (500, 5), (50, 5), gap_s=50.0)])
    assert virtual.run().virtual_s > 50.0  # some 10,000 events
    assert len(virtual._agenda.heap) < 2_100


# --- equal results ---------------------------------------------------------------------------
@pytest.mark.parametrize("policy", ["conserve", "collocated", "full_disaggregation"])
def test_steps_together_and_one_by_one_come_to_the_same(policy: str) -> None:
    runs = []
    for single_steps in (False, True):
        virtual = VirtualCluster(
            scheduler(policy), engines(kv_capacity_tokens=90_000), single_steps=single_steps
        )
        virtual.feed(conversations(40))
        runs.append((virtual.run(), virtual.results))
    (together, results), (single, others) = runs
    assert together.virtual_s == pytest.approx(single.virtual_s)
    assert together.energy_j == pytest.approx(single.energy_j)
    for one, other in zip(results, others, strict=True):
        for name in TurnResult.__dataclass_fields__:
            value = getattr(other, name)
            wanted = pytest.approx(value, abs=1e-6) if name.endswith("_s") and value else value
            assert getattr(one, name) == wanted, name


def test_equal_inputs_give_equal_results() -> None:
    runs = []
    for _ in range(2):
        virtual = VirtualCluster(scheduler(), engines(kv_capacity_tokens=90_000))
        virtual.feed(conversations(30))
        runs.append((virtual.run(), virtual.results))
    assert runs[0] == runs[1]


# --- where the time of a turn goes -----------------------------------------------------------
def test_times_of_a_turn_follow_each_other() -> None:
    for result in run(conversations(20)).results:
        times = [result.arrived_s, result.placed_s, result.prefill_began_s, result.prefilled_s]
        if result.prefiller is not None:
            times.append(result.handed_s)
            assert result.moved_tokens > 0
        else:
            assert result.handed_s is None
        times += [result.first_token_s, result.finished_s]
        assert None not in times
        assert times == sorted(times, key=lambda time_s: time_s or 0.0)
        assert result.recomputed_tokens == 0


def test_dropped_context_is_computed_again_and_counted() -> None:
    load = [
        conversation("a", (20_000, 20), (50, 20), gap_s=60.0),
        conversation("b", (20_000, 20), at_s=10.0),
        conversation("c", (20_000, 20), at_s=20.0),
    ]
    virtual = VirtualCluster(
        scheduler("collocated", protect_idle_s=1.0),
        engines(prefillers=0, decoders=1, kv_capacity_tokens=30_000, host_capacity_tokens=0),
    )
    virtual.feed(load)
    summary = virtual.run()
    second = next(r for r in virtual.results if (r.conversation, r.index) == ("a", 2))
    assert second.recomputed_tokens == 20_019 // 64 * 64
    use = summary.engines[EngineId("d0")]
    assert use.freed_tokens >= 2 * 20_020 // 64 * 64
    assert use.prefill_tokens > 4 * 20_000


def test_a_parked_context_comes_back() -> None:
    load = [
        conversation("a", (20_000, 20), (50, 20), gap_s=60.0),
        conversation("b", (20_000, 20), at_s=10.0),
    ]
    virtual = run(load, "collocated", prefillers=0, decoders=1, kv_capacity_tokens=30_000)
    second = next(r for r in virtual.results if (r.conversation, r.index) == ("a", 2))
    assert second.restored_tokens > 5_000
    assert second.recomputed_tokens == 0


# --- shared prefixes -------------------------------------------------------------------------
@pytest.mark.parametrize("warm", [False, True])
def test_a_shared_prefix_is_computed_once(warm: bool) -> None:
    shared = ("system", 6_400) if warm else None
    load = [
        conversation(f"c{i}", (8_000, 10), (100, 5), at_s=i, gap_s=9.0, shared_prefix=shared)
        for i in range(3)
    ]
    virtual = run(load, "collocated", prefillers=0, decoders=1)
    firsts = [r.cached_tokens for r in virtual.results if r.index == 1]
    assert firsts == [0, 6_400, 6_400] if warm else firsts == [0, 0, 0]
    seconds = [r.cached_tokens for r in virtual.results if r.index == 2]
    assert seconds == [8_010 // 64 * 64] * 3


def test_a_rewritten_history_keeps_what_it_begins_with() -> None:
    turns = (
        SimulatedTurn(prompt_tokens=10_000, new_tokens=10_000, output_tokens=100),
        SimulatedTurn(prompt_tokens=7_000, new_tokens=2_000, output_tokens=100, gap_s=1.0),
        SimulatedTurn(prompt_tokens=7_200, new_tokens=100, output_tokens=100, gap_s=1.0),
    )
    load = dataclasses.replace(conversation("a", (1, 1)), turns=turns)
    virtual = run([load], "collocated", prefillers=0, decoders=1)
    assert [r.cached_tokens for r in virtual.results] == [0, 5_000 // 64 * 64, 7_100 // 64 * 64]


# --- copies ----------------------------------------------------------------------------------
def hand_overs(virtual: VirtualCluster, seen: list[Event], turn: str) -> HandoffFinished:
    return next(e for e in seen if isinstance(e, HandoffFinished) and e.turn == turn)


def test_a_tail_turn_prefilled_elsewhere_moves_only_what_is_missing() -> None:
    seen: list[Event] = []
    virtual = VirtualCluster(
        scheduler("full_disaggregation"),
        engines(decoders=1),
        observer=lambda _s, event, _d: seen.append(event),
    )
    virtual.feed([conversation("a", (10_000, 20), (2_000, 20))])
    virtual.run()
    first, second = virtual.results
    assert (first.prefiller, second.prefiller) == ("p0", "p0")
    assert second.transfer is TransferReason.APPEND
    delta = hand_overs(virtual, seen, "a#2").moved_tokens
    # The prompt of turn 2 in whole pages, less what the decoder has of it from turn 1.
    assert delta == 12_020 // 64 * 64 - 10_020 // 64 * 64
    assert second.recomputed_tokens < 10_000  # the prefiller still has turn 1's prompt
    assert second.cached_tokens >= 12_020 - 64 - 1


class Mover(Scheduler):
    """Has the second turn of every conversation run on d1, its KV copied from d0."""

    def handle(self, event: Event, *, now_s: float) -> list[Decision]:
        decisions = super().handle(event, now_s=now_s)
        if isinstance(event, TurnArrived) and event.turn.endswith("#2"):
            return [
                dataclasses.replace(d, decoder=EngineId("d1"), source=EngineId("d0"))
                if isinstance(d, Place)
                else d
                for d in decisions
            ]
        return decisions


def test_a_move_by_copy_takes_the_links_and_computes_nothing_anew() -> None:
    seen: list[Event] = []
    fresh = scheduler("collocated")
    only = engines(prefillers=0)
    virtual = VirtualCluster(
        Mover(fresh.settings, fresh.policy),
        only,
        observer=lambda _s, event, _d: seen.append(event),
    )
    virtual.feed([conversation("a", (10_000, 20), (200, 20))])
    # The scheduler's books know nothing of this move: its KV on d1 is nobody's at the end.
    with pytest.raises(Exception, match="kv: d1: left_sessions"):
        virtual.run()
    second = virtual.results[1]
    context = 10_020 // 64 * 64
    assert second.moved_tokens == context
    assert second.cached_tokens == context
    assert second.recomputed_tokens == 0
    assert second.handed_s is not None
    assert second.handed_s - second.arrived_s == pytest.approx(A40.handoff_s(context))
    assert hand_overs(virtual, seen, "a#2").duration_s == pytest.approx(A40.handoff_s(context))
    prefills = [e for e in seen if isinstance(e, PrefillFinished)]
    assert [e.turn for e in prefills] == ["a#1", "a#2"]


def test_hand_overs_of_one_sender_queue_for_its_link() -> None:
    """Two prompts prefilled in one step leave one after the other."""
    slow = A40.replace(handoff=A40.handoff)
    virtual = VirtualCluster(scheduler(handoff_min_tokens=1), engines(profile=slow))
    virtual.feed([conversation(f"c{i}", (1_024, 10)) for i in range(2)])
    virtual.run()
    prefilled = {r.prefilled_s for r in virtual.results}
    handed = sorted(r.handed_s or 0.0 for r in virtual.results)
    assert len(prefilled) == 1
    one_s = A40.handoff_s(1_024)
    assert handed == pytest.approx([(prefilled.copy().pop() or 0.0) + one_s * n for n in (1, 2)])


def test_what_two_senders_hand_over_queues_at_the_receiver() -> None:
    """Each leaves its prefiller over a link of its own, and both come in over the decoder's."""
    profile = load_profile("h100-qwen3-8b").replace(host_link_bytes_per_s=1e9)
    virtual = VirtualCluster(
        scheduler(handoff_min_tokens=1),
        engines(prefillers=2, decoders=1, profile=profile, chunk_tokens=8_192),
    )
    virtual.feed([conversation(f"c{i}", (8_192, 10)) for i in range(2)])
    summary = virtual.run()
    assert {r.prefiller for r in virtual.results} == {"p0", "p1"}
    (handed_s,) = {r.handed_s for r in virtual.results}  # at the same time
    assert handed_s is not None
    firsts = sorted(r.first_token_s or 0.0 for r in virtual.results)
    one_s = profile.ingress_s(8_192 - 64)  # the last page is computed for its logits
    assert one_s > 1.0
    assert [at_s - handed_s for at_s in firsts] == pytest.approx([one_s, 2 * one_s], rel=0.05)
    assert summary.engines[EngineId("d0")].ingress_busy_s == pytest.approx(2 * one_s)
    assert summary.engines[EngineId("p0")].egress_busy_s == pytest.approx(profile.handoff_s(8_192))
