"""Later turns that a policy sends elsewhere: remote appends, conversations that move."""

from __future__ import annotations

import pytest
from chaos import SPEEDS
from world import World, none, one

from conserve_serving.core import ledger
from conserve_serving.core.decisions import CloseTurn, Place, Release
from conserve_serving.core.events import (
    EngineLost,
    EngineReported,
    PrefillFinished,
    StepTimes,
    TimerFired,
    TurnAborted,
    TurnFailed,
)
from conserve_serving.core.load import ObservedLoad
from conserve_serving.core.policies.advantage import should_host, step_s
from conserve_serving.core.policies.common import Defaults
from conserve_serving.core.policies.conserve import ConServe
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.types import (
    ConversationId,
    EngineId,
    EngineSpeeds,
    Fallback,
    Reason,
    Tier,
    TierMode,
    TransferReason,
)
from conserve_serving.core.views import EngineView, LoadView, Tail, TailAction, TurnView


class Told(ConServe):
    """ConServe that does with later turns what the test says."""

    tail = Tail.ASKED

    def __init__(self, action: TailAction) -> None:
        super().__init__(SchedulerSettings())
        self.action = action

    def tail_place(
        self,
        turn: TurnView,
        home: EngineView,
        prefiller: EngineView | None,
        other: EngineView | None,
        load: LoadView,
    ) -> TailAction:
        return self.action


def world(action: TailAction, *, host: int = 0, copies: bool = True) -> tuple[World, Place]:
    """Two decoders; conversation ``c`` has had a first turn of 10,000 tokens."""
    made = World(Told(action), copies=copies)
    made.cluster("d0", "d1", host=host)
    return made, made.first_turn("t0", "c")


def books(at: World, engine: str) -> tuple[int, int, int]:
    state = at.scheduler.engines[EngineId(engine)]
    return state.resident_tokens, state.reserved_tokens, state.parked_tokens


def lose(at: World, engine: str) -> list[object]:
    return list(at.send(EngineLost(engine=EngineId(engine), epoch=1)))


def test_an_append_is_prefilled_remotely_and_the_conversation_stays() -> None:
    at, first = world(TailAction.REMOTE)
    place = one(at.arrive("t1", "c", 14_100), Place)
    assert (place.decoder, place.prefiller) == (first.decoder, "p0")
    assert (place.source, place.transfer) == (first.decoder, TransferReason.APPEND)
    assert (place.reason, place.expected_cached_tokens) == (Reason.APPEND_REMOTE, 14_100)
    prefiller = at.scheduler.engines[EngineId("p0")]
    assert prefiller.prefill_backlog_tokens == prefiller.tail_backlog_tokens == 14_100 - 10_112
    at.send(PrefillFinished(turn=place.turn, plan=place.plan, prompt_tokens=14_100))
    assert prefiller.egress_tokens == 14_100 - 10_112  # only what is new crosses the link
    none(at.handed_over(place), Release)
    assert prefiller.held_tokens == prefiller.egress_tokens == 0
    at.finish(place, 14_100, cached_tokens=14_099)
    conversation = at.scheduler.conversation(ConversationId("c"))
    assert conversation is not None
    assert conversation.transfers == 2
    assert conversation.context_tokens == 14_208
    assert at.scheduler.counters.transfers[TransferReason.APPEND] == 1
    assert at.scheduler.counters.shortfall_turns == 0


def test_without_copies_a_prefiller_computes_what_it_lacks() -> None:
    at, _ = world(TailAction.REMOTE, copies=False)
    place = one(at.arrive("t1", "c", 14_100), Place)
    assert (place.prefiller, place.source) == ("p0", None)


def test_an_append_whose_hand_off_fails_is_computed_at_home() -> None:
    at, first = world(TailAction.REMOTE)
    place = one(at.arrive("t1", "c", 14_100), Place)
    at.handed_over(place, fallback=Fallback.ACK_LATE)
    home = at.scheduler.engines[first.decoder]
    assert home.prefill_backlog_tokens == 14_100 - 10_112
    at.finish(place, 14_100, cached_tokens=10_100)
    assert at.scheduler.counters.shortfall_turns == 0  # its context was there, and no more expected


def test_an_append_survives_the_loss_of_its_prefiller() -> None:
    at, first = world(TailAction.REMOTE)
    at.arrive("t1", "c", 14_100)
    again = one(lose(at, "p0"), Place)  # type: ignore[arg-type]
    assert (again.decoder, again.prefiller, again.source) == (first.decoder, None, None)
    assert (again.reason, again.expected_cached_tokens) == (Reason.PINNED, 10_112)


@pytest.mark.parametrize("parked", [False, True])
def test_a_conversation_moves_with_its_kv_and_is_released_once_that_has_arrived(
    parked: bool,
) -> None:
    at, first = world(TailAction.MOVE, host=200_000)
    old = first.decoder
    if parked:
        at.scheduler.policy.action = TailAction.STAY  # type: ignore[attr-defined] # Told
        state = at.scheduler.engines[old]
        conversation = at.scheduler.conversation(ConversationId("c"))
        assert conversation is not None
        ledger.park(state, [conversation])
        at.scheduler.policy.action = TailAction.MOVE  # type: ignore[attr-defined]
    decisions = at.arrive("t1", "c", 10_500)
    place = one(decisions, Place)
    none(decisions, Release)
    assert place.decoder != old
    assert (place.source, place.prefiller) == (old, None)
    assert (place.transfer, place.reason) == (TransferReason.LOAD, Reason.MOVED_FOR_LOAD)
    assert place.expected_cached_tokens == 10_112
    assert books(at, old) == ((0, 0, 10_112) if parked else (0, 10_112, 0))  # until it is copied
    release = one(at.handed_over(place), Release)
    assert (release.engine, release.tokens) == (old, 10_112)
    assert release.reason is Reason.CONVERSATION_MOVED
    assert books(at, old) == (0, 0, 0)
    at.finish(place, 10_500, cached_tokens=10_100)
    assert books(at, place.decoder) == (10_608, 0, 0)
    counters = at.scheduler.counters
    assert counters.moves == {TransferReason.LOAD: 1}
    assert counters.transfers == {TransferReason.FIRST_TURN: 1, TransferReason.LOAD: 1}
    assert counters.shortfall_turns == 0


@pytest.mark.parametrize("how", ["aborted", "failed", "new engine lost"])
def test_a_move_that_is_given_up_leaves_the_conversation_where_it_was(how: str) -> None:
    at, first = world(TailAction.MOVE)
    place = one(at.arrive("t1", "c", 10_500), Place)
    at.scheduler.policy.action = TailAction.STAY  # type: ignore[attr-defined] # Told
    if how == "aborted":
        decisions = at.send(TurnAborted(turn=place.turn))
        one(decisions, CloseTurn)
    elif how == "failed":
        event = TurnFailed(turn=place.turn, plan=place.plan, engine=place.decoder, retryable=True)
        again = one(at.send(event), Place)
        assert (again.decoder, again.source) == (first.decoder, None)
        assert again.expected_cached_tokens == 10_112
    else:
        again = one(lose(at, place.decoder), Place)  # type: ignore[arg-type]
        assert (again.decoder, again.expected_cached_tokens) == (first.decoder, 10_112)
    assert books(at, first.decoder)[0] == 10_112


@pytest.mark.parametrize("how", ["aborted", "failed"])
def test_what_was_copied_stays_when_the_turn_comes_to_nothing_afterwards(how: str) -> None:
    at, _ = world(TailAction.MOVE)
    place = one(at.arrive("t1", "c", 10_500), Place)
    at.handed_over(place)
    assert books(at, place.decoder) == (10_112, 10_768 - 10_112, 0)
    at.scheduler.policy.action = TailAction.STAY  # type: ignore[attr-defined] # Told
    if how == "aborted":
        one(at.send(TurnAborted(turn=place.turn)), CloseTurn)
        assert books(at, place.decoder) == (10_112, 0, 0)
    else:
        event = TurnFailed(turn=place.turn, plan=place.plan, engine=place.decoder, retryable=True)
        again = one(at.send(event), Place)
        assert (again.decoder, again.source) == (place.decoder, None)
        assert again.expected_cached_tokens == 10_112


def test_a_conversation_that_moved_has_appended_no_more_than_is_new() -> None:
    stayed, moved = (world(action)[0] for action in (TailAction.STAY, TailAction.MOVE))
    for at in (stayed, moved):
        place = one(at.arrive("t1", "c", 10_500), Place)
        if place.source is not None:
            at.handed_over(place)
        at.finish(place, 10_500, cached_tokens=10_100)
    loads = [at.scheduler._do.load for at in (stayed, moved)]
    assert loads[0].tail_new_tokens == loads[1].tail_new_tokens


def test_a_move_that_failed_is_not_tried_again() -> None:
    at, first = world(TailAction.MOVE)
    place = one(at.arrive("t1", "c", 10_500), Place)
    event = TurnFailed(turn=place.turn, plan=place.plan, engine=place.decoder, retryable=True)
    again = one(at.send(event), Place)
    assert (again.decoder, again.source) == (first.decoder, None)


def test_a_source_that_is_lost_costs_the_whole_prefill_and_no_more() -> None:
    at, first = world(TailAction.MOVE)
    place = one(at.arrive("t1", "c", 10_500), Place)
    again = one(lose(at, first.decoder), Place)  # type: ignore[arg-type]
    assert (again.decoder, again.source, again.transfer) == (place.decoder, None, None)
    assert again.expected_cached_tokens == 0
    assert at.scheduler.counters.fallbacks == {Fallback.SOURCE_LOST: 1}
    at.finish(again, 10_500)
    assert books(at, place.decoder) == (10_608, 0, 0)


def test_a_copy_that_fails_is_prefilled_anew() -> None:
    at, first = world(TailAction.MOVE)
    place = one(at.arrive("t1", "c", 10_500), Place)
    one(at.handed_over(place, fallback=Fallback.STORE_FULL), Release)
    assert at.scheduler.engines[place.decoder].prefill_backlog_tokens == 10_500
    at.finish(place, 10_500)
    assert at.scheduler.counters.shortfall_turns == 0
    assert books(at, first.decoder) == (0, 0, 0)


def test_nothing_moves_without_copies_nor_under_a_running_turn() -> None:
    at, first = world(TailAction.MOVE, copies=False)
    assert one(at.arrive("t1", "c", 10_500), Place).decoder == first.decoder
    at, first = world(TailAction.MOVE)
    one(at.arrive("t1", "c", 10_500), Place)
    at.handed_over(one(at.arrive("t9", "x", 9_000), Place))
    second = at.arrive("t2", "c", 10_600)
    none(second, Place)  # the copy is under way: it waits for that


def test_a_conversation_whose_home_is_full_takes_its_kv_along() -> None:
    at = World("collocated", copies=True, headroom=0.0)
    at.engine("d0", capacity=30_000)
    at.first_turn("t0", "c", 10_000)
    at.arrive("t1", "x", 19_000)  # runs on: d0 is full
    at.engine("d1", capacity=30_000)
    none(at.arrive("t2", "c", 15_000), Place)
    at.now_s += 0.1  # longer than the copy takes
    place = one(at.send(TimerFired()), Place)
    assert (place.decoder, place.source) == ("d1", "d0")
    assert (place.transfer, place.reason) == (TransferReason.NO_ROOM, Reason.REPLACED_NO_ROOM)
    assert place.expected_cached_tokens == 10_112
    assert one(at.handed_over(place), Release).engine == "d0"


def test_a_rewritten_conversation_has_nothing_to_take_along() -> None:
    at, first = world(TailAction.MOVE)
    place = one(at.arrive("t1", "c", 10_500, reusable_tokens=0), Place)
    assert (place.decoder, place.source) == (first.decoder, None)


def test_a_prediction_takes_the_place_of_what_was_observed() -> None:
    at = World("per_turn")
    at.cluster("d0")
    one(at.arrive("t0", "c", 10_000, predicted_output_tokens=5_000), Place)
    assert at.scheduler.engines[EngineId("d0")].reserved_tokens == 15_008


def test_an_oracle_keeps_room_for_all_that_will_come() -> None:
    at = World("oracle")
    at.engine("d0", capacity=100_000)
    at.engine("d1", capacity=100_000)
    one(at.arrive("t0", "a", 10_000, foreseen_tokens=90_000), Place)
    place = one(at.arrive("t1", "b", 20_000, foreseen_tokens=30_000), Place)
    assert place.decoder == "d1"
    # By what is held now d0 has the most free KV; by what is foreseen neither has room for it.
    none(at.arrive("t2", "e", 80_000, foreseen_tokens=80_000), Place)


def test_ten_per_cent_wrong_turns_a_tenth_of_the_decisions_round() -> None:
    remote = 0
    right, wrong = World("per_turn"), World("per_turn_10_wrong")
    for at in (right, wrong):
        at.cluster("d0", capacity=100_000_000)
    for index in range(1_000):
        places = [one(at.arrive(f"t{index}", f"c{index}", 8_000), Place) for at in (right, wrong)]
        remote += (places[0].prefiller is None) != (places[1].prefiller is None)
        for at, place in zip((right, wrong), places, strict=True):
            if place.prefiller is not None:
                at.handed_over(place)
            at.finish(place, 8_000)
    assert 70 < remote < 130


FAST = EngineSpeeds(prefill_tokens_per_s=50_000.0, decode_step_s=0.008)
# Decodes well and prefills badly: dedicating the fast engine to prefill pays.
GOOD_DECODER = EngineSpeeds(prefill_tokens_per_s=4_000.0, decode_step_s=0.008)
# Half as good at both: nothing to be gained by sending anybody away.
HALF = EngineSpeeds(
    prefill_tokens_per_s=25_000.0, decode_step_s=0.016, decode_step_s_per_kv_token=4e-7
)


# Equal, and prefill disturbs decodes: dedicating would spare the tail a little, and let first turns
# queue behind one prefiller.
EQUAL = EngineSpeeds(
    prefill_tokens_per_s=25_000.0,
    decode_step_s=0.010,
    decode_step_s_per_kv_token=2e-8,
    mixed_slowdown=1.25,
)


@pytest.mark.parametrize(
    ("prefiller", "decoder", "hosts"),
    [(FAST, GOOD_DECODER, False), (FAST, HALF, True), (EQUAL, EQUAL, True)],
)
def test_the_prefill_tier_hosts_where_conversations_are_slowed_down_less(
    prefiller: EngineSpeeds, decoder: EngineSpeeds, hosts: bool
) -> None:
    at = World("conserve_plus", tier_mode=TierMode.AUTO, copies=True)
    at.engine("p0", Tier.PREFILL, speeds=prefiller, capacity=1_000_000)
    for name in ("d0", "d1", "d2"):
        at.engine(name, speeds=decoder, capacity=1_000_000)
    for index in range(30):
        place = one(at.arrive(f"t{index}", f"c{index}", 12_000), Place)
        if place.prefiller is not None:
            at.handed_over(place)
        at.finish(place, 12_000, output_tokens=300)
        at.end(f"c{index}")
        at.now_s += 1.0
        at.send(EngineReported(engine=EngineId("p0"), epoch=1, steps=StepTimes()))
    used = {one(at.arrive(f"u{index}", f"v{index}", 12_000), Place).decoder for index in range(16)}
    assert ("p0" in used) is hosts


def test_the_turn_one_valve_opens_while_the_prefill_tier_is_behind() -> None:
    at = World("conserve_plus", copies=True)
    at.engine("p0", Tier.PREFILL, speeds=SPEEDS, capacity=1_000_000)
    at.engine("d0", speeds=SPEEDS, capacity=1_000_000)
    places = [one(at.arrive(f"t{i}", f"c{i}", 12_000), Place) for i in range(5)]
    reasons = [place.reason for place in places]
    # An idle decoder is done sooner than a hand-off. Then the prefiller, though it is behind, as
    # long as the wait is shorter than the delay to those that run on the decoder.
    assert reasons[0] is Reason.FIRST_TURN_DEFLECTED
    assert reasons[1] is Reason.FIRST_TURN_HANDOFF
    world_of_greed = World("per_turn_greedy", copies=True)
    world_of_greed.engine("p0", Tier.PREFILL, speeds=SPEEDS, capacity=1_000_000)
    world_of_greed.engine("d0", speeds=SPEEDS, capacity=1_000_000)
    greedy = [one(world_of_greed.arrive(f"t{i}", f"c{i}", 12_000), Place) for i in range(5)]
    local = [sum(p.prefiller is None for p in found) for found in (places, greedy)]
    assert local[0] < local[1]


def test_defaults_stay_where_they_are() -> None:
    assert Defaults.tail is Tail.PINNED
    assert World("collocated").scheduler.policy.hands_over is False


class Decoding:
    """An engine as a policy sees it, with figures of the test's own."""

    def __init__(self, step_s: float, *, bias: float | None = None) -> None:
        self._step_s, self._bias = step_s, bias

    def decode_step_s(self, kv_tokens: float) -> float:
        return self._step_s

    def decode_bias(self, kv_tokens: float) -> float | None:
        return self._bias


def test_an_engine_that_never_decoded_is_judged_as_its_peers_turned_out() -> None:
    slow = Decoding(0.020, bias=2.0)  # it was believed to take 0.010
    unseen = Decoding(0.010)
    assert step_s(unseen, 1_000.0, [slow, unseen]) == pytest.approx(0.020)  # type: ignore[arg-type,list-item] # of a view's members it needs two
    assert step_s(slow, 1_000.0, [slow, unseen]) == 0.020  # type: ignore[arg-type,list-item]
    assert step_s(unseen, 1_000.0, [unseen]) == 0.010  # type: ignore[arg-type,list-item]


@pytest.mark.parametrize("hosting", [True, False])
def test_without_engines_nothing_is_changed(hosting: bool) -> None:
    assert should_host([], ObservedLoad(256), hosting_now=hosting) is hosting
