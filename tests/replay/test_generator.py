"""Generated workloads and token ids."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.replay.errors import TraceError
from conserve_serving.replay.generator import generate, recipes
from conserve_serving.replay.tokens import FIRST_ID, ID_COUNT, fresh_ids, id_range


@pytest.mark.parametrize("name", sorted(recipes()))
def test_samples_follow_the_quantiles_they_come_from(name: str) -> None:
    recipe = recipes()[name]
    made = generate(name, conversations=800, seed=3)
    middle = recipe.first_input.grid.index(0.5)
    firsts = [c.turns[0].input_tokens for c in made]
    assert statistics.median(firsts) == pytest.approx(recipe.first_input.values[middle], rel=0.02)
    assert min(firsts) >= recipe.first_input.values[0]
    assert max(firsts) <= recipe.first_input.values[-1]
    turns = [len(c.turns) for c in made]
    below, at_or_below = (
        sum(compare(n) for n in turns) / len(turns)
        for compare in (recipe.turns.values[middle].__gt__, recipe.turns.values[middle].__ge__)
    )
    assert below - 0.06 <= 0.5 <= at_or_below + 0.06
    appended = [t.new_input_tokens for c in made for t in c.turns[1:]]
    assert statistics.median(appended) == pytest.approx(recipe.appended.values[middle], rel=0.05)


@pytest.mark.parametrize("name", sorted(recipes()))
def test_history_extends_itself(name: str) -> None:
    for conversation in generate(name, conversations=50, seed=0):
        context = 0
        for turn in conversation.turns:
            assert turn.kept_tokens == context
            assert turn.new_input_tokens >= 1 and turn.output_tokens >= 1
            context = turn.context_tokens
        assert conversation.turns[0].gap_s == 0.0


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
    with pytest.raises(TraceError, match=r"'nope'.*coding-agent, customer-service, swebench"):
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
