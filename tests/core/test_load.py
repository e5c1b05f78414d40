"""What is believed of the usual conversation, from the first minutes to the steady state."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_serving.core.load import ObservedLoad

OUTPUT_TOKENS = 100


def play(
    load: ObservedLoad,
    lengths: Sequence[int],
    *,
    every_s: float,
    turn_s: float,
    until_s: float,
) -> None:
    """Conversations of so many turns arrive at regular intervals; each turn takes as long as any
    other, and the next follows at once. Nobody says when a conversation has ended."""
    events: list[tuple[float, int, int, bool]] = []
    for number, turns in enumerate(lengths):
        for turn in range(turns):
            end_s = number * every_s + (turn + 1) * turn_s
            events.append((end_s, number, turn, turn + 1 < turns))
    for number in range(len(lengths)):
        if number * every_s <= until_s:
            load.arrived(number * every_s)
    for end_s, _, turn, goes_on in sorted(events):
        if end_s > until_s:
            break
        load.observe(turns=turn, prompt_tokens=1_000, new_tokens=50, output=OUTPUT_TOKENS)
        if goes_on:
            load.went_on(turn + 1)


def test_before_anything_was_seen() -> None:
    load = ObservedLoad(256)
    assert load.first_prompt_tokens == 8192
    assert load.tail_turns == pytest.approx(1.0, abs=0.01)
    assert load.turn_output_tokens == pytest.approx(256)
    assert load.conversations_per_s == 0.0


def test_conversations_that_have_not_ended_are_not_taken_for_short() -> None:
    """After 30 s of conversations that take 100 s, those open have had three turns in the mean."""
    load = ObservedLoad(256)
    lengths = [2 if number % 2 else 20 for number in range(200)]
    play(load, lengths, every_s=1.0, turn_s=5.0, until_s=60.0)
    had = sum(min(turns, int((60.0 - n) / 5.0)) for n, turns in enumerate(lengths[:61]))
    begun = sum(1 for n in range(61) if 60.0 - n >= 5.0)
    so_far = had / begun - 1.0
    assert so_far < 4.0  # what they had by then, over those that had a first turn
    assert load.tail_turns > 2.0 * so_far
    assert load.output_tokens == pytest.approx(OUTPUT_TOKENS * (1 + load.tail_turns), rel=0.2)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_in_the_steady_state_the_means_are_those_of_the_conversations(
    kinds: list[int], seed: int
) -> None:
    load = ObservedLoad(256)
    source = random.Random(seed)
    lengths = [source.choice(kinds) for _ in range(800)]
    play(load, lengths, every_s=1.0, turn_s=1.0, until_s=800.0)
    recent = lengths[-500:-60]
    tails = sum(recent) / len(recent) - 1.0
    assert load.tail_turns == pytest.approx(tails, rel=0.35, abs=0.2)
    assert load.tail_new_tokens == pytest.approx(50 * load.tail_turns, rel=0.01, abs=0.01)
    assert load.turn_output_tokens == pytest.approx(OUTPUT_TOKENS, rel=0.02)
    assert load.context_tokens == pytest.approx(1_050, rel=0.1)


def test_conversations_that_never_end_are_long_and_not_endless() -> None:
    load = ObservedLoad(256)
    play(load, [10_000], every_s=1.0, turn_s=1.0, until_s=9_000.0)
    assert 500 < load.tail_turns < 10_000


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
