"""Generated workloads and token ids."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.replay.errors import TraceError
from conserve_serving.replay.generator import Quantiles, generate, recipes
from conserve_serving.replay.tokens import FIRST_ID, ID_COUNT, fresh_ids, id_range

ENDLESS = ("swebench", "customer-service")  # no cap on context cuts their conversations
NAMES = sorted(recipes())


@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_the_quantiles_they_come_from(name: str) -> None:
    recipe = recipes()[name]
    made = generate(name, conversations=600, seed=3)
    middle = recipe.first_input.grid.index(0.5)
    firsts = [c.turns[0].input_tokens for c in made]
    assert statistics.median(firsts) == pytest.approx(recipe.first_input.values[middle], rel=0.03)
    assert min(firsts) >= recipe.first_input.values[0]
    assert max(firsts) <= recipe.first_input.values[-1]
    answers = [c.turns[0].output_tokens for c in made]
    expected = recipe.output.quantiles[0].values[middle]
    assert statistics.median(answers) == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("name", ENDLESS)
def test_lengths_and_appends_follow_the_quantiles(name: str) -> None:
    recipe = recipes()[name]
    made = generate(name, conversations=2000, seed=3)
    middle = recipe.turns.grid.index(0.5)
    turns = [len(c.turns) for c in made]
    below, at_or_below = (
        sum(compare(n) for n in turns) / len(turns)
        for compare in (recipe.turns.values[middle].__gt__, recipe.turns.values[middle].__ge__)
    )
    assert below - 0.06 <= 0.5 <= at_or_below + 0.06
    appended = [c.turns[1].new_input_tokens for c in made]
    expected = recipe.appended.quantiles[0].values[middle]
    assert statistics.median(appended) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("name", [name for name in NAMES if recipes()[name].resets is None])
def test_history_extends_itself(name: str) -> None:
    for conversation in generate(name, conversations=50, seed=0):
        context = 0
        for turn in conversation.turns:
            assert turn.kept_tokens == context
            assert turn.new_input_tokens >= 1 and turn.output_tokens >= 1
            context = turn.context_tokens
        assert conversation.turns[0].gap_s == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_contexts_stay_in_bounds(name: str) -> None:
    limit = recipes()[name].max_context_tokens or 50_000
    for conversation in generate(name, conversations=200, seed=1):
        assert conversation.turns
        assert max(t.context_tokens for t in conversation.turns[1:] or conversation.turns) <= limit
        assert conversation.shared_prefix_tokens < conversation.turns[0].input_tokens


def test_sessions_keep_their_prefix_when_their_history_is_sent_anew() -> None:
    rewritten = compacted = 0
    for conversation in generate("coding-session", conversations=200, seed=0):
        for before, turn in itertools.pairwise(conversation.turns):
            assert turn.new_input_tokens >= 1
            if turn.kept_tokens == before.context_tokens:
                continue
            assert turn.kept_tokens == conversation.shared_prefix_tokens
            if turn.input_tokens > before.context_tokens:
                rewritten += 1
            else:
                compacted += 1
    assert rewritten > 20 and compacted > 20


def test_histories_are_rewritten_after_long_gaps() -> None:
    def share(at_least_s: float, below_s: float) -> float:
        tails = [
            turn.kept_tokens < before.context_tokens
            for c in generate("coding-session", conversations=400, seed=0)
            for before, turn in itertools.pairwise(c.turns)
            if at_least_s <= turn.gap_s < below_s
        ]
        return sum(tails) / len(tails)

    assert share(3600.0, 1e9) > 3 * share(300.0, 3600.0) > 6 * share(0.0, 60.0)


def test_turns_of_one_conversation_are_alike() -> None:
    """Gaps: a fifth of the variance of the scores is between conversations in the trace."""
    made = [c for c in generate("coding-agent", conversations=600, seed=0) if len(c.turns) > 20]
    halves = [
        [math.log1p(statistics.median(t.gap_s for t in c.turns[first::2])) for c in made]
        for first in (2, 3)
    ]
    assert statistics.correlation(*halves) > 0.5


def test_prefixes_are_shared_by_name_and_length() -> None:
    made = generate("coding-agent", conversations=300, seed=0)
    names = [(c.shared_prefix_name, c.shared_prefix_tokens) for c in made]
    lengths = set(names)
    assert len({name for name, _ in lengths}) == len(lengths)
    alone = sum(n == 1 for n in Counter(name for name, _ in names).values())
    assert 0.35 < alone / len(made) < 0.65  # about half of the trace's begin as another does
    assert all(c.shared_prefix_tokens == 0 for c in generate("swebench", conversations=9, seed=0))


def test_values_between_quantiles_are_geometric_where_that_is_possible() -> None:
    quantiles = Quantiles(grid=(0.0, 0.5, 1.0), values=(0.0, 10.0, 1000.0))
    assert quantiles.at(0.25) == 5.0
    assert quantiles.at(0.75) == pytest.approx(100.0)
    assert quantiles.at(1.0) == 1000.0


def test_outputs_of_the_first_turns_have_their_own_quantiles() -> None:
    made = generate("swebench", conversations=400, seed=0)
    second = [c.turns[1].output_tokens for c in made]
    assert max(second) <= 90  # the trace's largest answer to turn 2; later turns reach 10,234
    assert max(t.output_tokens for c in made for t in c.turns) > 1000


def test_seeds_and_prefixes() -> None:
    assert (
        generate("swebench", conversations=5, seed=1)
        == generate("swebench", conversations=9, seed=1)[:5]
    )
    assert generate("swebench", conversations=5, seed=1) != generate(
        "swebench", conversations=5, seed=2
    )


def test_gaps_are_bounded_where_the_recipe_says_so() -> None:
    gaps = [t.gap_s for c in generate("coding-agent", conversations=100, seed=0) for t in c.turns]
    assert max(gaps) == 120.0
    assert sum(gaps) > 0


def test_an_unknown_workload_is_named_with_what_there_is() -> None:
    with pytest.raises(
        TraceError, match=r"'nope'.*coding-agent, coding-session, customer-service, swebench"
    ):
        generate("nope", conversations=1, seed=0)


def test_fresh_ids_depend_on_every_part_of_their_name() -> None:
    ids = fresh_ids(500, seed=0, conversation="c", turn=1)
    assert len(ids) == 500
    assert min(ids) >= FIRST_ID and max(ids) < FIRST_ID + ID_COUNT
    assert ids == fresh_ids(500, seed=0, conversation="c", turn=1)
    for other in (
        fresh_ids(500, seed=1, conversation="c", turn=1),
        fresh_ids(500, seed=0, conversation="d", turn=1),
        fresh_ids(500, seed=0, conversation="c", turn=2),
    ):
        assert ids[:16] != other[:16]
    assert fresh_ids(0, seed=0, conversation="c", turn=1) == []


@given(st.integers(2, 40_000))
def test_ids_stay_in_a_small_vocabulary(vocabulary: int) -> None:
    ids = fresh_ids(200, seed=0, conversation="c", turn=1, vocabulary=vocabulary)
    assert 0 < min(ids) <= max(ids) < vocabulary
    first, count = id_range(vocabulary)
    assert count >= min(ID_COUNT, vocabulary / 4)
    assert first > 0


def test_a_vocabulary_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary is 1: give the model's"):
        id_range(1)
