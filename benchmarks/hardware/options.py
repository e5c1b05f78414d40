"""The command line."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Final

from bench import DTYPES, GRAPHS
from grid import CALLS, Axes
from kernels import KINDS
from shapes import SHAPES, Shape

#: The full grid; chunk sizes up to SGLang's default budget on large GPUs.
_GPU_AXES: Final = Axes(
    chunk_tokens=(256, 512, 1024, 2048, 4096, 8192),
    batch=(1, 4, 16, 32, 64, 128),
    ctx_tokens=(1024, 4096, 16_384, 32_768),
    prefix_tokens=(0, 8192),
)
_QUICK_AXES: Final = Axes(
    chunk_tokens=(16, 64), batch=(1, 4), ctx_tokens=(32, 128), prefix_tokens=(0, 32)
)


def _numbers(text: str) -> tuple[int, ...]:
    values = tuple(sorted({int(part) for part in text.split(",")}))
    if not values or values[0] < 0:
        raise ValueError
    return values


def parse(argv: list[str] | None, about: str) -> argparse.Namespace:
    """The command line, with the grid as ``axes``."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--check", action="store_true", help="say what is here and what is missing, and stop")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--model", choices=sorted(SHAPES), default="qwen3-8b")
    add("--tensor-parallel", type=int, default=1, help="measure one rank of so many")
    add("--layers", type=int, help="so many layers instead of the model's")
    add("--dtype", choices=sorted(DTYPES), help="bfloat16; float32 on a CPU")
    add("--attention", choices=("auto", *KINDS), default="auto")
    add("--kv", choices=("contiguous", "paged"), default="contiguous")
    add("--page-tokens", type=int, default=256, help="with --kv paged")
    add(
        "--mixed-attention",
        choices=("both", *CALLS),
        default="both",
        help="of a mixed step: one call as in SGLang, one each for prompt and decode, or both",
    )
    add(
        "--graphs",
        choices=sorted(GRAPHS),
        default="all",
        help="steps replayed as CUDA graphs: decode is what engines do, all leaves out launching",
    )
    add("--chunks", type=_numbers, help="prompt tokens of a step, as 512,2048")
    add("--batches", type=_numbers, help="requests that decode")
    add("--contexts", type=_numbers, help="KV tokens of each of them")
    add("--prefixes", type=_numbers, help="cached tokens before the chunk")
    add("--quick", action="store_true", help="a tiny grid with few repeats: does it run?")
    add("--rounds", type=int, default=12, help="samples of each step")
    add("--warmup", type=int, default=3, help="runs before the first sample")
    add("--min-ms", type=float, default=20.0, help="a sample takes about so long")
    add("--repeats", type=int, default=4, help="cells measured once more at the end")
    add("--power-s", type=float, default=6.0, help="seconds each power state is watched; 0: none")
    add("--budget-s", type=float, help="stop after so many seconds")
    add("--seed", type=int, default=1)
    add("--git-revision", help="of the code, where the tree comes without .git")
    add("--out", type=Path, help="result file; one of the same conditions is gone on with")
    options = parser.parse_args(argv)
    axes = _QUICK_AXES if options.quick else _GPU_AXES
    given = {
        "chunk_tokens": options.chunks,
        "batch": options.batches,
        "ctx_tokens": options.contexts,
        "prefix_tokens": options.prefixes,
    }
    options.axes = replace(axes, **{name: value for name, value in given.items() if value})
    for name in ("chunk_tokens", "batch", "ctx_tokens"):
        if getattr(options.axes, name)[0] < 1:
            parser.error(f"{name}: at least 1")
    if options.quick:
        options.rounds, options.min_ms = min(options.rounds, 5), min(options.min_ms, 2.0)
    if options.rounds < 2:
        parser.error("--rounds: at least 2, for an interval")
    return options


def chosen_shape(options: argparse.Namespace) -> Shape:
    """The model's sizes.

    Raises:
        ValueError: they cannot be had; the message names the option.
    """
    shape = SHAPES[options.model].shard(options.tensor_parallel)
    if options.layers is None:
        return shape
    if options.layers < 1:
        raise ValueError("--layers: at least 1")
    return replace(shape, layers=options.layers)
