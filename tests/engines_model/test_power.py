"""The power model and the meter."""

from __future__ import annotations

import pytest

from conserve_serving.engines.power import EnergyMeter, PowerModel, reprice

POWER = PowerModel(
    idle_w=100.0, prefill_w=700.0, decode_p0_w=400.0, decode_ps_w=600.0, decode_h=64.0
)


def test_decode_power_rises_and_saturates() -> None:
    watts = [POWER.decode_w(batch) for batch in (0, 1, 64, 1_000)]
    assert watts[0] == 400.0
    assert watts == sorted(watts)
    assert watts[2] == pytest.approx(400 + 200 * (1 - 1 / 2.718281828), rel=1e-6)
    assert watts[3] == pytest.approx(600.0, rel=1e-3)


def test_the_meter_adds_up_by_state() -> None:
    meter = EnergyMeter(POWER)
    meter.idle(2.0)
    meter.step(1.0, prefill_share=1.0, decode_batch=0)
    meter.step(3.0, prefill_share=0.0, decode_batch=0)
    meter.step(4.0, prefill_share=0.25, decode_batch=0)
    reading = meter.reading()
    assert (reading.idle_j, reading.prefill_j, reading.decode_j) == (200.0, 700.0, 1200.0)
    assert reading.mixed_j == pytest.approx(4.0 * (0.25 * 700 + 0.75 * 400))
    assert reading.total_j == pytest.approx(200 + 700 + 1200 + 1900)


def test_every_board_counts() -> None:
    two = PowerModel(
        idle_w=100.0,
        prefill_w=700.0,
        decode_p0_w=400.0,
        decode_ps_w=600.0,
        decode_h=64.0,
        boards=2,
    )
    assert two.decode_w(8) == 2 * POWER.decode_w(8)
    meter = EnergyMeter(two)
    meter.idle(1.0)
    assert meter.reading().idle_j == 200.0


@pytest.mark.parametrize(("duration_s", "share"), [(-1.0, 0.5), (1.0, 1.5)])
def test_nonsense_is_refused(duration_s: float, share: float) -> None:
    with pytest.raises(ValueError, match="prefill share"):
        EnergyMeter(POWER).step(duration_s, prefill_share=share, decode_batch=1)


def test_seconds_by_state_price_the_same_work_under_another_model() -> None:
    """As a second meter would have, that ran with the other model from the start."""
    other = PowerModel(
        idle_w=60.0, prefill_w=500.0, decode_p0_w=300.0, decode_ps_w=350.0, decode_h=8.0, boards=2
    )
    meters = [EnergyMeter(POWER), EnergyMeter(other)]
    for meter in meters:
        meter.idle(2.0)
        for batch, share in ((0, 1.0), (1, 0.0), (7, 0.0), (7, 0.25), (40, 0.5), (1, 0.0)):
            meter.step(0.5 + batch, prefill_share=share, decode_batch=batch)
    seconds = meters[0].seconds()
    assert seconds.total_s == pytest.approx(2.0 + 6 * 0.5 + 1 + 7 + 7 + 40 + 1)
    assert seconds.decode_s == {1: 3.0, 7: 7.5}
    for power, meter in zip((POWER, other), meters, strict=True):
        priced, counted = reprice(seconds, power), meter.reading()
        for part in ("idle_j", "prefill_j", "decode_j", "mixed_j"):
            assert getattr(priced, part) == pytest.approx(getattr(counted, part))
