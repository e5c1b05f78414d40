"""Which steps are measured in which order, and what is made of the repeats."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import pytest
from grid import Axes, Cell, middle, ordered, slowdown, take_turns
from shapes import SHAPES

AXES = Axes(
    chunk_tokens=(256, 512, 1024, 2048, 4096),
    batch=(1, 4, 16),
    ctx_tokens=(1024, 8192),
    prefix_tokens=(0, 4096),
)


def test_every_cell_once_and_a_coarse_grid_first() -> None:
    cells = ordered(AXES, seed=1)
    assert len({cell for _, cell in cells}) == len(cells) == 5 * 3 * 2 * 2
    levels = [level for level, _ in cells]
    assert levels == sorted(levels)
    coarse = {cell for level, cell in cells if level == 0}
    assert {cell.chunk_tokens for cell in coarse} == {256, 1024, 4096}
    assert {cell.batch for cell in coarse} == {1, 4, 16}
    assert {cell.prefix_tokens for cell in coarse} == {0}
    assert len(coarse) == 3 * 3 * 2


def test_the_order_within_a_level_is_drawn_by_seed() -> None:
    assert ordered(AXES, seed=1) == ordered(AXES, seed=1)
    assert ordered(AXES, seed=1) != ordered(AXES, seed=2)
    first = [cell.chunk_tokens for level, cell in ordered(AXES, seed=1) if level == 0]
    assert first != sorted(first)


def test_the_middle_is_of_the_coarse_grid() -> None:
    assert middle((1, 4, 16, 32)) == 4
    assert middle((7,)) == 7


def test_a_cell_knows_its_room() -> None:
    assert Cell(chunk_tokens=512, batch=3, ctx_tokens=100, prefix_tokens=64).kv_tokens == 876


def _steps(ms: dict[str, float], log: list[str]) -> dict[str, Callable[[int], tuple[float, float]]]:
    def step(name: str) -> Callable[[int], tuple[float, float]]:
        def run(count: int) -> tuple[float, float]:
            log.append(name)
            return ms[name] * count, 0.25 * ms[name] * count

        return run

    return {name: step(name) for name in ms}


def test_parts_take_turns_in_drawn_order_and_long_enough() -> None:
    log: list[str] = []
    ms = {"prefill": 40.0, "decode": 5.0, "mixed": 50.0}
    seen = take_turns(_steps(ms, log), rounds=6, warmup=3, least_ms=20.0, dice=random.Random(1))
    assert {name: part["runs"] for name, part in seen.items()} == {
        "prefill": 1,
        "decode": 4,
        "mixed": 1,
    }
    for name, part in seen.items():
        assert part["ms"] == [ms[name]] * 6
        assert part["host_ms"] == ms[name] / 4
    rounds = [tuple(log[at : at + 3]) for at in range(6, len(log), 3)]  # after warming up
    assert len(rounds) == 6
    assert all(set(turn) == set(ms) for turn in rounds)
    assert len(set(rounds)) > 1


def test_slowdown_is_paired_by_round() -> None:
    clocks = [1.0, 1.3, 0.8, 1.1, 1.0, 0.9]  # what changes for all parts alike does not matter
    seen = slowdown([30 * c for c in clocks], [10 * c for c in clocks], [50 * c for c in clocks])
    for value in seen.values():
        assert value == pytest.approx(1.25)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    dice = random.Random(5)
    hits = 0
    for _ in range(200):
        noise = [[dice.gauss(1.0, 0.02) for _ in range(12)] for _ in range(3)]
        prefill, decode, mixed = (
            [ms * n for n in part] for ms, part in zip((30, 10, 44), noise, strict=True)
        )
        seen = slowdown(prefill, decode, mixed)
        assert seen["low"] <= seen["median"] <= seen["high"]
        assert seen["p10"] <= seen["median"] <= seen["p90"]
        hits += seen["low"] <= 1.1 <= seen["high"]
    assert 0.88 <= hits / 200 <= 1.0


def test_an_interval_narrows_with_rounds() -> None:
    dice = random.Random(6)

    def width(rounds: int) -> float:
        widths = []
        for _ in range(20):
            mixed = [44 * dice.gauss(1.0, 0.05) for _ in range(rounds)]
            seen = slowdown([30.0] * rounds, [10.0] * rounds, mixed)
            widths.append(seen["high"] - seen["low"])
        return statistics.mean(widths)

    assert width(48) < 0.7 * width(12)


@pytest.mark.parametrize(
    ("name", "kv_bytes", "weights"),
    [
        ("qwen3-0.6b", 114_688, 751_632_384),
        ("qwen3-8b", 147_456, 8_190_735_360),
        ("qwen3-32b", 262_144, 32_762_123_264),
    ],
)
def test_shapes_are_the_models(name: str, kv_bytes: int, weights: int) -> None:
    """KV as in the hardware profiles; parameters as published (0.6B: with the head untied)."""
    shape = SHAPES[name]
    assert shape.kv_values_per_token * 2 == kv_bytes
    assert shape.weights == weights


def test_a_shard_has_its_part_of_heads_and_mlp() -> None:
    whole, half = SHAPES["qwen3-32b"], SHAPES["qwen3-32b"].shard(2)
    assert half.kv_values_per_token * 2 == whole.kv_values_per_token
    assert (half.heads, half.intermediate, half.hidden) == (32, 12_800, 5120)
    assert half.name == "qwen3-32b/tp2"
    with pytest.raises(ValueError, match=r"--tensor-parallel 3: qwen3-32b has 8 KV heads"):
        SHAPES["qwen3-32b"].shard(3)
