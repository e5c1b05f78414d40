"""Joules from a profile's power and an engine's busy times."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_serving.energy.modelled import ModelledMeter, describe_source, phase_weights
from conserve_serving.energy.work import Steps
from conserve_serving.engines.power import PowerModel
from conserve_serving.engines.profile import load_profile

POWER = PowerModel(
    idle_w=100.0, prefill_w=700.0, decode_p0_w=400.0, decode_ps_w=600.0, decode_h=64.0
)
DECODE = Steps(decode_steps=50, decode_s=0.5, decode_batch_sum=50.0 * 64)


def test_power_times_busy_time_and_idle_for_the_rest() -> None:
    meter = ModelledMeter(POWER)
    meter.add(Steps(prefill_tokens=1000, prefill_s=0.25), 1.0)
    assert meter.joules == pytest.approx(0.25 * 700 + 0.75 * 100)
    before_j = meter.joules
    meter.add(DECODE, 1.0)
    assert meter.joules - before_j == pytest.approx(0.5 * POWER.decode_w(64) + 0.5 * 100)


def test_a_step_counted_late_is_not_idle_as_well() -> None:
    meter = ModelledMeter(POWER)
    meter.add(Steps(), 0.5)  # a step is under way and not counted yet
    meter.add(Steps(prefill_tokens=8000, prefill_s=1.4), 1.0)
    meter.add(Steps(), 1.0)
    assert meter.joules == pytest.approx(1.4 * 700 + 1.1 * 100)


def test_boards_multiply() -> None:
    one, two = ModelledMeter(POWER), ModelledMeter(PowerModel(**{**_fields(), "boards": 2}))
    for meter in (one, two):
        meter.add(DECODE, 1.0)
        meter.add(Steps(prefill_s=0.5), 1.0)
    assert two.joules == pytest.approx(2 * one.joules)


def test_weights_are_what_a_second_costs_beyond_idling() -> None:
    assert phase_weights(POWER)(DECODE) == pytest.approx((600.0, POWER.decode_w(64) - 100.0))
    cold = PowerModel(**{**_fields(), "prefill_w": 90.0})  # a model that makes no sense there
    assert phase_weights(cold)(DECODE) == (1.0, 1.0)


def test_the_label_says_how_good_the_model_is() -> None:
    assert describe_source(load_profile("a40-qwen3-0.6b")) == "modelled: a40-qwen3-0.6b (assumed)"
    assert describe_source(load_profile("h100-qwen3-8b")) == "modelled: h100-qwen3-8b (measured)"


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(
        st.tuples(st.floats(min_value=0.0, max_value=1.0), st.floats(min_value=0.0, max_value=1.0)),
        min_size=1,
        max_size=30,
    )
)
def test_it_never_runs_backwards_and_never_below_idle(rows: list[tuple[float, float]]) -> None:
    meter, elapsed_s, last_j = ModelledMeter(POWER), 0.0, 0.0
    for busy_s, duration_s in rows:
        meter.add(Steps(prefill_tokens=1, prefill_s=busy_s), duration_s)
        elapsed_s += duration_s
        assert meter.joules >= last_j
        last_j = meter.joules
    assert meter.joules >= 100.0 * elapsed_s - 1e-9


def _fields() -> dict[str, float]:
    return {name: getattr(POWER, name) for name in POWER.__struct_fields__ if name != "boards"}
