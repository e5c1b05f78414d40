"""What is learned from reports: speeds, hand-off costs, growth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.core.events import StepTimes
from conserve_serving.core.growth import AGES, GrowthModel, age_of
from conserve_serving.core.ranking import Ranking
from conserve_serving.core.speeds import LearnedLink, LearnedSpeeds
from conserve_serving.core.types import EngineId, EngineSpeeds, Link

PRIOR = EngineSpeeds(
    prefill_tokens_per_s=10_000.0, decode_step_s=0.01, decode_step_s_per_kv_token=1e-7
)


def decode(kv_tokens: int, step_s: float, steps: int = 100) -> StepTimes:
    return StepTimes(
        decode_steps=steps, decode_s=steps * step_s, decode_kv_tokens=steps * kv_tokens
    )


def test_the_prior_holds_until_something_is_reported() -> None:
    speeds = LearnedSpeeds(PRIOR)
    speeds.observe(StepTimes())
    assert speeds.snapshot() == PRIOR
    assert speeds.decode_step_s(100_000) == pytest.approx(0.02)
    assert speeds.prefill_s(10_000) == pytest.approx(1.0)


@pytest.mark.parametrize("true_tokens_per_s", [2_500, 5_000, 20_000, 50_000])
def test_prefill_speed_follows_the_reports(true_tokens_per_s: int) -> None:
    speeds = LearnedSpeeds(PRIOR)
    for _ in range(40):
        speeds.observe(StepTimes(prefill_tokens=20_000, prefill_s=20_000 / true_tokens_per_s))
    assert speeds.prefill_tokens_per_s == pytest.approx(true_tokens_per_s, rel=0.03)


def test_the_decode_line_is_found_from_batches_that_differ() -> None:
    speeds = LearnedSpeeds(PRIOR)
    for round_ in range(60):
        kv = 20_000 + 40_000 * (round_ % 5)
        speeds.observe(decode(kv, 0.005 + 3e-7 * kv))
    learned = speeds.snapshot()
    assert learned.decode_step_s_per_kv_token == pytest.approx(3e-7, rel=0.05)
    assert learned.decode_step_s == pytest.approx(0.005, rel=0.15)


def test_batches_that_do_not_differ_move_the_level_not_the_slope() -> None:
    speeds = LearnedSpeeds(PRIOR)
    for _ in range(60):
        speeds.observe(decode(50_000, 0.030))
    assert speeds.snapshot().decode_step_s_per_kv_token == PRIOR.decode_step_s_per_kv_token
    assert speeds.decode_step_s(50_000) == pytest.approx(0.030, rel=0.02)


def test_interference_is_what_a_mixed_step_costs_beyond_its_parts() -> None:
    speeds = LearnedSpeeds(PRIOR)
    parts_s = 10 * 0.01 + 10 * 10_000 * 1e-7 + 2_000 / 10_000
    for _ in range(60):
        speeds.observe(
            StepTimes(
                mixed_steps=10,
                mixed_s=1.5 * parts_s,
                mixed_kv_tokens=100_000,
                mixed_prefill_tokens=2_000,
            )
        )
    assert speeds.mixed_slowdown == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize("true_slowdown", [1.0, 1.5])
def test_what_an_append_costs_beside_decodes_is_not_taken_for_interference(
    true_slowdown: float,
) -> None:
    """A decoder that is never idle: appends take 20 ms each, and now and then there is a prompt."""
    speeds = LearnedSpeeds(PRIOR)
    decode_s = 0.01 + 100_000 * 1e-7
    for _ in range(100):
        for turns, tokens, seconds in ((10, 670, 10 * 0.020), (1, 20_000, 0.020 + 2.0)):
            speeds.observe(
                StepTimes(
                    mixed_steps=10,
                    mixed_s=true_slowdown * (10 * decode_s + seconds),
                    mixed_kv_tokens=10 * 100_000,
                    mixed_prefill_tokens=tokens,
                ),
                prefilled_turns=turns,
            )
    assert speeds.mixed_slowdown == pytest.approx(true_slowdown, rel=0.02)
    assert speeds.prefill_s(67) == pytest.approx(0.020, rel=0.1)


@given(
    st.lists(
        st.builds(
            StepTimes,
            prefill_tokens=st.integers(0, 10**6),
            prefill_s=st.floats(0, 100),
            decode_steps=st.integers(0, 10**5),
            decode_s=st.floats(0, 1000),
            decode_kv_tokens=st.integers(0, 10**12),
            mixed_steps=st.integers(0, 10**4),
            mixed_s=st.floats(0, 100),
            mixed_kv_tokens=st.integers(0, 10**10),
            mixed_prefill_tokens=st.integers(0, 10**6),
        ),
        max_size=20,
    )
)
def test_no_report_makes_a_speed_absurd(reports: list[StepTimes]) -> None:
    speeds = LearnedSpeeds(PRIOR)
    for report in reports:
        speeds.observe(report)
    assert speeds.prefill_tokens_per_s > 0
    assert speeds.mixed_slowdown >= 1.0
    for kv in (0, 1_000, 1_000_000):
        assert speeds.decode_step_s(kv) > 0


def test_an_engine_likened_to_another_is_not_corrected_by_its_error_again() -> None:
    guess, unseen = LearnedSpeeds(PRIOR, guessed=True), LearnedSpeeds(PRIOR, guessed=True)
    assert unseen.decode_bias(1_000) is None
    guess.observe(StepTimes(decode_steps=100, decode_s=5.0, decode_kv_tokens=100_000))
    likened = unseen.liken(guess)
    assert likened.decode_step_s(1_000) == pytest.approx(0.05, rel=0.01)
    assert likened.decode_bias(1_000) == pytest.approx(guess.decode_bias(1_000), rel=0.01)


def test_short_appends_teach_the_cost_of_a_turn_not_of_a_token() -> None:
    speeds = LearnedSpeeds(PRIOR)
    for _ in range(60):
        speeds.observe(StepTimes(prefill_tokens=20 * 67, prefill_s=20 * 0.015), prefilled_turns=20)
    assert speeds.prefill_s(67) == pytest.approx(0.015, rel=0.1)
    assert speeds.prefill_tokens_per_s == pytest.approx(PRIOR.prefill_tokens_per_s, rel=0.1)


def test_set_up_time_is_learned_from_hand_offs() -> None:
    link = LearnedLink(Link(setup_s=0.005, bytes_per_s=1e11, kv_bytes_per_token=100_000))
    for _ in range(40):
        link.observe(10_000, 0.060)
    assert link.handoff_s(10_000) == pytest.approx(0.060, rel=0.01)


def test_growth_is_learned_by_age() -> None:
    growth = GrowthModel(256)
    assert growth.output_tokens(0) == 256
    for _ in range(100):
        growth.observe_growth(1, 100)
        growth.observe_growth(8, 5_000)
        growth.observe_output(1, 40)
    ages = [0] * AGES
    ages[age_of(1)], ages[age_of(9)] = 3, 2
    # As many turns again as it has: one at turn 1, eight from turn 8 on.
    assert growth.headroom_tokens(ages) == pytest.approx(3 * 100 + 2 * 8 * 5_000)
    assert growth.output_tokens(1) == pytest.approx(40)
    assert growth.output_tokens(50) == 256


def test_conversations_seen_to_end_need_less_room() -> None:
    growth = GrowthModel(256)
    ages = [0] * AGES
    ages[age_of(4)] = 1
    growth.observe_growth(4, 1_000)
    assert growth.headroom_tokens(ages) == pytest.approx(4_000)
    growth.observe_end(4)
    assert growth.headroom_tokens(ages) == pytest.approx(1_000 * (0.5 + 0.25 + 0.125 + 0.0625))
    for _ in range(64 * 12):
        growth.observe_end(5)
    assert growth.headroom_tokens(ages) < 1.0


@given(st.lists(st.tuples(st.integers(0, 9), st.one_of(st.none(), st.integers(-5, 5)))))
def test_a_ranking_is_what_sorting_would_give(
    operations: list[tuple[int, int | None]],
) -> None:
    ranking: Ranking[int] = Ranking()
    expected: dict[EngineId, float] = {}
    for number, key in operations:
        engine = EngineId(f"e{number}")
        if key is None:
            ranking.drop(engine)
            expected.pop(engine, None)
        else:
            ranking.put(engine, number, float(key))
            expected[engine] = float(key)
        assert (engine in ranking) == (engine in expected)
    by_rank = sorted(expected, key=lambda e: (expected[e], e))
    assert [f"e{item}" for item in ranking] == by_rank
    assert len(ranking) == len(expected)
