"""Defects that were found in the scheduler, one test each: none of them may come back."""

from __future__ import annotations

import pytest
from chaos import SPEEDS, joined
from world import World, none, one

from conserve_serving.core.decisions import CloseTurn, Hold, Park, Place, Reject, Release, WakeAt
from conserve_serving.core.events import (
    EngineDraining,
    EngineLost,
    EngineReported,
    HandoffFinished,
    PlacementHint,
    PrefillFinished,
    StepTimes,
    TimerFired,
    TurnAborted,
    TurnArrived,
    TurnFailed,
)
from conserve_serving.core.types import (
    ConversationId,
    EngineId,
    EngineSpeeds,
    Fallback,
    Outcome,
    Reason,
    Tier,
    TierMode,
    TransferReason,
    TurnId,
)

FAST = EngineSpeeds(prefill_tokens_per_s=25_000.0, decode_step_s=0.001)


def prefilled(place: Place, prompt_tokens: int) -> PrefillFinished:
    return PrefillFinished(turn=place.turn, plan=place.plan, prompt_tokens=prompt_tokens)


def hinted(turn: str, conversation: str, prompt_tokens: int, context_tokens: int) -> TurnArrived:
    return TurnArrived(
        turn=TurnId(turn),
        conversation=ConversationId(conversation),
        prompt_tokens=prompt_tokens,
        hint=PlacementHint(
            engine=EngineId("d0"), epoch=1, context_tokens=context_tokens, turns=3, transfers=1
        ),
    )


# --- late and duplicated events ------------------------------------------------------------------
def test_a_prefill_told_twice_puts_no_kv_on_the_decoder() -> None:
    world = World()
    world.cluster("d0")
    place = one(world.arrive("t1", "c", 10_000), Place)
    world.send(prefilled(place, 10_000))
    world.send(prefilled(place, 10_000))
    world.send(TurnAborted(turn=place.turn))  # before anything was handed over
    assert world.scheduler.engines[EngineId("d0")].held_tokens == 0
    assert world.scheduler.open_conversations == 0


def test_an_engine_lost_before_it_was_known_to_have_joined_does_not_come_back() -> None:
    world = World()
    world.cluster("d0", "d1")
    home = world.first_turn("t1", "c").decoder
    world.send(EngineLost(engine=home, epoch=2))  # its restart failed; the join comes late
    world.engine(home, epoch=2)
    assert home not in world.scheduler.engines
    assert one(world.arrive("t2", "c", 10_200), Place).decoder != home
    world.engine(home, epoch=3)
    assert home in world.scheduler.engines


def test_an_exact_prompt_length_corrects_what_was_booked() -> None:
    world = World(output_reserve_tokens=0)
    world.cluster("d0")
    place = one(world.arrive("t1", "c", 8_000), Place)
    world.send(prefilled(place, 10_000))
    decoder = world.scheduler.engines[EngineId("d0")]
    assert decoder.reserved_tokens == decoder.active_tokens == 10_000
    world.handed_over(place)
    world.send(TurnFailed(turn=place.turn, plan=place.plan, engine=place.decoder, retryable=False))
    assert decoder.resident_tokens == 10_000


# --- concurrent turns -------------------------------------------------------------------------
def test_parallel_first_turns_that_waited_do_not_prefill_twice() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=64_000)
    world.first_turn("t-a", "a", 50_000)
    one(world.arrive("t1", "c", 20_000), Hold)
    one(world.arrive("t2", "c", 20_050), Hold)
    decisions = world.end("a")
    place = one(decisions, Place)
    assert (place.turn, place.prefiller) == ("t1", "p0")
    assert one(decisions, Hold).reason is Reason.HELD_BEHIND_FIRST_TURN
    second = one(world.handed_over(place), Place)
    assert (second.turn, second.prefiller) == ("t2", None)


def test_the_line_behind_a_first_turn_is_bounded() -> None:
    world = World(max_waiting_turns=3)
    world.cluster("d0")
    one(world.arrive("t0", "c", 10_000), Place)
    for index in range(3):
        one(world.arrive(f"t{index + 1}", "c", 10_000), Hold)
    assert one(world.arrive("t9", "c", 10_000), Reject).reason is Reason.QUEUE_FULL
    assert one(world.send(TurnAborted(turn=TurnId("t2"))), CloseTurn).outcome is Outcome.ABORTED
    one(world.arrive("t5", "c", 10_000), Hold)


# --- room --------------------------------------------------------------------------------------
def test_a_prompt_goes_only_where_it_can_fit_whole() -> None:
    world = World(headroom=0.0)
    world.engine("d0", capacity=40_000, speeds=FAST)  # ranks first by far
    world.engine("d1", capacity=100_000)
    assert one(world.arrive("t1", "c", 50_000), Place).decoder == "d1"


def test_a_conversation_that_outgrows_its_engine_moves_to_a_larger_one() -> None:
    world = World(headroom=0.0)
    world.engine("d0", capacity=40_000, speeds=FAST)
    world.engine("d1", capacity=100_000)
    assert world.first_turn("t1", "c", 30_000).decoder == "d0"
    place = one(world.arrive("t2", "c", 45_000), Place)
    assert (place.decoder, place.reason) == ("d1", Reason.REPLACED_NO_ROOM)


def test_nothing_is_parked_in_vain_and_the_next_engine_is_tried() -> None:
    world = World(headroom=0.0)
    world.engine("d0", capacity=40_000, host=12_000, speeds=FAST)
    for name in "abc":
        world.first_turn(f"t-{name}", name, 10_000)
    place = one(world.arrive("t-a2", "a", 10_200), Place)
    world.finish(place, 10_200)
    world.engine("d1", capacity=32_000, host=100_000)
    world.first_turn("t-x", "x", 20_000)
    # d0 seems to have 8.5k + 12k within reach, but its host tier takes one of 10k, not two of 6k.
    decisions = world.arrive("t-y", "y", 20_000)
    assert one(decisions, Place).decoder == "d1"
    assert {d.engine for d in decisions if isinstance(d, Park)} == {"d1"}


def test_idle_conversations_on_a_hosting_prefiller_are_parked_for_a_prompt() -> None:
    world = World(tier_mode=TierMode.HOSTING, headroom=0.0)
    world.engine("p0", Tier.PREFILL, capacity=32_000, host=100_000, speeds=FAST)
    for name in "abc":
        assert world.first_turn(f"t-{name}", name, 10_000).decoder == "p0"
    world.engine("d0", capacity=2_000_000)
    decisions = world.arrive("t-d", "d", 10_000)
    place = one(decisions, Place)
    assert (place.decoder, place.prefiller) == ("d0", "p0")
    assert one(decisions, Park).engine == "p0"


def test_a_prefiller_full_of_conversations_is_not_waited_for() -> None:
    world = World(tier_mode=TierMode.HOSTING, headroom=0.0)
    world.engine("p0", Tier.PREFILL, capacity=32_000, speeds=FAST)
    for name in "abc":
        assert world.first_turn(f"t-{name}", name, 10_000).decoder == "p0"
    world.engine("d0", capacity=2_000_000)
    place = one(world.arrive("t-d", "d", 10_000), Place)
    assert (place.decoder, place.prefiller) == ("d0", None)
    assert place.reason is Reason.FIRST_TURN_NO_PREFILLER


def test_a_prefiller_full_of_prompts_is_waited_for() -> None:
    world = World(headroom=0.0)
    world.engine("p0", Tier.PREFILL, capacity=16_000)
    world.engine("d0", capacity=1_000_000)
    first = one(world.arrive("t1", "a", 10_000), Place)
    one(world.arrive("t2", "b", 10_000), Hold)
    second = one(world.handed_over(first), Place)
    assert (second.turn, second.prefiller) == ("t2", "p0")


def test_many_engines_without_room_do_not_hide_the_one_that_has_it() -> None:
    world = World(headroom=0.0)
    for index in range(80):  # each ranks before the large one
        world.send(joined(f"d{index:03d}", capacity=20_000, speeds=FAST))
    world.send(joined("large", capacity=100_000))
    assert one(world.arrive("t1", "c", 50_000), Place).decoder == "large"


def test_adopting_what_has_no_room_here_leaves_nothing_to_park() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=32_000, host=100_000)
    one(world.arrive("t-a", "a", 31_900), Place)
    world.send(hinted("t-c", "c", 9_100, 9_000))
    engine = world.scheduler.engines[EngineId("d0")]
    assert not engine.idle
    world.send(TurnAborted(turn=TurnId("t-a")))
    assert engine.parked_conversations == 0


# --- waiting -----------------------------------------------------------------------------------
def test_any_number_of_turns_that_do_not_fit_never_block_one_that_does() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=64_000)
    world.first_turn("t-a", "a", 40_000)
    world.first_turn("t-b", "b", 22_000)
    for index in range(40):
        one(world.arrive(f"t{index}", f"c{index}", 50_000), Hold)
    one(world.arrive("t-small", "small", 5_000), Hold)
    assert one(world.end("b"), Place).turn == "t-small"


def test_room_for_many_is_not_left_empty_after_the_first_few() -> None:
    world = World(headroom=0.0)
    world.engine("d0", capacity=32_000)
    world.first_turn("t-a", "a", 30_000)
    for index in range(60):
        one(world.arrive(f"t{index}", f"c{index}", 5_000), Hold)
    decisions = world.engine("d1", capacity=1_000_000)
    placed = {d.turn for d in decisions if isinstance(d, Place)}
    while len(placed) < 60:
        assert one(decisions, WakeAt).at_s == world.now_s  # now: nothing else need ever happen
        decisions = world.send(TimerFired())
        placed |= {d.turn for d in decisions if isinstance(d, Place)}
    assert world.scheduler.waiting_turns == 0


def test_new_conversations_do_not_take_the_room_a_tail_turn_waits_for() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=32_000)
    world.first_turn("t-a", "a", 10_000)
    busy = world.first_turn("t-b", "b", 15_000)
    one(world.arrive("t-a2", "a", 18_000), Hold)
    one(world.arrive("t-n", "n", 1_000), Hold)  # it would fit
    placed = [d.turn for d in world.end("b") if isinstance(d, Place)]
    assert placed == ["t-a2", "t-n"]
    assert busy.decoder == "d0"


def test_a_tail_turn_that_gives_up_lets_the_new_ones_in() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=32_000)
    world.first_turn("t-a", "a", 10_000)
    world.first_turn("t-b", "b", 15_000)
    one(world.arrive("t-a2", "a", 18_000), Hold)
    one(world.arrive("t-n", "n", 1_000), Hold)
    assert one(world.send(TurnAborted(turn=TurnId("t-a2"))), Place).turn == "t-n"


def test_a_tail_turn_without_a_home_is_not_starved_by_small_new_ones() -> None:
    world = World(headroom=0.0, max_hold_s=1_000.0)
    world.engine("d0", capacity=32_000)
    world.engine("d1", capacity=32_000)
    world.first_turn("t-c", "c", 25_000)
    small = [f"s{index}" for index in range(5)]
    for name in small:
        world.first_turn(f"t-{name}", name, 5_000)
    world.send(EngineLost(engine=EngineId("d0"), epoch=1))
    one(world.arrive("t-c2", "c", 25_100), Hold)  # 25k free by and by, never at once
    for index, name in enumerate(small):
        decisions = world.end(name) + world.arrive(f"u{index}", f"u{index}", 5_000)
        if any(isinstance(d, Place) and d.turn == "t-c2" for d in decisions):
            return
    pytest.fail("every piece of room went to a new conversation")


def test_a_turn_that_was_placed_has_a_whole_new_time_to_wait() -> None:
    world = World(headroom=0.0, max_hold_s=60.0, no_engine_hold_s=60.0)
    world.engine("d0", capacity=64_000)
    world.first_turn("t-z", "z", 10_000)
    first = one(world.arrive("t-a", "a", 30_000), Place)
    one(world.arrive("t-x", "x", 60_000), Hold)  # its deadline is the next until 60 s
    world.now_s = 1.0
    one(world.arrive("t-b", "b", 40_000), Hold)
    place = one(world.send(TurnAborted(turn=first.turn)), Place)
    assert place.turn == "t-b"
    world.now_s = 59.0
    hold = one(world.send(EngineLost(engine=place.decoder, epoch=1)), Hold)
    assert (hold.turn, hold.until_s) == ("t-b", 119.0)
    world.now_s = 61.0
    assert one(world.send(TimerFired()), Reject).turn == "t-x"
    world.now_s = 119.0
    assert one(world.send(TimerFired()), Reject).turn == "t-b"


def test_nobody_gives_its_kv_up_for_nothing() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=32_000)
    world.first_turn("t-a", "a", 10_000)
    world.first_turn("t-b", "b", 20_000)
    one(world.arrive("t-a2", "a", 14_000), Hold)
    world.now_s = 10.0
    none(world.send(TimerFired()), Release)  # nobody else would gain from it
    place = one(world.end("b"), Place)
    assert (place.reason, place.prefiller) == (Reason.PINNED, None)


def test_turns_that_wait_for_each_other_give_way() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=32_000)
    world.first_turn("t-a", "a", 10_000)
    world.first_turn("t-b", "b", 20_000)
    one(world.arrive("t-a2", "a", 14_000), Hold)
    one(world.arrive("t-b2", "b", 24_000), Hold)
    world.now_s = 10.0
    decisions = world.send(TimerFired())
    release, place = one(decisions, Release), one(decisions, Place)
    assert (release.conversation, place.turn) == ("a", "t-b2")
    world.finish(place, 24_000)
    again = one(world.end("b"), Place)
    assert (again.turn, again.transfer) == ("t-a2", TransferReason.NO_ROOM)


def test_who_waits_at_a_draining_engine_leaves_at_once() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=32_000)
    world.first_turn("t-a", "a", 10_000)
    one(world.arrive("t-b", "b", 20_000), Place)
    world.engine("d1")
    one(world.arrive("t-a2", "a", 14_000), Hold)
    place = one(world.send(EngineDraining(engine=EngineId("d0"), epoch=1)), Place)
    assert (place.turn, place.transfer) == ("t-a2", TransferReason.ENGINE_DRAINING)


def test_a_lost_engine_with_many_waiting_turns_costs_no_event_more_than_its_share() -> None:
    world = World(headroom=0.0)
    world.engine("d0", capacity=320_000)
    for index in range(150):
        world.first_turn(f"t{index}", f"c{index}", 2_000)
    busy = one(world.arrive("t-busy", "busy", 319_000 - 150 * 2_112), Place)
    assert busy.decoder == "d0"
    for index in range(150):
        one(world.arrive(f"u{index}", f"c{index}", 9_000), Hold)
    world.engine("d1", capacity=10_000_000)
    decisions = world.send(EngineLost(engine=EngineId("d0"), epoch=1))
    placed: set[TurnId] = set()
    for _ in range(10):
        now = {d.turn for d in decisions if isinstance(d, Place)}
        assert len(now) <= 100
        placed |= now
        if len(placed) == 151:
            break
        assert one(decisions, WakeAt).at_s == world.now_s
        decisions = world.send(TimerFired())
    assert len(placed) == 151


def test_expiry_of_many_is_spread_over_events() -> None:
    world = World(idle_timeout_s=100.0)
    world.cluster("d0", capacity=1_000_000)
    for index in range(150):
        world.first_turn(f"t{index}", f"c{index}", 100)
    world.now_s = 100.0
    events = 0
    while world.scheduler.open_conversations:
        decisions = world.send(TimerFired())
        events += 1
        assert len([d for d in decisions if isinstance(d, Release)]) <= 64
        if world.scheduler.open_conversations:
            assert one(decisions, WakeAt).at_s <= world.now_s
    assert events == 3


# --- prefillers and labels ---------------------------------------------------------------------
def test_a_moved_conversation_keeps_its_reason_when_its_prefiller_is_lost() -> None:
    world = World()
    world.cluster("d0", "d1")
    world.engine("p1", Tier.PREFILL)
    home = world.first_turn("t1", "c").decoder
    world.send(EngineLost(engine=home, epoch=1))
    place = one(world.arrive("t2", "c", 10_200), Place)
    assert place.prefiller is not None
    again = one(world.send(EngineLost(engine=place.prefiller, epoch=1)), Place)
    assert again.reason is Reason.REPLACED_ENGINE_LOST
    assert again.transfer is TransferReason.ENGINE_LOST


def test_a_prefiller_lost_in_the_hand_off_is_replaced_and_the_line_stays_behind() -> None:
    world = World()
    world.cluster("d0")
    world.engine("p1", Tier.PREFILL)
    place = one(world.arrive("t1", "c", 10_000), Place)
    one(world.arrive("t2", "c", 10_050), Hold)
    world.send(prefilled(place, 10_000))
    again = one(world.send(EngineLost(engine=EngineId("p0"), epoch=1)), Place)
    assert (again.turn, again.prefiller, again.decoder) == ("t1", "p1", "d0")
    late = HandoffFinished(turn=place.turn, plan=place.plan, moved_tokens=1, duration_s=0.1)
    assert not world.send(late)
    assert one(world.handed_over(again), Place).turn == "t2"
    assert world.scheduler.counters.transfers == {TransferReason.FIRST_TURN: 1}
    assert world.scheduler.counters.fallbacks == {Fallback.PREFILLER_LOST: 1}


# --- rules that could be broken without a test failing -------------------------------------------
def test_a_conversation_that_goes_on_after_its_end_stays_open() -> None:
    world = World()
    world.cluster("d0")
    world.first_turn("t1", "c")
    running = one(world.arrive("t2", "c", 10_200), Place)
    none(world.end("c"), Release)
    more = one(world.arrive("t3", "c", 10_200), Place)
    world.finish(running, 10_200)
    none(world.finish(more, 10_200), Release)
    assert one(world.arrive("t4", "c", 10_400), Place).reason is Reason.PINNED


def test_a_first_turn_that_failed_is_tried_elsewhere_at_once() -> None:
    world = World()
    world.cluster("d0", "d1")
    place = one(world.arrive("t1", "c", 100), Place)
    failed = TurnFailed(turn=place.turn, plan=place.plan, engine=place.decoder, retryable=True)
    assert one(world.send(failed), Place).decoder != place.decoder


def test_kv_that_a_failed_move_left_nowhere_is_a_retry() -> None:
    world = World()
    world.cluster("d0", "d1")
    home = world.first_turn("t1", "c").decoder
    world.send(EngineLost(engine=home, epoch=1))
    place = one(world.arrive("t2", "c", 10_200), Place)
    world.handed_over(place, fallback=Fallback.ACK_LATE)
    failed = TurnFailed(turn=place.turn, plan=place.plan, engine=place.decoder, retryable=True)
    assert one(world.send(failed), Place).transfer is TransferReason.RETRY


def test_a_conversation_whose_turn_runs_does_not_expire() -> None:
    world = World(idle_timeout_s=100.0)
    world.cluster("d0")
    place = one(world.arrive("t1", "c", 10_000), Place)
    world.handed_over(place)
    world.now_s = 150.0
    assert one(world.send(TimerFired()), WakeAt).at_s == 250.0
    none(world.finish(place, 10_000), Release)
    world.now_s = 249.0
    assert one(world.arrive("t2", "c", 10_200), Place).reason is Reason.PINNED


def test_the_turns_between_two_reports_say_what_a_turn_costs() -> None:
    world = World()
    world.cluster("d0", capacity=1_000_000)
    world.first_turn("t1", "c")
    engine = world.scheduler.engines[EngineId("d0")]
    serial = 0
    for _ in range(40):
        for _ in range(10):
            serial += 1
            place = one(world.arrive(f"u{serial}", "c", 10_200), Place)
            world.send(prefilled(place, 10_200))
            world.finish(place, 10_200)
        steps = StepTimes(prefill_tokens=10 * 67, prefill_s=10 * 0.015)
        world.send(EngineReported(engine=engine.id, epoch=1, steps=steps))
    assert engine.prefill_s(67) == pytest.approx(0.015, rel=0.1)


def test_conversations_seen_to_end_need_no_headroom() -> None:
    world = World()
    world.cluster("d0", capacity=64_000)
    for index in range(40):  # one in 40 has a second turn, and grows by 20k in it
        world.first_turn(f"t{index}", f"c{index}", 10_000)
        if index == 0:
            tail = one(world.arrive("tail", "c0", 30_000), Place)
            world.finish(tail, 30_000)
        world.end(f"c{index}")
    world.first_turn("u1", "b", 25_000)
    assert one(world.arrive("v1", "c", 25_000), Place).decoder == "d0"


def test_the_longer_of_two_parallel_contexts_is_kept_while_a_turn_may_need_it() -> None:
    world = World()
    world.cluster("d0")
    world.first_turn("t1", "c")
    long, short, other = (
        one(world.arrive(name, "c", tokens), Place)
        for name, tokens in (("t2", 12_000), ("t3", 10_500), ("t4", 12_100))
    )
    engine = world.scheduler.engines[EngineId("d0")]
    world.finish(long, 12_000)
    kept = engine.resident_tokens
    world.finish(short, 10_500)
    assert engine.resident_tokens == kept
    world.finish(other, 12_100)
    assert engine.resident_tokens >= 12_200


def test_no_more_room_is_booked_than_the_request_may_use() -> None:
    world = World(headroom=0.0, output_reserve_tokens=4_000)
    world.engine("d0", capacity=16_000)
    assert one(world.arrive("t1", "a", 8_000, max_output_tokens=16), Place)
    assert one(world.arrive("t2", "b", 7_900, max_output_tokens=16), Place)


def test_a_move_that_was_aborted_keeps_its_reason_for_the_next_turn() -> None:
    world = World()
    world.cluster("d0", "d1")
    home = world.first_turn("t1", "c").decoder
    world.send(EngineLost(engine=home, epoch=1))
    place = one(world.arrive("t2", "c", 10_200), Place)
    world.send(TurnAborted(turn=place.turn))
    assert one(world.arrive("t3", "c", 10_200), Place).reason is Reason.REPLACED_ENGINE_LOST


def test_a_conversation_never_moves_under_a_turn_that_runs() -> None:
    world = World(headroom=0.0)
    world.engine("d0", capacity=32_000)
    world.first_turn("t1", "c", 10_000)
    running = one(world.arrive("t2", "c", 20_000), Place)
    world.engine("d1")
    one(world.arrive("t3", "c", 30_000), Hold)
    world.now_s = 10.0
    decisions = world.send(TimerFired())
    none(decisions, Place)
    none(decisions, Release)
    assert one(world.finish(running, 20_000), Place).turn == "t3"


def test_nobody_gives_way_while_something_runs() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=32_000)
    world.first_turn("t-a", "a", 10_000)
    world.first_turn("t-b", "b", 15_000)
    running = one(world.arrive("t-z", "z", 5_000), Place)
    one(world.arrive("t-a2", "a", 14_000), Hold)
    one(world.arrive("t-b2", "b", 19_000), Hold)
    world.now_s = 10.0
    none(world.send(TimerFired()), Release)
    world.send(TurnAborted(turn=running.turn))
    assert world.scheduler.waiting_turns == 1


def test_what_was_rewritten_is_not_expected_to_be_cached() -> None:
    world = World()
    world.cluster("d0")
    world.first_turn("t1", "c")
    place = one(world.arrive("t2", "c", 10_200, reusable_tokens=3_000), Place)
    assert place.expected_cached_tokens == 3_000
    assert world.scheduler.engines[EngineId("d0")].prefill_backlog_tokens == 7_200


def test_headroom_does_not_keep_a_conversation_out_that_lost_its_engine() -> None:
    world = World()
    world.engine("d0", capacity=64_000)
    world.first_turn("t1", "a", 10_000)
    world.finish(one(world.arrive("t2", "a", 30_000), Place), 30_000)  # grew by 20k
    world.end("a")
    world.first_turn("u1", "b", 25_000)
    world.engine("d1", capacity=64_000)
    world.first_turn("v1", "c", 25_000)
    world.send(EngineLost(engine=EngineId("d1"), epoch=1))
    assert one(world.arrive("w1", "new", 25_000), Hold).reason is Reason.HELD_NO_ROOM
    assert one(world.arrive("v2", "c", 25_200), Place).decoder == "d0"


def test_turns_without_a_home_do_not_all_wait_for_the_same_engine() -> None:
    world = World(headroom=0.0)
    world.engine("d0", capacity=64_000)
    for name in "abc":
        world.first_turn(f"t-{name}", name, 20_000)
    for name in ("d1", "d2", "d3"):
        world.engine(name, capacity=32_000)
        world.first_turn(f"t-{name}", name, 20_000)
    world.send(EngineLost(engine=EngineId("d0"), epoch=1))
    for name in "abc":
        one(world.arrive(f"u-{name}", name, 20_200), Hold)
    assert [len(e.waiting) for e in world.scheduler.engines.values()] == [1, 1, 1]


def test_a_prefillers_speed_counts_for_the_prompt_at_hand() -> None:
    world = World()
    slow = EngineSpeeds(prefill_tokens_per_s=10_000.0, decode_step_s=0.01)
    world.engine("p0", Tier.PREFILL, speeds=slow)
    world.engine("p1", Tier.PREFILL)
    world.engine("d0", capacity=1_000_000)
    assert one(world.arrive("t1", "a", 20_000), Place).prefiller == "p1"  # 0.8 s
    assert one(world.arrive("t2", "b", 1_000), Place).prefiller == "p0"  # 0.1 s, not 0.84 s
    assert one(world.arrive("t3", "c", 20_000), Place).prefiller == "p1"  # 1.6 s, not 2.1 s


def test_the_threshold_counts_what_a_prefill_does_to_running_turns() -> None:
    world = World(handoff_floor_tokens=0)
    speeds = EngineSpeeds(prefill_tokens_per_s=25_000.0, decode_step_s=0.01, mixed_slowdown=3.0)
    world.engine("p0", Tier.PREFILL)
    world.engine("d0", speeds=speeds)
    assert one(world.arrive("t1", "a", 100), Place).prefiller is None  # 4 ms against 5.1 ms
    assert one(world.arrive("t2", "b", 100), Place).prefiller == "p0"  # 12 ms against 5.1 ms


def test_running_context_counts_against_free_kv() -> None:
    world = World()
    steep = EngineSpeeds(
        prefill_tokens_per_s=25_000.0, decode_step_s=0.01, decode_step_s_per_kv_token=1e-6
    )
    world.engine("d0", capacity=150_000, speeds=steep)
    one(world.arrive("t1", "a", 20_000), Place)  # 130k free and 30 ms a step
    world.engine("d1", capacity=90_000, speeds=steep)  # 90k free and 10 ms a step
    assert one(world.arrive("t2", "b", 1_000), Place).decoder == "d1"


def test_a_host_of_the_prefill_tier_prefills_by_itself() -> None:
    world = World(tier_mode=TierMode.HOSTING)
    world.engine("p0", Tier.PREFILL, capacity=500_000)
    world.engine("p1", Tier.PREFILL)
    place = one(world.arrive("t1", "a", 10_000), Place)
    assert (place.decoder, place.prefiller) == ("p0", None)


# --- baselines ---------------------------------------------------------------------------------
def test_round_robin_gives_a_newcomer_its_turn_not_all_of_them() -> None:
    world = World("round_robin")
    world.cluster("d0")
    for index in range(20):
        world.finish(one(world.arrive(f"t{index}", f"c{index}", 100), Place), 100)
    world.engine("d1")
    places = [one(world.arrive(f"u{i}", f"e{i}", 100), Place).decoder for i in range(6)]
    assert sorted(places) == ["d0", "d0", "d1", "d1", "p0", "p0"]


def test_round_robin_protects_no_kv_it_has_left_behind() -> None:
    world = World("round_robin")
    world.cluster("d0")
    place = one(world.arrive("t1", "c", 1_000), Place)
    world.finish(place, 1_000)
    decisions = world.arrive("t2", "c", 1_200)
    assert one(decisions, Release).engine == place.decoder
    assert one(decisions, Place).decoder != place.decoder


def test_engines_of_unknown_speed_share_what_one_of_them_has_shown() -> None:
    """Twenty conversations on real engines all went to the first: the guess made the other slow."""
    world = World()
    for name in ("d0", "d1"):
        world.send(joined(name, speeds_guessed=True))
    world.send(joined("other-tier", Tier.PREFILL, speeds_guessed=True))
    homes = []
    for number in range(8):
        world.now_s += 1.0
        place = world.first_turn(f"t{number}", f"c{number}", 2_000)
        homes.append(place.decoder)
        steps = StepTimes(decode_steps=50, decode_s=50 * 0.0025, decode_kv_tokens=50 * 2_000)
        world.send(EngineReported(engine=place.decoder, epoch=1, steps=steps))
    assert min(homes.count(EngineId("d0")), homes.count(EngineId("d1"))) >= 3
    prefiller = world.scheduler.engines[EngineId("other-tier")]
    # The others' decode steps say nothing of it.
    assert prefiller.decode_step_s(1_000) == pytest.approx(
        SPEEDS.decode_step_s + 1_000 * SPEEDS.decode_step_s_per_kv_token
    )


def test_an_engine_that_has_shown_its_own_speed_keeps_it() -> None:
    world = World()
    for name in ("fast", "slow"):
        world.send(joined(name, speeds_guessed=True))
    for _ in range(30):
        for name, step_s in (("slow", 0.02), ("fast", 0.002)):
            steps = StepTimes(decode_steps=50, decode_s=50 * step_s, decode_kv_tokens=50_000)
            world.send(EngineReported(engine=EngineId(name), epoch=1, steps=steps))
    engines = world.scheduler.engines
    slow, fast = engines[EngineId("slow")], engines[EngineId("fast")]
    assert slow.decode_step_s(1_000) > 5 * fast.decode_step_s(1_000)


def test_kv_left_behind_while_another_turn_runs_elsewhere_is_released() -> None:
    world = World("round_robin")
    for name in ("d0", "d1", "d2"):
        world.engine(name)
    places = [one(world.arrive(f"t{i}", "c", 10_000), Place) for i in range(2)]
    assert [place.decoder for place in places] == ["d0", "d1"]
    world.finish(places[1], 10_000)
    decisions = world.arrive("t2", "c", 10_200)
    assert one(decisions, Place).decoder == "d2"
    release = one(decisions, Release)
    assert (release.engine, release.tokens) == ("d1", 10_112)
    # Where a turn of it still runs, its KV goes when that has ended.
    assert one(world.finish(places[0], 10_000), Release).engine == "d0"


def test_kv_under_turns_that_come_to_nothing_where_it_lives_no_more_is_released() -> None:
    world = World("round_robin")
    world.engine("d0")
    world.first_turn("t0", "c")
    for turn in ("t1", "t2"):
        world.arrive(turn, "c", 10_200)
    world.engine("d1")
    decisions = [*world.arrive("t3", "c", 10_300), *world.arrive("t4", "c", 10_300)]
    assert "d1" in {d.decoder for d in decisions if isinstance(d, Place)}
    gone = [d for t in ("t1", "t2", "t3") for d in world.send(TurnAborted(turn=TurnId(t)))]
    assert [d.engine for d in gone if isinstance(d, Release)] == ["d0"]
