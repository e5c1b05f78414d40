"""The prefill tier takes conversations, or takes no more: what a review changes, and what not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from chaos import joined
from test_tails import Decoding
from world import World, none, one

from conserve_serving.core.decisions import CloseTurn, Decision, Place
from conserve_serving.core.events import EngineDraining, EngineLost, EngineReported, StepTimes
from conserve_serving.core.policies.advantage import seen_decoding
from conserve_serving.core.policies.conserve import ConServe
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.types import EngineId, Outcome, Reason, Tier, TierMode
from conserve_serving.core.views import EngineView, LoadView


class Told(ConServe):
    """ConServe whose prefill tier does what the test says; remembers what it was asked about."""

    def __init__(self) -> None:
        super().__init__(SchedulerSettings())
        self.hosting = False
        self.asked: list[EngineId] = []

    def prefill_tier_hosts(
        self, engines: Sequence[EngineView], load: LoadView, *, hosting: bool
    ) -> bool:
        self.asked = [engine.id for engine in engines]
        return self.hosting


def world() -> tuple[World, Told]:
    policy = Told()
    return World(policy, headroom=0.0), policy


def review(at: World, policy: Told, *, hosting: bool, engine: str = "p0") -> list[Decision]:
    policy.hosting = hosting
    at.now_s += at.settings.review_interval_s
    return at.send(EngineReported(engine=EngineId(engine), epoch=1))


def test_who_waits_for_room_is_placed_once_the_prefill_tier_hosts() -> None:
    at, policy = world()
    at.engine("p0", Tier.PREFILL)
    at.engine("d0", capacity=20_000)
    review(at, policy, hosting=False)
    at.arrive("t0", "a", 15_000)
    none(at.arrive("t1", "b", 15_000), Place)
    place = one(review(at, policy, hosting=True), Place)
    assert (place.turn, place.decoder, place.reason) == ("t1", "p0", Reason.FIRST_TURN_COLLOCATED)


def test_a_conversation_goes_on_where_no_other_is_taken_any_more() -> None:
    at, policy = world()
    at.engine("p0", Tier.PREFILL)
    review(at, policy, hosting=True)
    assert at.first_turn("t0", "a", 50_000).decoder == "p0"
    at.engine("d0", capacity=20_000)
    review(at, policy, hosting=False)
    # Longer than any engine that takes conversations now can hold.
    place = one(at.arrive("t1", "a", 51_000), Place)
    assert (place.decoder, place.reason) == ("p0", Reason.PINNED)
    at.finish(place, 51_000, cached_tokens=50_000)
    at.send(EngineLost(engine=EngineId("d0"), epoch=1))
    assert one(at.arrive("t2", "a", 52_000), Place).decoder == "p0"
    assert one(at.arrive("t3", "b", 1_000), CloseTurn).outcome is Outcome.REJECTED  # nobody's home


def test_a_turn_without_a_home_waits_for_no_room_where_none_is_given_any_more() -> None:
    at, policy = world()
    at.engine("p0", Tier.PREFILL, capacity=20_000)
    review(at, policy, hosting=True)
    for name in ("d0", "d1"):
        at.engine(name, capacity=20_000)
    assert at.first_turn("t0", "c", 10_000).decoder == "d0"
    running = one(at.arrive("r1", "x", 15_000), Place)
    assert running.decoder == "d1"
    at.handed_over(running)
    assert one(at.arrive("r2", "y", 14_000), Place).decoder == "p0"
    at.send(EngineLost(engine=EngineId("d0"), epoch=1))
    none(at.arrive("t1", "c", 12_000), Place)
    waiting = {name: at.scheduler.engines[EngineId(name)].waiting for name in ("p0", "d1")}
    assert list(waiting["p0"]) == ["t1"]
    review(at, policy, hosting=False)
    at.first_turn("t2", "z", 1_000)
    assert (list(waiting["p0"]), list(waiting["d1"])) == ([], ["t1"])


def test_a_prompt_waits_for_a_prefiller_and_not_for_the_growth_of_those_it_hosts() -> None:
    at = World("conserve", tier_mode=TierMode.HOSTING)
    at.engine("p0", Tier.PREFILL, capacity=30_000)
    at.first_turn("b0", "b", 10_000)
    at.finish(one(at.arrive("b1", "b", 18_000), Place), 18_000)  # so they grow
    at.end("b")
    at.first_turn("a0", "a", 10_000)
    at.engine("d0")
    before = one(at.arrive("t0", "x", 15_000), Place)
    assert (before.decoder, before.prefiller) == ("d0", "p0")
    none(at.arrive("t1", "y", 15_000), Place)
    place = one(at.handed_over(before), Place)
    assert (place.turn, place.decoder, place.prefiller) == ("t1", "d0", "p0")


def test_engines_that_leave_are_not_judged_by() -> None:
    at, policy = world()
    at.cluster("d0", "d1")
    at.send(EngineDraining(engine=EngineId("d1"), epoch=1))
    review(at, policy, hosting=False)
    assert policy.asked == ["p0", "d0"]


@pytest.mark.parametrize("engines", [("p0",), ("d0",), ("p0", "d0"), ()])
def test_a_review_needs_neither_both_tiers_nor_anything_seen(engines: tuple[str, ...]) -> None:
    at = World("conserve_plus", tier_mode=TierMode.AUTO, output_reserve_tokens=0)
    for name in engines:
        at.send(joined(name, Tier.PREFILL if name[0] == "p" else Tier.DECODE))
    at.scheduler._placer.review()
    for name in engines:
        at.send(EngineReported(engine=EngineId(name), epoch=1, steps=StepTimes()))
    if engines == ("p0",):
        assert one(at.arrive("t0", "a", 1_000), Place).decoder == "p0"


def test_a_large_cluster_is_judged_by_a_few_that_have_been_seen() -> None:
    engines = [Decoding(0.010), *(Decoding(0.010, bias=1.0) for _ in range(1_000))]
    assert len(seen_decoding(engines)) == 16  # type: ignore[arg-type] # of a view it needs one
