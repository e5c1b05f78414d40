"""What a step that prefills and decodes costs beyond its parts, and what the board draws.

    python benchmarks/hardware/measure.py --check                  # what is here, what is missing
    python benchmarks/hardware/measure.py --model qwen3-8b --budget-s 540 --out h100.json
    python benchmarks/hardware/measure.py --device cpu --model tiny --quick  # anywhere torch is

Random weights in the shape of Qwen3, on one CUDA GPU, with torch alone (other attention kernels
where they are installed). A run that is cut short can be gone on with: the same command, the same
``--out``. `docs/hardware.md` says what is measured and what is not; ``make_mixed_profile.py`` makes
a profile of the result.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

_BEGAN_S: Final = time.monotonic()
ROOT: Final = Path(__file__).parents[2]
if str(ROOT / "serving") not in sys.path:
    sys.path.insert(0, str(ROOT / "serving"))  # a lent machine has the tree, not the package

try:
    import torch
except ImportError:
    sys.exit(
        "torch is missing in this Python: use one that has it "
        "(make test-hardware installs one for the CPU into .venv-sglang)"
    )

import machine
from attention import AttentionError
from bench import DTYPES, GRAPHS, Bench, BenchError
from board import Board, PowerError, PowerWatch, watch_board
from grid import CALLS, ordered
from kernels import choose
from options import chosen_shape, parse
from result import Result, ResultError, read_result
from runner import SETTLE_S, Measurement, rest

Say = Callable[[str], None]


def main(argv: list[str] | None = None, *, say: Say = print) -> Result | None:
    """Measure; returns the result, None after ``--check``.

    Raises:
        ValueError, AttentionError, BenchError, ResultError: it cannot be done; the message says
            what to change.
    """
    options = parse(argv, str(__doc__).splitlines()[0])
    with ExitStack() as stack:
        return _measure(options, stack, say)


def _measure(options: argparse.Namespace, stack: ExitStack, say: Say) -> Result | None:
    name = machine.board_name()
    device = machine.pick_device(options.device)
    shape = chosen_shape(options)
    on_gpu = device.type == "cuda"
    dtype = DTYPES[options.dtype or ("bfloat16" if on_gpu else "float32")]
    page = options.page_tokens if options.kv == "paged" else None
    notes: list[str] = []
    board: Board | None = None
    watch: PowerWatch | None = None
    bare: dict[str, Any] | None = None
    if on_gpu:
        try:
            board = Board(name)
            watch, sampler = watch_board(name)
            stack.callback(sampler.stop)
            if board.gpu.mig is not None:
                notes.append("a MIG device: watts are the whole board's")
            if _wants_bare(options) and not torch.cuda.is_initialized():
                bare = watch.over(rest, warm_s=SETTLE_S, measure_s=options.power_s)
        except PowerError as error:
            notes.append(f"power is not measured: {error}")
        if board is not None and machine.same_board(board.uuid, device) is False:
            raise BenchError(
                f"NVML's GPU {name} is not torch's first: set CUDA_VISIBLE_DEVICES to one GPU"
            )
    else:
        notes.append("on a CPU: a test of the script, no figures of any GPU; power is not measured")
    attention, passed = choose(
        options.attention, shape, page_tokens=page, dtype=dtype, device=device
    )
    notes += [f"attention passed over: {why}" for why in passed]
    calls = CALLS if options.mixed_attention == "both" else (options.mixed_attention,)
    if not attention.packs:
        calls = ("two_calls",)
    graphs = GRAPHS[options.graphs] if on_gpu else frozenset()
    config = {
        "device": device.type,
        **machine.device_facts(device),
        "torch": torch.__version__,
        "shape": asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention.name,
        "mixed_attention": list(calls),
        "kv": options.kv,
        "page_tokens": page,
        "graphs": sorted(graphs),
    }
    for line in (*(f"{key}: {value}" for key, value in config.items()), *notes):
        say(line)
    if board is not None:
        say(f"board: {board.fixed()} {board.now()}")
    if options.check:
        return None
    cells = ordered(options.axes, seed=options.seed)
    result = Result(options.out, config)
    bench = Bench(
        shape,
        attention,
        device=device,
        dtype=dtype,
        page_tokens=page,
        calls=calls,
        graphs=graphs,
        cells=[cell for _, cell in cells],
        seed=options.seed,
    )
    session = result.begin(
        {
            **machine.conditions(),
            "git": options.git_revision or machine.git_revision(),
            "board": None if board is None else board.fixed(),
            "options": {"rounds": options.rounds, "seed": options.seed, "min_ms": options.min_ms},
            "notes": notes,
        }
    )
    if bare is not None:
        result.add("power", {"state": "idle_bare", "session": session, "batch": None, **bare})
    out = [cell.as_dict() for _, cell in cells if not bench.fits(cell)]
    result.data["left_out"] = out
    if out:
        say(f"{len(out)} cells do not fit into {bench.room_tokens} KV tokens")
    deadline_s = None if options.budget_s is None else _BEGAN_S + options.budget_s
    Measurement(
        result, bench, options, board=board, watch=watch, deadline_s=deadline_s, say=say
    ).run([(level, cell) for level, cell in cells if bench.fits(cell)])
    result.save()
    return result


def _wants_bare(options: argparse.Namespace) -> bool:
    """Whether the bare board is to be watched: a file has that only once."""
    if options.check or options.power_s <= 0:
        return False
    if options.out is None or not options.out.exists():
        return True
    return all(entry["state"] != "idle_bare" for entry in read_result(options.out)["power"])


if __name__ == "__main__":
    try:
        main()
    except (ValueError, AttentionError, BenchError, ResultError) as problem:
        sys.exit(f"measure.py: {problem}")
