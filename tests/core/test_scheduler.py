"""The rules, one scenario each."""

from __future__ import annotations

import pytest
from world import World, none, one

from conserve_serving.core.decisions import CloseTurn, Hold, Park, Place, Reject, Release, WakeAt
from conserve_serving.core.events import (
    EngineDraining,
    EngineLost,
    EngineReported,
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


# --- the normal life ---------------------------------------------------------------------------
def test_turn_one_is_handed_over_once_and_the_tail_stays() -> None:
    world = World()
    world.cluster("d0", "d1")
    place = one(world.arrive("t1", "c", 10_000), Place)
    assert (place.prefiller, place.transfer) == ("p0", TransferReason.FIRST_TURN)
    assert place.reason is Reason.FIRST_TURN_HANDOFF
    assert place.turn_index == 1
    assert place.expected_cached_tokens == 10_000
    world.handed_over(place)
    closed = one(world.finish(place, 10_000, cached_tokens=9_999), CloseTurn)
    assert closed.outcome is Outcome.FINISHED
    context = 10_100
    for index in range(2, 6):
        tail = one(world.arrive(f"t{index}", "c", context + 60), Place)
        assert (tail.decoder, tail.prefiller) == (place.decoder, None)
        assert (tail.reason, tail.turn_index) == (Reason.PINNED, index)
        assert context <= tail.expected_cached_tokens < context + 16
        assert tail.priority > place.priority
        world.finish(tail, context + 60, 40, cached_tokens=context)
        context += 100
    assert world.scheduler.counters.transfers == {TransferReason.FIRST_TURN: 1}
    assert world.scheduler.counters.shortfall_turns == 0
    release = one(world.end("c"), Release)
    assert (release.engine, release.reason) == (place.decoder, Reason.CONVERSATION_ENDED)
    assert world.scheduler.open_conversations == 0


def test_a_short_first_turn_stays_on_its_decoder() -> None:
    world = World(handoff_floor_tokens=0)
    world.cluster("d0")
    # 5 ms of set-up against 40 µs a token of prefill and 1.1 µs of transfer: about 130 tokens.
    short = one(world.arrive("t1", "a", 100), Place)
    assert (short.prefiller, short.reason) == (None, Reason.FIRST_TURN_SHORT)
    long = one(world.arrive("t2", "b", 200), Place)
    assert long.prefiller == "p0"


def test_the_threshold_can_be_set() -> None:
    world = World(handoff_min_tokens=5_000)
    world.cluster("d0")
    assert one(world.arrive("t1", "a", 4_999), Place).prefiller is None
    assert one(world.arrive("t2", "b", 5_000), Place).prefiller == "p0"


def test_a_slow_acknowledgement_raises_the_threshold() -> None:
    world = World()
    world.cluster("d0")
    for index in range(30):
        place = one(world.arrive(f"t{index}", f"c{index}", 2_000), Place)
        if place.prefiller is None:
            break
        world.handed_over(place, duration_s=0.2)
        world.finish(place, 2_000)
        world.end(f"c{index}")
    assert place.reason is Reason.FIRST_TURN_SHORT


def test_least_outstanding_prefill_work_by_each_prefillers_own_speed() -> None:
    world = World()
    slow = EngineSpeeds(prefill_tokens_per_s=5_000.0, decode_step_s=0.01)
    world.engine("p0", Tier.PREFILL, speeds=slow)
    world.engine("p1", Tier.PREFILL)
    world.engine("d0", capacity=1_000_000)
    places = [one(world.arrive(f"t{i}", f"c{i}", 10_000), Place).prefiller for i in range(7)]
    # p1 is done with five of them before p0 is with one: the idle one is not always the answer.
    assert places == ["p1", "p1", "p1", "p1", "p0", "p1", "p1"]


def test_decoder_with_most_free_kv_weighed_by_step_time() -> None:
    world = World()
    fast = EngineSpeeds(prefill_tokens_per_s=25_000.0, decode_step_s=0.007)
    world.engine("p0", Tier.PREFILL)
    world.engine("d0", capacity=150_000)
    world.engine("d1", capacity=100_000, speeds=fast)
    assert world.first_turn("t1", "a").decoder == "d1"


def test_step_times_learned_from_reports_move_placement() -> None:
    world = World()
    world.cluster("d0", "d1")
    assert one(world.arrive("t0", "z", 200), Place).decoder == "d0"
    throttled = StepTimes(decode_steps=500, decode_s=50.0, decode_kv_tokens=500_000)
    for _ in range(5):
        world.send(EngineReported(engine=EngineId("d0"), epoch=1, steps=throttled))
    world.end("z")
    assert one(world.arrive("t1", "a", 200), Place).decoder == "d1"


def test_hosting_mode_lets_the_prefill_tier_hold_conversations() -> None:
    world = World(tier_mode=TierMode.HOSTING)
    world.engine("p0", Tier.PREFILL, capacity=500_000)
    world.engine("d0", capacity=50_000)
    place = one(world.arrive("t1", "a", 10_000), Place)
    assert (place.decoder, place.prefiller) == ("p0", None)


# --- room ------------------------------------------------------------------------------------
def test_idle_conversations_are_parked_before_anything_is_held() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", host=100_000, capacity=32_000)
    for name in "abc":
        world.first_turn(f"t-{name}", name, 10_000)
    decisions = world.arrive("t-d", "d", 10_000)
    park = one(decisions, Park)
    assert park.conversation == "a"  # the longest idle
    one(decisions, Place)
    none(decisions, Hold)
    # ... and the parked one comes back without a transfer.
    again = world.arrive("t-a2", "a", 10_200)
    place = one(again, Place)
    assert (place.decoder, place.prefiller, place.reason) == ("d0", None, Reason.PINNED)
    assert place.expected_cached_tokens >= 10_100
    assert [d.conversation for d in again if isinstance(d, Park)]


def test_without_a_host_tier_new_work_is_held_and_open_kv_is_left_alone() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=32_000)
    for name in "abc":
        world.first_turn(f"t-{name}", name, 10_000)
    decisions = world.arrive("t-d", "d", 10_000)
    hold = one(decisions, Hold)
    assert hold.reason is Reason.HELD_NO_ROOM
    none(decisions, Park)
    released = world.end("b")
    assert one(released, Place).turn == "t-d"


def test_what_does_not_fit_never_blocks_what_does() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=32_000)
    first = one(world.arrive("t-a", "a", 20_000), Place)
    one(world.arrive("t-large", "large", 25_000), Hold)
    one(world.arrive("t-small", "small", 5_000), Place)
    world.handed_over(first)
    world.finish(first, 20_000)


def test_tail_turns_go_before_new_conversations() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=32_000)
    world.first_turn("t-a", "a", 10_000)
    busy = one(world.arrive("t-b", "b", 20_000), Place)
    one(world.arrive("t-new", "new", 9_000), Hold)
    one(world.arrive("t-a2", "a", 14_000), Hold)  # arrived later, goes first
    world.handed_over(busy)
    world.finish(busy, 20_000)
    released = world.end("b")
    assert [d.turn for d in released if isinstance(d, Place)] == ["t-a2", "t-new"]


def test_headroom_keeps_room_for_the_growth_that_was_observed() -> None:
    world = World()
    world.cluster("d0", capacity=64_000)
    world.first_turn("t1", "a", 10_000)
    tail = one(world.arrive("t2", "a", 30_000), Place)  # grows by 20k in its second turn
    world.finish(tail, 30_000, cached_tokens=10_000)
    world.end("a")
    world.first_turn("u1", "b", 25_000)
    # Both fit now, but a conversation of b's age was seen to grow by 20k tokens.
    assert one(world.arrive("v1", "c", 25_000), Hold).reason is Reason.HELD_NO_ROOM
    assert one(world.arrive("w1", "d", 10_000), Place).decoder == "d0"


def test_a_conversation_whose_home_is_full_moves_with_a_reason() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", "d1", capacity=32_000)
    home = world.first_turn("t-a", "a", 10_000).decoder
    other = one(world.arrive("t-b", "b", 16_000), Place)
    filler = one(world.arrive("t-c", "c", 17_000), Place)
    assert {other.decoder, filler.decoder} == {"d0", "d1"}
    stays = other if other.decoder == home else filler
    leaves = filler if stays is other else other
    world.handed_over(leaves)
    world.finish(leaves, 1_000)
    world.end(leaves.conversation)
    waits = world.arrive("t-a2", "a", 18_000)
    assert one(waits, Hold).reason is Reason.HELD_NO_ROOM
    # It waits for as long as moving would take, and then moves.
    world.now_s = one(waits, WakeAt).at_s
    assert 18_000 / 25_000 < world.now_s < 1.0
    moved = world.send(TimerFired())
    place = one(moved, Place)
    assert place.decoder != home
    assert (place.reason, place.transfer) == (Reason.REPLACED_NO_ROOM, TransferReason.NO_ROOM)
    assert one(moved, Release).reason is Reason.CONVERSATION_MOVED


def test_conversations_that_wait_for_each_other_do_not_wait_for_ever() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=32_000)
    for name in "abc":
        world.first_turn(f"t-{name}", name, 10_400)
    held = [world.arrive(f"t-{name}2", name, 11_000) for name in "abc"]
    assert all(one(decisions, Hold) for decisions in held)
    world.now_s = one(held[0], WakeAt).at_s
    freed = world.send(TimerFired())
    release = one(freed, Release)
    assert (release.conversation, release.reason) == ("a", Reason.CONVERSATION_MOVED)
    places = [d for d in freed if isinstance(d, Place)]
    assert [p.turn for p in places] == ["t-b2", "t-c2"]
    world.finish(places[0], 11_000)
    again = one(world.end(places[0].conversation), Place)
    assert (again.turn, again.transfer) == ("t-a2", TransferReason.NO_ROOM)


def test_conversations_that_nobody_ends_do_not_lock_the_cluster() -> None:
    world = World(headroom=0.0, protect_idle_s=50.0)
    world.cluster("d0", capacity=32_000)
    for name in "abc":
        world.first_turn(f"t-{name}", name, 10_400)
        world.now_s += 1.0
    waits = world.arrive("t-d", "d", 10_400)
    none(waits, Release)
    assert one(waits, Hold).reason is Reason.HELD_NO_ROOM
    world.now_s = one(waits, WakeAt).at_s
    assert world.now_s == 50.0  # when the longest idle, at rest since 0 s, is no longer protected
    freed = world.send(TimerFired())
    release = one(freed, Release)
    assert (release.conversation, release.reason) == ("a", Reason.IDLE_DISPLACED)
    assert one(freed, Place).turn == "t-d"
    # It was not ended: it goes on, prefilled anew, with a reason.
    world.finish(one(freed, Place), 10_400)
    world.end("d")
    assert one(world.arrive("t-a2", "a", 10_600), Place).transfer is TransferReason.KV_LOST


def test_who_waits_for_a_person_is_parked_before_who_waits_for_a_tool() -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=32_000, host=32_000)
    for name in "abc":
        world.first_turn(f"t-{name}", name, 10_400)
        world.now_s += 1.0
    world.idle("c")
    assert one(world.arrive("t-d", "d", 10_400), Park).conversation == "c"
    # One that is running, or unknown, is told nothing new.
    none(world.idle("d"), Park)
    none(world.idle("nobody"), Park)
    assert world.scheduler.counters.ignored_events["ConversationIdled"] == 2


def test_who_waits_for_a_person_is_not_displaced_the_sooner_nor_protects_the_rest() -> None:
    world = World(headroom=0.0, protect_idle_s=50.0)
    world.cluster("d0", capacity=32_000)
    for name in "abc":
        world.first_turn(f"t-{name}", name, 10_400)
        world.now_s += 1.0
    world.idle("c")
    waits = world.arrive("t-d", "d", 10_400)
    world.now_s = one(waits, WakeAt).at_s
    assert world.now_s == 50.0
    assert one(world.send(TimerFired()), Release).conversation == "a"


def test_a_prompt_the_store_would_not_load_is_never_handed_over() -> None:
    world = World()
    world.cluster("d0")
    for index in range(6):  # busy neighbours, measured to suffer from prefill beside them
        one(world.arrive(f"b{index}", f"b{index}", 5_000), Place)
    mixed = StepTimes(
        mixed_steps=100, mixed_s=20.0, mixed_kv_tokens=3_000_000, mixed_prefill_tokens=5_000
    )
    for _ in range(20):
        world.send(EngineReported(engine=EngineId("d0"), epoch=1, steps=mixed))
    assert one(world.arrive("t1", "short", 255), Place).reason is Reason.FIRST_TURN_SHORT
    assert one(world.arrive("t2", "long", 256), Place).reason is Reason.FIRST_TURN_HANDOFF


def test_a_turn_whose_last_engine_died_is_not_kept_waiting_for_long() -> None:
    world = World(max_hold_s=60.0, no_engine_hold_s=10.0)
    world.cluster("d0")
    one(world.arrive("t1", "c", 10_000), Place)
    held = world.send(EngineLost(engine=EngineId("d0"), epoch=1))
    assert one(held, Hold).reason is Reason.HELD_NO_ENGINE
    assert one(held, WakeAt).at_s == 10.0
    world.now_s = 10.0
    reject = one(world.send(TimerFired()), Reject)
    assert reject.reason is Reason.NO_ENGINE
    assert reject.retry_after_s is not None


# --- waiting and refusing -----------------------------------------------------------------------
def test_a_held_turn_is_refused_in_time_with_a_time_to_retry() -> None:
    world = World(max_hold_s=30.0, headroom=0.0)
    world.cluster("d0", capacity=32_000)
    one(world.arrive("t-a", "a", 25_000), Place)
    held = world.arrive("t-b", "b", 25_000)
    assert one(held, WakeAt).at_s == one(held, Hold).until_s == 30.0
    world.now_s = 29.9
    none(world.send(TimerFired()), Reject)
    world.now_s = 30.0
    refused = world.send(TimerFired())
    reject = one(refused, Reject)
    assert reject.reason is Reason.HELD_TOO_LONG
    assert reject.retry_after_s is not None
    assert one(refused, CloseTurn).outcome is Outcome.REJECTED


def test_the_queue_is_bounded() -> None:
    world = World(max_waiting_turns=2, headroom=0.0)
    world.cluster("d0", capacity=32_000)
    one(world.arrive("t-a", "a", 25_000), Place)
    for name in "bc":
        one(world.arrive(f"t-{name}", name, 25_000), Hold)
    reject = one(world.arrive("t-d", "d", 25_000), Reject)
    assert reject.reason is Reason.QUEUE_FULL
    assert reject.retry_after_s is not None


def test_a_prompt_no_decoder_can_hold_is_refused_for_good() -> None:
    world = World()
    world.cluster("d0", capacity=32_000)
    reject = one(world.arrive("t", "c", 32_000), Reject)
    assert (reject.reason, reject.retry_after_s) == (Reason.PROMPT_TOO_LONG, None)
    assert world.scheduler.open_conversations == 0


def test_no_engine() -> None:
    world = World()
    reject = one(world.arrive("t", "c", 100), Reject)
    assert reject.reason is Reason.NO_ENGINE
    assert reject.retry_after_s is not None


def test_a_parallel_turn_waits_for_the_first_to_bring_the_kv() -> None:
    world = World()
    world.cluster("d0", "d1")
    place = one(world.arrive("t1", "c", 10_000), Place)
    hold = one(world.arrive("t2", "c", 10_050), Hold)
    assert hold.reason is Reason.HELD_BEHIND_FIRST_TURN
    second = one(world.handed_over(place), Place)
    assert (second.turn, second.decoder, second.prefiller) == ("t2", place.decoder, None)


# --- failure -----------------------------------------------------------------------------------
def test_a_lost_decoder_costs_its_conversations_a_counted_move() -> None:
    world = World()
    world.cluster("d0", "d1")
    home = world.first_turn("t1", "c").decoder
    running = one(world.arrive("t2", "c", 10_200), Place)
    idle_home = world.first_turn("u1", "e").decoder
    decisions = world.send(EngineLost(engine=home, epoch=1))
    place = one(decisions, Place)
    assert place.turn == running.turn
    assert place.decoder != home
    assert place.plan > running.plan
    assert place.reason is Reason.REPLACED_ENGINE_LOST
    assert (place.prefiller, place.transfer) == ("p0", TransferReason.ENGINE_LOST)
    world.handed_over(place)
    world.finish(place, 10_200)
    late = one(world.arrive("u2", "e", 10_200), Place)
    assert (late.reason is Reason.REPLACED_ENGINE_LOST) == (idle_home == home)
    assert world.scheduler.counters.moves[TransferReason.ENGINE_LOST] == 1 + (idle_home == home)
    assert one(world.arrive("t3", "c", 10_400), Place).reason is Reason.PINNED


def test_a_lost_prefiller_hands_its_turns_to_the_decoder() -> None:
    world = World()
    world.cluster("d0")
    place = one(world.arrive("t1", "c", 10_000), Place)
    again = one(world.send(EngineLost(engine=EngineId("p0"), epoch=1)), Place)
    assert (again.decoder, again.prefiller, again.transfer) == ("d0", None, None)
    assert again.plan > place.plan
    assert world.scheduler.counters.fallbacks == {Fallback.PREFILLER_LOST: 1}
    world.finish(again, 10_000)
    assert world.scheduler.counters.transfers == {}


def test_a_lost_prefiller_lets_go_of_those_that_waited_for_its_room() -> None:
    world = World(headroom=0.0)
    world.engine("p0", Tier.PREFILL, capacity=16_000)
    world.engine("d0", capacity=100_000)
    one(world.arrive("t1", "a", 12_000), Place)
    assert one(world.arrive("t2", "b", 10_000), Hold).reason is Reason.HELD_NO_ROOM
    lost = world.send(EngineLost(engine=EngineId("p0"), epoch=1))
    places = {d.turn: d.prefiller for d in lost if isinstance(d, Place)}
    assert places == {"t1": None, "t2": None}


def test_a_late_acknowledgement_is_a_counted_fallback_not_a_failure() -> None:
    world = World()
    world.cluster("d0")
    place = one(world.arrive("t1", "c", 10_000), Place)
    world.send(PrefillFinished(turn=place.turn, plan=place.plan, prompt_tokens=10_000))
    none(world.handed_over(place, fallback=Fallback.ACK_LATE), Place)
    world.finish(place, 10_000, cached_tokens=0)
    counters = world.scheduler.counters
    assert counters.fallbacks == {Fallback.ACK_LATE: 1}
    assert counters.transfers == {}
    assert counters.shortfall_turns == 0  # it was not expected any more


def test_a_shortfall_of_cached_tokens_is_counted() -> None:
    world = World()
    world.cluster("d0")
    place = one(world.arrive("t1", "c", 10_000), Place)
    world.handed_over(place)
    world.finish(place, 10_000, cached_tokens=256)
    counters = world.scheduler.counters
    assert counters.shortfall_turns == 1
    assert counters.shortfall_tokens == 10_000 - 16 - 1 - 256


def test_a_draining_engine_is_left_at_the_next_turn() -> None:
    world = World()
    world.cluster("d0", "d1")
    home = world.first_turn("t1", "c").decoder
    running = one(world.arrive("t2", "c", 10_200), Place)
    none(world.send(EngineDraining(engine=home, epoch=1)), Place)
    world.finish(running, 10_200, cached_tokens=10_100)
    moved = world.arrive("t3", "c", 10_400)
    place = one(moved, Place)
    assert place.decoder != home
    assert place.transfer is TransferReason.ENGINE_DRAINING
    assert one(moved, Release).engine == home
    assert all(one(world.arrive(f"n{i}", f"n{i}", 500), Place).decoder != home for i in range(4))


def test_the_last_engine_keeps_serving_its_conversations_while_it_drains() -> None:
    world = World()
    world.cluster("d0")
    world.first_turn("t1", "c")
    world.send(EngineDraining(engine=EngineId("d0"), epoch=1))
    assert one(world.arrive("t2", "c", 10_200), Place).decoder == "d0"
    assert one(world.arrive("n", "new", 500), Hold).reason is Reason.HELD_NO_ENGINE


def test_a_restarted_engine_has_lost_its_kv() -> None:
    world = World()
    world.cluster("d0")
    world.first_turn("t1", "c")
    world.engine("d0", epoch=2)
    place = one(world.arrive("t2", "c", 10_200), Place)
    assert place.reason is Reason.REPLACED_ENGINE_LOST
    world.send(EngineLost(engine=EngineId("d0"), epoch=1))  # late news of the first incarnation
    assert world.scheduler.engines[EngineId("d0")].epoch == 2


def test_failed_turns_are_tried_at_home_then_elsewhere_then_given_up() -> None:
    world = World(max_attempts=3)
    world.cluster("d0", "d1")
    home = world.first_turn("t1", "c").decoder
    place = one(world.arrive("t2", "c", 10_200), Place)
    seen = []
    for _ in range(3):
        seen.append(place.decoder)
        decisions = world.send(
            TurnFailed(turn=place.turn, plan=place.plan, engine=place.decoder, retryable=True)
        )
        places = [d for d in decisions if isinstance(d, Place)]
        if places:
            place = places[0]
    assert seen[0] == seen[1] == home
    assert seen[2] != home
    assert one(decisions, CloseTurn).outcome is Outcome.FAILED


def test_what_has_reached_the_client_is_not_run_again() -> None:
    world = World()
    world.cluster("d0")
    place = one(world.arrive("t1", "c", 10_000), Place)
    world.handed_over(place)
    decisions = world.send(
        TurnFailed(turn=place.turn, plan=place.plan, engine=place.decoder, retryable=False)
    )
    none(decisions, Place)
    assert one(decisions, CloseTurn).outcome is Outcome.FAILED


@pytest.mark.parametrize("stage", ["waiting", "prefill", "handoff", "decode"])
def test_an_abort_at_every_stage_leaves_nothing_behind(stage: str) -> None:
    world = World(headroom=0.0)
    world.cluster("d0", capacity=32_000)
    if stage == "waiting":
        one(world.arrive("t0", "z", 25_000), Place)
    decisions = world.arrive("t1", "c", 10_000)
    if stage != "waiting":
        place = one(decisions, Place)
        if stage != "prefill":
            world.send(PrefillFinished(turn=place.turn, plan=place.plan, prompt_tokens=10_000))
        if stage == "decode":
            world.handed_over(place)
    closed = one(world.send(TurnAborted(turn=TurnId("t1"))), CloseTurn)
    assert closed.outcome is Outcome.ABORTED
    world.end("c")
    prefiller = world.scheduler.engines[EngineId("p0")]
    decoder = world.scheduler.engines[EngineId("d0")]
    busy = 25_600 if stage == "waiting" else 0
    assert decoder.held_tokens <= busy
    assert (prefiller.held_tokens > 0) == (stage == "waiting")


# --- life cycle ----------------------------------------------------------------------------------
def test_conversations_that_fall_silent_are_ended() -> None:
    world = World(idle_timeout_s=100.0)
    world.cluster("d0")
    world.first_turn("t1", "c")
    world.now_s = 99.0
    none(world.send(TimerFired()), Release)
    world.now_s = 100.0
    assert one(world.send(TimerFired()), Release).reason is Reason.CONVERSATION_EXPIRED
    assert world.scheduler.open_conversations == 0


def test_an_end_waits_for_the_turn_that_runs() -> None:
    world = World()
    world.cluster("d0")
    place = one(world.arrive("t1", "c", 10_000), Place)
    none(world.end("c"), Release)
    world.handed_over(place)
    one(world.finish(place, 10_000), Release)


def test_a_pin_survives_a_restart_of_the_scheduler() -> None:
    world = World()
    world.cluster("d0", "d1")
    hint = PlacementHint(engine=EngineId("d1"), epoch=1, context_tokens=9_000, turns=3, transfers=1)
    place = one(
        world.send(
            TurnArrived(
                turn=TurnId("t4"),
                conversation=ConversationId("c"),
                prompt_tokens=9_100,
                hint=hint,
            )
        ),
        Place,
    )
    assert (place.decoder, place.prefiller, place.turn_index) == ("d1", None, 4)


def test_a_pin_to_a_former_incarnation_is_prefilled_again() -> None:
    world = World()
    world.cluster("d0")
    world.engine("d1", epoch=2)
    hint = PlacementHint(engine=EngineId("d1"), epoch=1, context_tokens=9_000, turns=3, transfers=1)
    place = one(
        world.send(
            TurnArrived(
                turn=TurnId("t4"),
                conversation=ConversationId("c"),
                prompt_tokens=9_100,
                hint=hint,
            )
        ),
        Place,
    )
    assert place.reason is Reason.REPLACED_ENGINE_LOST
    assert place.transfer is TransferReason.ENGINE_LOST


# --- baselines -----------------------------------------------------------------------------------
def test_round_robin_goes_around_whatever_the_conversation() -> None:
    world = World("round_robin")
    world.cluster("d0", "d1")
    decoders = []
    for index in range(6):
        place = one(world.arrive(f"t{index}", "c", 1_000), Place)
        assert place.prefiller is None
        decoders.append(place.decoder)
        world.finish(place, 1_000)
    assert decoders == ["d0", "d1", "p0", "d0", "d1", "p0"]


def test_collocated_is_sticky_and_takes_the_least_kv() -> None:
    world = World("collocated")
    world.cluster("d0", "d1")
    homes = [world.first_turn(f"t{i}", f"c{i}", 10_000).decoder for i in range(6)]
    assert sorted(homes) == ["d0", "d0", "d1", "d1", "p0", "p0"]
    for index, home in enumerate(homes):
        assert one(world.arrive(f"u{index}", f"c{index}", 10_200), Place).decoder == home
    assert world.scheduler.counters.transfers == {}
