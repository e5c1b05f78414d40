"""The script that makes the generator's statistics: what it finds in traces of known making."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from conserve_serving.replay import recipes as shipped
from conserve_serving.replay.conversations import Conversation
from conserve_serving.replay.generator import generate
from conserve_serving.replay.recipes import Recipe, parse_recipes

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/workloads/make_quantiles.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_quantiles", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write(path: Path, conversations: tuple[Conversation, ...]) -> Path:
    rows = [
        {
            "conversation_id": c.id,
            "turn": number,
            "input_tokens": turn.input_tokens,
            "new_input_tokens": turn.new_input_tokens,
            "output_tokens": turn.output_tokens,
            "gap_s": turn.gap_s,
            "shared_prefix_tokens": c.shared_prefix_tokens,
            "model": c.shared_prefix_name,
        }
        for c in conversations
        for number, turn in enumerate(c.turns)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def again(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """What the script makes of traces that were generated from the shipped statistics."""
    folder = tmp_path_factory.mktemp("traces")
    files = {
        "swebench": generate("swebench", conversations=400, seed=5),
        "coding": generate("coding-session", conversations=400, seed=5),
        "customer": generate("customer-service", conversations=400, seed=5),
    }
    arguments = ["--out", str(folder / "quantiles.json")]
    for name, conversations in files.items():
        arguments += [f"--{name}", str(write(folder / f"{name}.jsonl", conversations))]
    script.main(arguments)
    return parse_recipes((folder / "quantiles.json").read_text())


def at(recipe: Recipe, probability: float) -> float:
    return recipe.first_input.at(probability)


@pytest.mark.parametrize("name", ["swebench", "coding-session", "customer-service"])
def test_what_was_generated_is_found_again(again: dict[str, Recipe], name: str) -> None:
    found, made = again[name], shipped.recipes()[name]
    for probability in (0.25, 0.5, 0.75):
        assert at(found, probability) == pytest.approx(at(made, probability), rel=0.1)
        assert found.turns.at(probability) == pytest.approx(made.turns.at(probability), rel=0.2)
    # Half of what is drawn is below the median of each position.
    assert found.appended.starts == made.appended.starts
    for ours, theirs in zip(found.output.quantiles, made.output.quantiles, strict=True):
        assert ours.at(0.5) == pytest.approx(theirs.at(0.5), rel=0.35)
    assert found.appended.alikeness.share == pytest.approx(made.appended.alikeness.share, abs=0.08)
    assert found.output.alikeness.share == pytest.approx(made.output.alikeness.share, abs=0.08)


def test_gaps_rewrites_and_compactions_are_found_again(again: dict[str, Recipe]) -> None:
    found, made = again["coding-session"], shipped.recipes()["coding-session"]
    assert found.gap_s is not None and made.gap_s is not None
    assert found.gap_s.alikeness.share == pytest.approx(made.gap_s.alikeness.share, abs=0.06)
    assert found.resets is not None and made.resets is not None
    for gap_s in (120.0, 1000.0, 10_000.0):
        assert found.resets.rewrite_probability(gap_s) == pytest.approx(
            made.resets.rewrite_probability(gap_s), rel=0.5
        )
    assert found.resets.compact_at.at(0.3) == pytest.approx(made.resets.compact_at.at(0.3), rel=0.1)
    assert found.resets.compacted_share.at(0.5) == pytest.approx(
        made.resets.compacted_share.at(0.5), rel=0.3
    )


def test_correlations_are_found_again(again: dict[str, Recipe]) -> None:
    def correlations(rows: tuple[tuple[float, ...], ...]) -> np.ndarray:
        size = len(rows)
        lower = np.array([[*row, *[0.0] * (size - len(row))] for row in rows])
        return lower @ lower.T

    found, made = again["coding-session"], shipped.recipes()["coding-session"]
    assert np.abs(correlations(found.within) - correlations(made.within)).max() < 0.06
    assert np.abs(correlations(found.factors) - correlations(made.factors)).max() < 0.35


def test_what_was_cut_is_drawn_from_what_was_longer(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    whole = [int(x) for x in rng.geometric(0.05, 4000)]
    limits = [int(x) for x in rng.geometric(0.05, 4000)]
    seen = [min(a, b) for a, b in zip(whole, limits, strict=True)]
    cut = [b < a for a, b in zip(whole, limits, strict=True)]
    found = script.uncut(seen, cut, rng)
    assert np.mean(seen) < 0.6 * np.mean(whole)
    assert np.mean(found) == pytest.approx(np.mean(whole), rel=0.12)
    assert np.median(found) == pytest.approx(np.median(whole), rel=0.1)
    assert all(a >= b for a, b in zip(found, seen, strict=True))
    assert script.uncut([5, 9], [True, True], rng) == [9, 9]


@pytest.mark.parametrize("name", sorted(shipped.recipes()))
def test_what_is_shipped_is_in_shape(name: str) -> None:
    recipe = shipped.recipes()[name]
    for rows, size in ((recipe.factors, 5), (recipe.within, 3)):
        assert [len(row) for row in rows] == list(range(1, size + 1))
        # Rows of unit length: what they mix has variance 1.
        assert all(math.hypot(*row) == pytest.approx(1.0, abs=0.01) for row in rows)
    quantities = [q for q in (recipe.appended, recipe.output, recipe.gap_s) if q is not None]
    everything = [recipe.turns, recipe.first_input, *(q for by in quantities for q in by.quantiles)]
    for quantiles in everything:
        assert len(quantiles.values) == len(quantiles.grid)
        assert all(a <= b for a, b in itertools.pairwise(quantiles.values))
    for by_turn in quantities:
        assert 0.0 <= by_turn.alikeness.share < 1.0
        assert list(by_turn.starts) == sorted(set(by_turn.starts))
    assert recipe.output.starts[0] == 1
