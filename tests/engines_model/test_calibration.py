"""The profiles against the measurements they stand on."""

from __future__ import annotations

import pytest

from conserve_serving.engines.content import StreamPrompt
from conserve_serving.engines.model import EngineModel
from conserve_serving.engines.model_types import (
    ModelConfig,
    ModelRequest,
    PagesStored,
    PrefillDone,
    RequestFinished,
)
from conserve_serving.engines.profile import load_profile
from conserve_serving.engines.steptime import StepTimes

A40 = load_profile("a40-qwen3-0.6b")


def test_decode_grid() -> None:
    times = StepTimes(A40)
    assert len(A40.decode_grid) == 101
    errors = [
        abs(times.decode_s(cell.batch, cell.kv_tokens) * 1e3 / cell.ms - 1.0)
        for cell in A40.decode_grid
    ]
    assert sum(errors) / len(errors) <= 0.06
    assert max(errors) <= 0.20


def test_decode_has_a_knee() -> None:
    times = StepTimes(A40)
    assert times.decode_s(8, 2_000) == times.decode_s(8, 40_000)
    assert times.decode_s(8, 200_000) > 2.5 * times.decode_s(8, 40_000)


def test_one_prefiller_saturates_at_the_measured_rate() -> None:
    model = EngineModel(A40, ModelConfig(token_events=False))
    count, mean_tokens = 60, 15_488
    for i in range(count):
        prompt = StreamPrompt([(i, 0, mean_tokens)], 64)
        model.submit(
            ModelRequest(rid=str(i), prompt=prompt, output_tokens=0, prefill_only=True), now_s=0.0
        )
    now_s, finished = 0.0, 0
    while (step := model.begin_step(now_s=now_s)) is not None:
        now_s = step.end_s
        finished += sum(isinstance(e, RequestFinished) for e in model.end_step(now_s=now_s))
    assert finished == count
    assert count / now_s == pytest.approx(1.634, rel=0.03)


@pytest.mark.parametrize(
    ("tokens", "measured_ms"),
    [(64, 4.849), (1024, 4.849), (4096, 5.27 + 4.034560), (15488, 5.27 + 15.255680)],
)
def test_handoff_fit(tokens: int, measured_ms: float) -> None:
    """Of a transfer as the model runs it: from the prefill's end until all pages are stored."""
    model = EngineModel(A40, ModelConfig(store_writes=True))
    prompt = StreamPrompt([("p", 0, tokens)], 64)
    model.submit(
        ModelRequest(rid="r", prompt=prompt, output_tokens=0, prefill_only=True), now_s=0.0
    )
    now_s = 0.0
    events = []
    while (step := model.begin_step(now_s=now_s)) is not None:
        now_s = step.end_s
        events += model.end_step(now_s=now_s)
    wake_s = model.wake_at_s()
    assert wake_s is not None
    events += model.poll(now_s=wake_s)
    prefilled = next(e.at_s for e in events if isinstance(e, PrefillDone))
    stored = next(e for e in events if isinstance(e, PagesStored))
    assert stored.tokens == tokens // 64 * 64
    assert (stored.at_s - prefilled) * 1e3 == pytest.approx(measured_ms, rel=0.02)


def test_handoff_slope_is_the_one_in_bytes() -> None:
    link = A40.link()
    assert link.kv_bytes_per_token == 2 * 28 * 8 * 128 * 2
    per_token_us = link.kv_bytes_per_token / link.bytes_per_s * 1e6
    assert per_token_us == pytest.approx(0.985, rel=1e-6)


@pytest.mark.parametrize(
    ("prefix", "measured_ms"), [(0, 14.5), (8_000, 14.5), (12_000, 14.5), (30_000, 34.1)]
)
def test_prefill_of_a_few_tokens_on_a_cached_prefix(prefix: int, measured_ms: float) -> None:
    assert StepTimes(A40).prefill_s(67, prefix) * 1e3 == pytest.approx(measured_ms, rel=0.02)
