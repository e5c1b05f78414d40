"""What predictors say: the truth, a half, or what a training half teaches, with noise."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace

import pytest

from conserve_serving.lab.pool import Pool
from conserve_serving.lab.predictors import NOISE_SIGMA, MeanByTurn, foretell
from conserve_serving.lab.workloads import Split, WorkloadSpec
from conserve_serving.replay.conversations import Conversation, Turn

SPEC = WorkloadSpec(source="generated:swebench", max_turns=5, conversations=400, seed=3)


def conversation(*outputs: int) -> Conversation:
    turns = tuple(
        Turn(input_tokens=100, new_input_tokens=100, output_tokens=tokens) for tokens in outputs
    )
    return Conversation(id="c", turns=turns)


def told(predictor: str, *, seed: int = 0, training=(), spec: WorkloadSpec = SPEC):
    return list(foretell(Pool.load(spec).stream(spec), predictor, training=training, seed=seed))


def pairs(conversations) -> list[tuple[int, int]]:
    return [(t.output_tokens, t.predicted_output_tokens) for c in conversations for t in c.turns]


def test_none_changes_nothing() -> None:
    assert told("none") == list(Pool.load(SPEC).stream(SPEC))


def test_perfect_and_biased() -> None:
    assert all(said == truth for truth, said in pairs(told("perfect")))
    assert all(said == max(1, round(truth / 2)) for truth, said in pairs(told("biased")))


def test_only_the_oracle_foresees_the_conversation() -> None:
    for one in told("oracle"):
        last = max(turn.prompt_tokens + turn.output_tokens for turn in one.turns)
        assert one.foreseen_tokens == last
    for predictor in ("perfect", "biased"):
        assert all(one.foreseen_tokens is None for one in told(predictor))


def test_a_prediction_changes_nothing_else() -> None:
    for before, after in zip(told("none"), told("oracle"), strict=True):
        bare = tuple(replace(turn, predicted_output_tokens=None) for turn in after.turns)
        assert replace(after, turns=bare, foreseen_tokens=None) == before


def test_means_are_by_turn_index_and_the_last_one_goes_on() -> None:
    means = MeanByTurn([conversation(10, 20, 30), conversation(30, 40)])
    assert [means[i] for i in range(5)] == [20.0, 30.0, 30.0, 30.0, 30.0]


def test_the_realistic_predictor_knows_the_mean_and_nothing_of_the_conversation() -> None:
    """Conversations that differ in every output are told the same; noise has the stated spread."""
    training = [conversation(100, 1000)]
    made = told("realistic", training=training)
    first = [one.turns[0].predicted_output_tokens for one in made]
    last = [one.turns[-1].predicted_output_tokens for one in made if len(one.turns) > 1]
    assert statistics.fmean(first) == pytest.approx(100, rel=0.1)
    assert statistics.fmean(last) == pytest.approx(1000, rel=0.1)
    assert statistics.stdev(map(math.log, last)) == pytest.approx(NOISE_SIGMA, rel=0.1)
    truths = [one.turns[0].output_tokens for one in made]
    assert abs(statistics.correlation(truths, first)) < 0.1


def test_the_noise_alone_errs_as_much_as_published_predictors_do() -> None:
    made = told("realistic", training=[conversation(10_000)])
    said = [one.turns[0].predicted_output_tokens for one in made]
    error = statistics.fmean(abs(tokens - 10_000) for tokens in said) / 10_000
    assert error == pytest.approx(0.435, rel=0.1)


def test_predictions_depend_on_seed_and_conversation_alone() -> None:
    training = [conversation(100, 200)]
    assert told("realistic", training=training) == told("realistic", training=training)
    assert told("realistic", training=training) != told("realistic", training=training, seed=1)
    faster = told("realistic", training=training, spec=replace(SPEC, rate_per_s=9.0))
    assert pairs(faster) == pairs(told("realistic", training=training))
    few = itertools.islice(Pool.load(SPEC).stream(SPEC), 5)
    some = list(foretell(few, "realistic", training=training, seed=0))
    assert some == told("realistic", training=training)[:5]


def test_the_training_half_is_not_the_test_half() -> None:
    tune, test = (Pool.load(replace(SPEC, split=split)) for split in (Split.TUNE, Split.TEST))
    assert not {c.id for c in tune.conversations} & {c.id for c in test.conversations}
