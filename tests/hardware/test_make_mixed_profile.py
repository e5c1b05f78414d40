"""From a result to what the engine model does: no torch, and no figure that was not measured."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from make_mixed_profile import fit_power, into_profile, main, make_table
from result import FORMAT, ResultError
from shapes import SHAPES

from conserve_serving.engines.profile import Confidence, load_profile, parse_profile
from conserve_serving.engines.steptime import StepTimes

H100 = load_profile("h100-qwen3-8b")
CHUNKS, BATCHES, CONTEXTS, PREFIXES = (512, 2048), (1, 16, 64), (1024, 8192), (0, 8192)


def law(chunk: float, batch: float, ctx: float, prefix: float) -> float:
    """A slowdown to be found again; linear, so that interpolation has nothing to lose."""
    return 0.9 + chunk / 8192 + batch / 256 + ctx / 65_536 + (prefix - 4096) / 1e6


def entry(chunk: int, batch: int, ctx: int, prefix: int, *, half: float = 0.01) -> dict[str, Any]:
    median = law(chunk, batch, ctx, prefix)
    return {
        "cell": {
            "chunk_tokens": chunk, "batch": batch, "ctx_tokens": ctx, "prefix_tokens": prefix,
        },
        "session": 0,
        "slowdown": {
            "one_call": {"median": median, "low": median - half, "high": median + half},
            "two_calls": {"median": 1.0, "low": 0.9, "high": 1.1},
        },
    }  # fmt: skip


def decode_w(batch: float) -> float:
    return 260.0 + (610.0 - 260.0) * (1.0 - math.exp(-batch / 20.0))


def result(
    keep: Callable[[int, int, int, int], bool] = lambda *_: True, **config: Any
) -> dict[str, Any]:
    """A result file as measure.py writes it, of a GPU that follows `law`."""
    shape = asdict(SHAPES["qwen3-8b"])
    power = [{"state": "idle_bare", "batch": None, "watts": 70.0, "seconds": 6.0}]
    power += [{"state": "idle_loaded", "batch": None, "watts": 118.0, "seconds": 6.1}]
    power += [{"state": "prefill", "batch": 16, "watts": 655.0, "seconds": 6.0}]
    power += [{"state": "mixed", "batch": 16, "watts": 650.0, "seconds": 6.0}]
    power += [
        {"state": "decode", "batch": b, "watts": decode_w(b), "seconds": 6.0}
        for b in (1, 4, 16, 64)
    ]
    places = itertools.product(CHUNKS, BATCHES, CONTEXTS, PREFIXES)
    return {
        "format": FORMAT,
        "config": {
            "device": "cuda", "name": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "shape": shape,
            "dtype": "bfloat16", "attention": "torch-varlen 2.11.0",
            "mixed_attention": ["one_call", "two_calls"],
            "kv": "contiguous", "page_tokens": None, "graphs": ["decode", "mixed", "prefill"],
            **config,
        },
        "sessions": [
            {"date": "2026-12-01T10:00:00+00:00", "git": "abc123", "board": {"driver": "580.1"}},
            {"date": "2026-12-01T11:00:00+00:00", "git": None, "board": None},
        ],
        "cells": [entry(*place) for place in places if keep(*place)],
        "repeats": [
            {"over_first": {"slowdown": {"one_call": seen, "two_calls": 1.0}}}
            for seen in (1.004, 0.993)
        ],
        "power": power,
        "left_out": [],
    }  # fmt: skip


def test_the_table_has_every_cell_and_says_how_good_it_is() -> None:
    made = make_table(result())
    for chunk, batch, ctx in itertools.product(CHUNKS, BATCHES, CONTEXTS):
        assert made.table.at(chunk, batch, ctx) == pytest.approx(
            law(chunk, batch, ctx, 4096), abs=1e-4
        )
    assert (made.cells, made.filled, made.repeats) == (24, 0, 2)
    assert made.widest == pytest.approx(0.01)
    assert made.by_prefix == pytest.approx(4096e-6)
    assert made.drift == pytest.approx(0.007)
    assert "24 cells, 95 % intervals within ±0.010" in made.in_words()
    assert "2 repeats within 0.7%" in made.in_words()


def test_the_engine_model_takes_as_long_as_was_measured() -> None:
    profile = into_profile(result(), H100.replace(mixed_slowdown=1.25))
    times = StepTimes(profile)
    for chunk, batch, ctx in ((512, 16, 1024), (2048, 64, 8192), (1280, 40, 4608)):
        seen = times.mixed_s(0.08, 0.02, chunk_tokens=chunk, batch=batch, kv_tokens=batch * ctx)
        assert seen == pytest.approx(0.1 * law(chunk, batch, ctx, 4096), rel=1e-3)
    part = profile.parts["mixed"]
    assert part.confidence is Confidence.MEASURED
    for words in (
        "NVIDIA H100 80GB HBM3", "driver 580.1", "torch 2.11.0", "abc123", "2026-12-01",
        "no SGLang", "in one call", "random weights",
    ):  # fmt: skip
        assert words in part.source
    assert profile.power == H100.power
    assert profile.prefill == H100.prefill


def test_places_nobody_measured_take_their_nearest_and_are_counted() -> None:
    made = make_table(result(lambda chunk, batch, ctx, _: (batch, ctx) != (64, 8192)))
    assert made.filled == 2
    assert made.table.at(512, 64, 8192) == made.table.at(512, 64, 1024)
    assert "2 places filled" in made.in_words()


def test_a_chunk_with_few_cells_is_left_out() -> None:
    made = make_table(result(lambda chunk, batch, ctx, _: chunk == 512 or batch == 1))
    assert made.table.chunk_tokens == (512,)
    assert made.left_out == (2048,)
    assert made.in_words().endswith("chunks left out: 2048")


def test_the_other_way_of_computing_mixed_steps_is_a_table_of_its_own() -> None:
    profile = into_profile(result(), H100, calls="two_calls")
    assert profile.mixed is not None
    assert profile.mixed.at(2048, 64, 8192) == 1.0
    assert "attention of mixed steps in two calls" in profile.parts["mixed"].source
    with pytest.raises(ResultError, match="attention was not measured in three_calls"):
        make_table(result(), "three_calls")


def test_an_empty_result_is_no_table() -> None:
    with pytest.raises(ResultError, match="no cell was measured"):
        make_table(result(lambda *_: False))


def test_the_power_model_is_found_again() -> None:
    power = fit_power(result(), boards=1)
    assert (power.idle_w, power.prefill_w) == (118.0, 655.0)
    for batch in (1, 2, 8, 16, 100):
        assert power.decode_w(batch) == pytest.approx(decode_w(batch), rel=0.01)
    profile = into_profile(result(), H100, power=True)
    assert profile.power == power
    assert profile.parts["power"].confidence is Confidence.MEASURED
    assert (profile.power_low, profile.power_high) == (None, None)


@pytest.mark.parametrize("missing", ["idle_loaded", "prefill", "decode"])
def test_no_power_model_without_its_states(missing: str) -> None:
    less = result()
    less["power"] = [state for state in less["power"] if state["state"] != missing]
    with pytest.raises(ResultError, match="power needs idle_loaded, prefill and at least three"):
        fit_power(less, boards=1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"device": "cpu"}, "measured on device 'cpu': a profile is of a GPU"),
        ({"name": "NVIDIA A100-SXM4-80GB"}, "measured on NVIDIA A100-SXM4-80GB"),
        ({"shape": asdict(SHAPES["qwen3-0.6b"])}, "measured with model qwen3-0.6b"),
        ({"shape": asdict(SHAPES["qwen3-8b"].shard(2))}, "measured with model qwen3-8b/tp2"),
        ({"shape": asdict(SHAPES["qwen3-8b"]) | {"layers": 8}}, "8 of 36 layers"),
    ],
)
def test_what_was_measured_elsewhere_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ResultError, match=message):
        into_profile(result(**config), H100)


def test_the_command_writes_a_profile_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "result.json", tmp_path / "profile.json"
    source.write_text(json.dumps(result()))
    main([str(source), "--profile", "h100-qwen3-8b", "--power", "--out", str(out)])
    profile = parse_profile(out.read_bytes(), origin="out")
    assert profile.mixed == make_table(result()).table
    assert "chunk 2048: batch down, context across" in capsys.readouterr().out


def test_as_a_script_it_says_what_is_wrong(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "hardware" / "make_mixed_profile.py"
    source = tmp_path / "result.json"
    source.write_text(json.dumps(result(device="cpu")))
    argv = [sys.executable, str(script), str(source), "--profile", H100.name, "--out", "x"]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    assert ran.returncode == 1
    assert ran.stderr.strip() == (
        "make_mixed_profile.py: measured on device 'cpu': a profile is of a GPU"
    )
