"""What is believed of the usual conversation, from the first minutes to the steady state."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from itertools import repeat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import World, one

from conserve_serving.core.decisions import Place
from conserve_serving.core.events import TurnAborted
from conserve_serving.core.load import ObservedLoad

OUTPUT_TOKENS = 100
NEW_TOKENS = 50


def play(
    load: ObservedLoad,
    lengths: Iterator[int],
    source: random.Random,
    *,
    until_s: float,
    gap_s: float = 0.0,
    turn_s: float = 1.0,
    rate_per_s: float = 1.0,
) -> Iterator[float]:
    """Conversations of so many turns arrive by chance; gaps between turns are exponential. Nobody
    says when one has ended. Yields the time, every second."""
    waiting: list[tuple[float, int, int, int, bool]] = []  # time, tie, turns behind, of, finishes
    tie = 0

    def push(at_s: float, behind: int, turns: int, *, finishes: bool) -> None:
        nonlocal tie
        tie += 1
        heapq.heappush(waiting, (at_s, tie, behind, turns, finishes))

    push(source.expovariate(rate_per_s), 0, next(lengths), finishes=False)
    said_s = 0.0
    while waiting and waiting[0][0] <= until_s:
        now_s, _, behind, turns, finishes = heapq.heappop(waiting)
        while said_s < now_s:
            yield said_s
            said_s += 1.0
        if not finishes:
            if behind:
                load.went_on(behind)
            else:
                load.arrived(now_s)
                push(now_s + source.expovariate(rate_per_s), 0, next(lengths), finishes=False)
            push(now_s + turn_s, behind, turns, finishes=True)
            continue
        load.observe(
            turns=behind,
            prompt_tokens=1_000,
            new_tokens=NEW_TOKENS if behind else 1_000,
            output=OUTPUT_TOKENS,
        )
        if behind + 1 < turns:
            after_s = source.expovariate(1.0 / gap_s) if gap_s else 0.0
            push(now_s + after_s, behind + 1, turns, finishes=False)


class Counted(ObservedLoad):
    """Counts what it is told: the first turns and the later ones that have finished."""

    first = later = 0

    def observe(self, *, turns: int, prompt_tokens: int, new_tokens: int, output: int) -> None:
        self.first += not turns
        self.later += bool(turns)
        super().observe(
            turns=turns, prompt_tokens=prompt_tokens, new_tokens=new_tokens, output=output
        )


def endlessly(draw: Callable[[], int]) -> Iterator[int]:
    while True:
        yield draw()


def test_before_anything_was_seen() -> None:
    load = ObservedLoad(256)
    assert load.first_prompt_tokens == 8192
    assert load.tail_turns == pytest.approx(1.0, abs=0.05)
    assert load.tail_new_tokens == 0.0
    assert load.turn_output_tokens == pytest.approx(256)
    assert load.conversations_per_s == 0.0


def test_conversations_that_have_not_ended_are_not_taken_for_short() -> None:
    """After a minute of conversations that take up to 100 s: what has finished, over those that
    began, is a third of what they will have."""
    load, source = Counted(256), random.Random(1)
    lengths = endlessly(lambda: source.choice((2, 20)))
    for _ in play(load, lengths, source, until_s=60.0, turn_s=5.0):
        pass
    assert load.later / load.first < 4.0
    assert 6.0 < load.tail_turns < 30.0  # 10 in the end
    assert load.output_tokens == pytest.approx(OUTPUT_TOKENS * (1 + load.tail_turns), rel=0.2)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_in_the_steady_state_the_means_are_those_of_the_conversations(
    kinds: list[int], seed: int
) -> None:
    load, source = ObservedLoad(256), random.Random(seed)
    lengths = endlessly(lambda: source.choice(kinds))
    believed = [
        load.tail_turns
        for now_s in play(load, lengths, source, until_s=1_400.0, gap_s=1.0)
        if now_s > 600
    ]
    tails = sum(kinds) / len(kinds) - 1.0
    assert sum(believed) / len(believed) == pytest.approx(tails, rel=0.3, abs=0.2)
    assert max(believed) < 1.6 * tails + 0.5
    assert load.tail_new_tokens == pytest.approx(NEW_TOKENS * load.tail_turns, rel=0.05, abs=0.5)
    assert load.turn_output_tokens == pytest.approx(OUTPUT_TOKENS, rel=0.03)
    assert load.context_tokens == pytest.approx(1_050, rel=0.1)


@pytest.mark.parametrize(("before", "after"), [(50, 3), (5, 40)])
def test_a_workload_that_changes_is_noticed(before: int, after: int) -> None:
    """Ages that nobody reaches any more kept what was known, and a share still got there."""
    load, source = ObservedLoad(256), random.Random(2)
    for turns in (before, after):
        for _ in play(load, repeat(turns), source, until_s=2_200.0, gap_s=0.5):
            pass
    assert load.tail_turns == pytest.approx(after - 1, rel=0.1)


def test_bursts_do_not_stretch_conversations() -> None:
    """Thousands that go on at once, long after the first of them were counted."""
    load, source = ObservedLoad(256), random.Random(3)
    most = 0.0
    for _ in range(3):
        lengths = endlessly(lambda: source.choice((2, 10)))
        for now_s in play(load, lengths, source, until_s=120.0, gap_s=10.0, rate_per_s=40.0):
            if now_s > 60.0:
                most = max(most, load.tail_turns)
    assert most < 8.0  # 5 in the mean


def test_one_conversation_that_never_ends_is_long_and_not_endless() -> None:
    load = ObservedLoad(256)
    for turns in range(9_000):
        if turns:
            load.went_on(turns)
        load.observe(turns=turns, prompt_tokens=1_000, new_tokens=50, output=OUTPUT_TOKENS)
    assert 100 < load.tail_turns < 4_096


def test_looking_changes_nothing() -> None:
    looked, other = ObservedLoad(256), ObservedLoad(256)
    for load in (looked, other):
        for _ in range(10):
            load.observe(turns=0, prompt_tokens=1_000, new_tokens=1_000, output=10)
            if load is looked:
                assert load.tail_turns >= 0.0
            load.went_on(1)
    assert looked.tail_turns == other.tail_turns


# --- arrivals -----------------------------------------------------------------------------------
def test_arrivals_are_observed_as_a_rate() -> None:
    load = ObservedLoad(256)
    for number in range(400):
        load.arrived(0.25 * number)
    assert load.conversations_per_s == pytest.approx(4.0)


def test_the_first_gap_counts_no_more_than_the_next() -> None:
    """It did for sixty arrivals: one gap by chance decided what the load was taken for."""
    load = ObservedLoad(256)
    for at_s in (0.0, 9.0, 10.0, 11.0):
        load.arrived(at_s)
    assert load.conversations_per_s == pytest.approx(3 / 11)


def test_a_pause_is_over_when_it_is_over() -> None:
    load = ObservedLoad(256)
    for number in range(200):
        load.arrived(0.1 * number)
    for number in range(129):
        load.arrived(30_000.0 + 0.1 * number)
    assert load.conversations_per_s == pytest.approx(10.0)


def test_many_at_one_instant_are_many() -> None:
    load = ObservedLoad(256)
    for _ in range(100):
        load.arrived(5.0)
    assert 1e3 < load.conversations_per_s < 1e12


# --- what the scheduler tells of ----------------------------------------------------------------
def believed(world: World) -> float:
    load: ObservedLoad = world.scheduler._do.load
    return load.tail_turns


@pytest.mark.parametrize("together", [1, 2, 4, 8])
def test_later_turns_in_parallel_are_as_many_as_one_by_one(together: int) -> None:
    world = World()
    world.cluster("d0", "d1", capacity=10_000_000)
    for number in range(80):
        world.now_s += 1.0
        name = f"c{number}"
        world.first_turn(f"{name}/0", name, 4_000)
        for step in range(16 // together):
            prompt = 4_150 + 150 * step
            turns = [f"{name}/{step}/{nth}" for nth in range(together)]
            places = [one(world.arrive(turn, name, prompt), Place) for turn in turns]
            for place in places:
                world.finish(place, prompt, cached_tokens=prompt - 1)
    assert believed(world) == pytest.approx(16.0, rel=0.05)


def test_a_turn_that_was_refused_for_good_is_none() -> None:
    """Conversations that run into the context limit ask once more."""
    world = World()
    world.cluster("d0", capacity=20_000)
    for number in range(80):
        world.now_s += 1.0
        world.first_turn(f"{number}/0", f"c{number}", 4_000)
        world.arrive(f"{number}/1", f"c{number}", 30_000)
        world.end(f"c{number}")
    assert believed(world) < 0.05


def test_a_turn_that_was_aborted_and_sent_again_is_one() -> None:
    world = World()
    world.cluster("d0", capacity=10_000_000)
    for number in range(80):
        world.now_s += 1.0
        name = f"c{number}"
        world.first_turn(f"{name}/0", name, 4_000)
        for attempt in range(3):
            place = one(world.arrive(f"{name}/1/{attempt}", name, 4_150), Place)
            world.send(TurnAborted(turn=place.turn))
        place = one(world.arrive(f"{name}/1", name, 4_150), Place)
        world.finish(place, 4_150, cached_tokens=4_149)
    assert believed(world) == pytest.approx(1.0, rel=0.05)
