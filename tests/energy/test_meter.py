"""One board's joules, from its counter or its power."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_serving.energy.meter import MAX_BOARD_W, BoardMeter


def meter() -> BoardMeter:
    return BoardMeter(max_gap_s=2.0)


def test_a_counter_is_counted_from_its_first_reading() -> None:
    m = meter()
    for at_s, counter_mj in ((0.0, 123_456), (1.0, 223_456), (2.0, 223_456), (3.5, 400_000)):
        m.energy(at_s, counter_mj)
    assert m.joules == pytest.approx(276.544)
    assert (m.resets, m.missing_s) == (0, 0.0)


@pytest.mark.parametrize("top_mj", [2**32, 2**64])
def test_a_counter_that_wraps_loses_nothing(top_mj: int) -> None:
    m = meter()
    m.energy(0.0, top_mj - 30_000)
    m.energy(1.0, 20_000)
    assert m.joules == pytest.approx(50.0)
    assert (m.resets, m.missing_s) == (0, 0.0)


def test_a_counter_that_begins_anew_counts_what_it_has_counted_since() -> None:
    m = meter()
    m.energy(0.0, 900_000_000)
    m.energy(10.0, 40_000)  # the driver was reloaded: 40 J since, the rest is not known
    m.energy(11.0, 140_000)
    assert m.joules == pytest.approx(140.0)
    assert (m.resets, m.missing_s) == (1, 10.0)


def test_a_jump_no_board_can_make_is_not_counted() -> None:
    m = meter()
    m.energy(0.0, 0)
    m.energy(1.0, 10_000_000_000)
    m.energy(2.0, 10_000_100_000)
    assert m.joules == pytest.approx(100.0)
    assert (m.resets, m.missing_s) == (1, 1.0)
    m.energy(3.0, 9_000_000_000)  # back, by no wrap, and not from zero either
    assert m.joules == pytest.approx(100.0)


def test_a_counter_goes_on_over_a_gap() -> None:
    m = meter()
    m.energy(0.0, 0)
    m.energy(3600.0, 360_000_000)
    assert m.joules == pytest.approx(360_000.0)


def test_power_is_integrated_by_trapezoids() -> None:
    m = meter()
    for tenth in range(11):
        m.power(tenth / 10, 100_000 + 10_000 * tenth)  # 100 W rising to 200 W in a second
    assert m.joules == pytest.approx(150.0)


def test_power_says_nothing_about_a_gap() -> None:
    m = meter()
    m.power(0.0, 300_000)
    m.power(1.0, 300_000)
    m.power(4.0, 300_000)
    m.power(5.0, 100_000)
    assert m.joules == pytest.approx(500.0)
    assert m.missing_s == 3.0


def test_power_that_no_board_draws_is_as_if_it_had_not_been_read() -> None:
    m = meter()
    m.power(0.0, 300_000)
    m.power(1.0, 4_294_967_295)
    m.power(2.0, 300_000)
    assert m.joules == pytest.approx(600.0)


@settings(deadline=None)  # the machine may be busy
@given(
    start_mj=st.integers(min_value=0, max_value=2**32 - 1),
    growth=st.lists(
        st.tuples(
            st.floats(min_value=0.05, max_value=30.0), st.floats(min_value=0, max_value=MAX_BOARD_W)
        ),
        max_size=50,
    ),
)
def test_any_sequence_over_a_32_bit_counter_adds_up(
    start_mj: int, growth: list[tuple[float, float]]
) -> None:
    m, at_s, counter_mj, total_mj = meter(), 0.0, start_mj, 0
    m.energy(at_s, counter_mj)
    for seconds, watts in growth:
        at_s += seconds
        grown_mj = int(seconds * watts * 1e3)
        total_mj += grown_mj
        counter_mj = (counter_mj + grown_mj) % 2**32
        m.energy(at_s, counter_mj)
    assert m.joules == pytest.approx(total_mj / 1e3, abs=1e-6)
    assert m.resets == 0
