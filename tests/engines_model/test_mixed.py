"""A measured table of slowdowns: what the engine model makes of it."""

from __future__ import annotations

import itertools
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.engines.content import StreamPrompt
from conserve_serving.engines.errors import ProfileError
from conserve_serving.engines.mixed import MixedTable
from conserve_serving.engines.model import EngineModel
from conserve_serving.engines.model_types import ModelConfig, ModelRequest
from conserve_serving.engines.profile import load_profile, parse_profile
from conserve_serving.engines.steptime import StepTimes

TABLE = MixedTable(
    chunk_tokens=(512, 2048, 8192),
    batch=(1, 16),
    ctx_tokens=(1024, 4096),
    slowdown=(((1.0, 1.1), (1.2, 1.3)), ((0.9, 1.4), (1.0, 1.6)), ((1.5, 1.7), (2.0, 2.2))),
)
H100 = load_profile("h100-qwen3-8b")
GRID = [
    (TABLE.chunk_tokens[i], TABLE.batch[j], TABLE.ctx_tokens[k], TABLE.slowdown[i][j][k])
    for i, j, k in itertools.product(range(3), range(2), range(2))
]


@pytest.mark.parametrize(("chunk", "batch", "ctx", "slowdown"), GRID)
def test_cells_are_reproduced(chunk: int, batch: int, ctx: int, slowdown: float) -> None:
    assert TABLE.at(chunk, batch, ctx) == pytest.approx(slowdown)


def test_between_cells_it_is_linear_in_each_direction() -> None:
    assert TABLE.at((512 + 2048) / 2, 1, 1024) == pytest.approx(0.95)
    assert TABLE.at(512, 1 + 15 / 4, 1024) == pytest.approx(1.05)
    assert TABLE.at(8192, 16, (1024 + 4096) / 2) == pytest.approx(2.1)
    middle = TABLE.at((512 + 2048) / 2, 8.5, (1024 + 4096) / 2)
    assert middle == pytest.approx((1.0 + 1.1 + 1.2 + 1.3 + 0.9 + 1.4 + 1.0 + 1.6) / 8)


@given(st.floats(0, 1e6, allow_nan=False), st.floats(0, 1e4), st.floats(0, 1e6))
def test_nothing_is_beyond_what_was_measured(chunk: float, batch: float, ctx: float) -> None:
    assert 0.9 - 1e-9 <= TABLE.at(chunk, batch, ctx) <= 2.2 + 1e-9


def test_beyond_the_grid_the_edge_holds() -> None:
    assert TABLE.at(1, 1, 1) == 1.0
    assert TABLE.at(100_000, 512, 131_072) == 2.2


def test_step_times_use_it_with_the_mean_context_and_the_factor_on_top() -> None:
    profile = H100.replace(mixed=TABLE)
    parts = {"chunk_tokens": 2048, "batch": 16, "kv_tokens": 16 * 4096}
    assert StepTimes(profile).mixed_s(0.1, 0.02, **parts) == pytest.approx(1.6 * 0.12)
    swept = profile.replace(mixed_slowdown=1.25)
    assert StepTimes(swept).mixed_s(0.1, 0.02, **parts) == pytest.approx(1.25 * 1.6 * 0.12)
    without = profile.replace(mixed=None, mixed_slowdown=1.25)
    assert StepTimes(without).mixed_s(0.1, 0.02, **parts) == pytest.approx(1.25 * 0.12)


def test_the_scheduler_is_told_what_a_whole_chunk_beside_a_batch_costs() -> None:
    assert H100.replace(mixed=TABLE).speeds().mixed_slowdown == pytest.approx(2.2)


def test_a_mixed_step_of_the_engine_takes_what_the_table_says() -> None:
    def second_step_s(table: MixedTable | None) -> float:
        model = EngineModel(H100.replace(mixed=table), ModelConfig(chunk_tokens=2048 + 1))
        for rid, tokens in (("first", 1023), ("second", 8192)):
            prompt = StreamPrompt([(rid, 0, tokens)], 64)
            request = ModelRequest(rid=rid, prompt=prompt, output_tokens=9)
            model.submit(request, now_s=0.0)
            if rid == "first":
                step = model.begin_step(now_s=0.0)
                assert step is not None
                model.end_step(now_s=step.end_s)
        step = model.begin_step(now_s=step.end_s)
        assert step is not None
        assert (step.prefill_tokens, step.decode_batch) == (2048, 1)
        assert step.decode_kv_tokens == 1024
        return step.duration_s

    assert second_step_s(TABLE) == pytest.approx(0.9 * second_step_s(None))


def test_it_survives_a_profile_file() -> None:
    profile = H100.replace(mixed=TABLE)
    assert parse_profile(msgspec.json.encode(profile), origin="file").mixed == TABLE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": [16, 1]}, "mixed.batch must rise"),
        ({"ctx_tokens": []}, "mixed.ctx_tokens must rise and have at least one value"),
        ({"chunk_tokens": [512, 2048]}, "must have 2 planes of 2 rows of 2 values"),
        ({"batch": [1]}, "must have 3 planes of 1 rows of 2 values"),
        ({"slowdown": [[[0.0, 1], [1, 1]]] * 3}, "mixed.slowdown must be positive"),
        ({"colour": "green"}, "colour"),
    ],
)
def test_an_impossible_table_is_refused_by_name(change: dict[str, object], message: str) -> None:
    profile = json.loads(msgspec.json.encode(H100.replace(mixed=TABLE)))
    profile["mixed"] |= change
    with pytest.raises(ProfileError, match=message):
        parse_profile(json.dumps(profile).encode(), origin="file")
