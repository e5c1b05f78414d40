"""Make the hardware profiles in ``serving/conserve_serving/engines/profiles``.

Two sources: step-time tables of the PyPI tool ``aiconfigurator`` (installed by this script into an
environment of its own, about 850 MB on disk), and the measured figures in ``a40_measured.json``.
Constants that neither has stand in ``figures.py`` with their source.

    python benchmarks/profiles/make_profiles.py [--tool-python PATH] [--only NAME] [--check]

``--check`` writes nothing and fails when a shipped profile differs from what would be written.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any, Final

from figures import (
    ENGINES,
    GPUS,
    KV_BYTES_06B,
    KV_READ_SHARE,
    KV_READ_VARIANTS,
    MODELS,
    engine_name,
    kv_capacity_tokens,
    power_fields,
)

from conserve_serving.engines.profile import parse_profile

HERE: Final = Path(__file__).resolve().parent
TARGET: Final = HERE.parents[1] / "serving/conserve_serving/engines/profiles"
TOOL: Final = "aiconfigurator==0.12.0"

NEW: Final = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
PREFIX: Final = [0, 2048, 8192, 16384, 32768, 65536, 98304]
BATCH: Final = [1, 2, 4, 8, 16, 32, 64, 128]
CTX: Final = [512, 2048, 4096, 8192, 16384, 32768, 65536, 98304]

#: Native 40,960; 131,072 with YaRN, as the model card gives it. Agent histories need it.
MAX_CONTEXT: Final = 131072

HOST_LINK: Final = {
    "confidence": "assumed",
    "source": "25 GB/s, about 80 % of one direction of PCIe 4.0 x16",
}
HOST_TIER: Final = {
    "confidence": "assumed",
    "source": "SGLang's default hicache-ratio of 2.0: the host mirrors the device once and holds "
    "as much again",
}
MIXED: Final = {
    "confidence": "assumed",
    "source": "1.0: a mixed step takes the sum of its parts; no public measurement of more",
}


def tabulated(engine: tuple[str, str, int], answer: dict[str, Any]) -> dict[str, Any]:
    """A profile from one answer of the tool, scaled where the tool does not know the GPU."""
    short, model_name, ranks = engine
    model = MODELS[model_name]
    gpu = GPUS[short] | model["power"].get(short, {})
    capacity = kv_capacity_tokens(gpu, model, ranks)
    tables = f"{answer['system']}, SGLang {answer['database']} tables"
    table = f"{TOOL}, {tables}, tensor parallelism {ranks}"
    slower_prefill = slower_decode = 1.0
    confidence, how = "tabulated", table
    if "derived_from" in gpu:
        _, slower_prefill, slower_decode = gpu["derived_from"]
        confidence, how = "derived", f"{table}; {gpu['derived_source']}"
    each = "" if ranks == 1 else f" for each of {ranks} GPUs"
    return {
        "name": engine_name(short, model_name, ranks),
        "gpu": gpu["gpu"],
        "model": model["model"],
        "tensor_parallel": ranks,
        "source": f"{confidence}: {table}",
        "parts": {
            "prefill": {"confidence": confidence, "source": how},
            "decode": {
                "confidence": confidence,
                "source": f"{how}; plus 0.5 ms + 0.06 ms per request and step, the difference "
                "from ML.ENERGY's H100 measurements (derived there, assumed elsewhere)",
            },
            "mixed": MIXED,
            "kv_capacity": {
                "confidence": "derived",
                "source": "memory less weights less SGLang 0.5.23's reserve, docs/profiles.md",
            },
            "host_capacity": HOST_TIER,
            "host_link": {**HOST_LINK, "source": HOST_LINK["source"] + each},
            "handoff": {
                "confidence": "assumed",
                "source": f"1 ms + 40 GB/s{each} to the store, 80 % of one 400 Gb/s NIC; then the "
                "host link into the receiver",
            },
            "power": {
                "confidence": gpu["power_confidence"],
                "source": f"{gpu['power_source']}. {gpu['band_source']}",
            },
        },
        "kv_capacity_tokens": capacity,
        "host_capacity_tokens": capacity,
        "kv_bytes_per_token": model["kv_bytes"],
        "max_context_tokens": MAX_CONTEXT,
        "chunk_tokens": gpu["chunk_tokens"],
        "mixed_slowdown": 1.0,
        "host_link_bytes_per_s": 25e9 * ranks,
        "prefill": {
            "kind": "table",
            "new_tokens": NEW,
            "prefix_tokens": PREFIX,
            "ms": rounded(answer["prefill_ms"], slower_prefill),
        },
        "decode": {
            "kind": "table",
            "batch": BATCH,
            "ctx_tokens": CTX,
            "ms": rounded(answer["decode_ms"], slower_decode),
            "overhead_ms": 0.5,
            "overhead_ms_per_request": 0.06,
        },
        "handoff": {"kind": "affine", "setup_ms": 1.0, "bytes_per_s": 40e9 * ranks},
        **power_fields(gpu, ranks),
    }


def reading_kv_well(profile: dict[str, Any], engine: tuple[str, str, int]) -> dict[str, Any]:
    """The same engine if its decode read KV at ``KV_READ_SHARE`` of the memory bandwidth.

    What the table has at no KV at all, by its first slope, stays; from there the line rises with
    the bytes read.
    """
    short, model_name, ranks = engine
    bytes_per_s = KV_READ_SHARE * GPUS[short]["bandwidth_bytes_per_s"] * ranks
    ms_per_token = profile["kv_bytes_per_token"] / bytes_per_s * 1e3
    decode = profile["decode"]
    ms = []
    for batch, row in zip(decode["batch"], decode["ms"], strict=True):
        first, second, *_ = (batch * ctx for ctx in decode["ctx_tokens"])
        at_none = row[0] - (row[1] - row[0]) / (second - first) * first
        ms.append([at_none + ms_per_token * batch * ctx for ctx in decode["ctx_tokens"]])
    source = (
        f"{KV_READ_SHARE:.0%} of {GPUS[short]['bandwidth_bytes_per_s'] / 1e9:,.0f} GB/s per GPU "
        "for reading KV, on the table's times without any; the table reads at a third to two thirds"
    )
    parts = profile["parts"] | {
        "decode": {
            "confidence": "derived",
            "source": f"{source}. {profile['parts']['decode']['source']}",
        }
    }
    return profile | {
        "name": engine_name(short, model_name, ranks, variant="-kv80"),
        "source": f"derived: {profile['parts']['prefill']['source']}; decode: {source}",
        "parts": parts,
        "decode": decode | {"ms": rounded(ms)},
    }


def measured_a40(figures: dict[str, Any]) -> dict[str, Any]:
    """The A40 profile, fitted to the quoted figures."""
    grid = [tuple(row) for row in figures["decode_grid"]]
    scan, transfer = figures["prefill_with_cached_prefix"], figures["kv_transfer"]
    chunk = 2944
    return {
        "name": "a40-qwen3-0.6b",
        "gpu": "NVIDIA A40 48 GB",
        "model": figures["model"],
        "tensor_parallel": 1,
        "source": f"measured: {figures['source']}",
        "parts": {
            "prefill": {
                "confidence": "measured",
                "source": f"{figures['source']}; cost per new token derived from 1.634 "
                "conversations/s of 15,488 tokens saturating one prefiller",
            },
            "decode": {
                "confidence": "measured",
                "source": f"{figures['source']}; {figures['engine']}; fit of the shipped grid",
            },
            "mixed": MIXED,
            "kv_capacity": {"confidence": "measured", "source": figures["source"]},
            "host_capacity": HOST_TIER,
            "host_link": HOST_LINK,
            "handoff": {
                "confidence": "measured",
                "source": f"{figures['source']}; NIXL between two GPUs of one host. The slope is "
                "116 GB/s of KV: more than one NVLink bridge direction carries (56 GB/s), so it is "
                "a lower bound of the time",
            },
            "power": {
                "confidence": GPUS["a40"]["power_confidence"],
                "source": f"{GPUS['a40']['power_source']}. {GPUS['a40']['band_source']}",
            },
        },
        "kv_capacity_tokens": figures["kv_capacity_tokens"],
        "host_capacity_tokens": figures["kv_capacity_tokens"],
        "kv_bytes_per_token": KV_BYTES_06B,
        "max_context_tokens": MAX_CONTEXT,
        "chunk_tokens": chunk,
        "mixed_slowdown": 1.0,
        "host_link_bytes_per_s": 25e9,
        "prefill": {
            "kind": "scan",
            "floor_ms": scan["floor_ms"],
            "knee_tokens": scan["knee_tokens"],
            "offset_ms": scan["offset_ms"],
            "us_per_prefix_token": scan["slope_us_per_context_token"],
            "us_per_new_token": us_per_new_token(figures, chunk),
        },
        "decode": fit_knee(grid),
        "handoff": {
            "kind": "fit",
            "floor_ms": transfer["low_ms"],
            "floor_tokens": transfer["knee_tokens"],
            "offset_ms": transfer["offset_ms"],
            "us_per_token": transfer["slope_us_per_token"],
        },
        **power_fields(GPUS["a40"], 1),
        "decode_grid": [
            {"batch": batch, "ctx_tokens": ctx, "kv_tokens": kv, "ms": ms}
            for batch, ctx, kv, ms in grid
        ],
    }


def us_per_new_token(figures: dict[str, Any], chunk: int) -> float:
    """Cost of a prompt token such that mean prompts, packed into full steps, saturate as measured.

    Over full steps the equivalent prefix averages ``mean / 2 - chunk / 2`` (``steptime.py``).
    """
    cold = figures["cold_prefill"]
    mean = int(cold["mean_first_input_tokens"])
    slope_us = float(figures["prefill_with_cached_prefix"]["slope_us_per_context_token"])
    scan_us = slope_us * (mean - chunk) / 2 * (mean / chunk)
    rate_per_s = float(cold["saturated_conversations_per_s"])
    return round((1e6 / rate_per_s - scan_us) / mean, 4)


def fit_knee(grid: list[tuple[int, int, int, float]]) -> dict[str, Any]:
    """``max(floor(batch), line)``: medians below the knee, least relative squares above it."""
    floor_batch = [1, 2, 32, 64, 128]
    floor_ms = []
    for batch in floor_batch:
        cells = sorted(ms for b, _, kv, ms in grid if b == batch and kv < 45_000)
        middle = len(cells) // 2
        floor_ms.append(round((cells[middle] + cells[~middle]) / 2, 4))
    rows = [((1 / ms, b / ms, kv / ms), 1.0) for b, _, kv, ms in grid if kv > 90_000]
    line_ms, per_request, per_kv = least_squares(rows)
    return {
        "kind": "knee",
        "floor_batch": floor_batch,
        "floor_ms": floor_ms,
        "line_ms": round(line_ms, 4),
        "line_us_per_request": round(per_request * 1e3, 4),
        "line_us_per_kv_token": round(per_kv * 1e3, 6),
    }


def least_squares(rows: list[tuple[tuple[float, float, float], float]]) -> list[float]:
    """Three coefficients, by the normal equations and elimination with pivoting."""
    matrix = [
        [sum(x[i] * x[j] for x, _ in rows) for j in range(3)] + [sum(x[i] * y for x, y in rows)]
        for i in range(3)
    ]
    for column in range(3):
        pivot = max(range(column, 3), key=lambda row: abs(matrix[row][column]))
        matrix[column], matrix[pivot] = matrix[pivot], matrix[column]
        for row in range(3):
            if row != column:
                factor = matrix[row][column] / matrix[column][column]
                matrix[row] = [
                    a - factor * b for a, b in zip(matrix[row], matrix[column], strict=True)
                ]
    return [matrix[i][3] / matrix[i][i] for i in range(3)]


def rounded(ms: list[list[float]], factor: float = 1.0) -> list[list[float]]:
    """Times ``factor``, to 0.1 µs, so that files stay small and comparable."""
    return [[round(value * factor, 4) for value in row] for row in ms]


def to_text(profile: dict[str, Any]) -> str:
    """JSON, one table row or grid cell per line."""
    text = json.dumps(profile, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([-\d.,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    text = re.sub(r"\{\s+(\"batch\"[^}]+?)\s+\}", lambda m: f"{{{' '.join(m[1].split())}}}", text)
    return text + "\n"


def query(tool_python: Path, engines: list[tuple[str, str, int]]) -> list[dict[str, Any]]:
    """Ask the tool for the tables of every engine, in order."""
    grids = {"new": NEW, "prefix": PREFIX, "batch": BATCH, "ctx": CTX}
    wanted = []
    for short, model, ranks in engines:
        base = GPUS[short].get("derived_from", (short,))[0]
        asked = {"system": GPUS[base]["system"], "model": MODELS[model]["model"], "ranks": ranks}
        wanted.append(asked | grids)
    done = subprocess.run(
        [tool_python, HERE / "query_tables.py"],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{TOOL} failed:\n{done.stderr[-2000:]}")
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def from_tables(tool_python: Path | None, only: str | None) -> list[dict[str, Any]]:
    """Every profile that rests on the tool's tables, or the one asked for."""
    variants = {engine: engine_name(*engine, variant="-kv80") for engine in KV_READ_VARIANTS}
    engines = [
        engine
        for engine in ENGINES
        if only in (None, engine_name(*engine), variants.get(engine, ""))
    ]
    if not engines:
        return []
    with tempfile.TemporaryDirectory() as folder:
        if tool_python is None:
            venv.create(folder, with_pip=True)
            tool_python = Path(folder) / "bin" / "python"
            subprocess.run([tool_python, "-m", "pip", "install", "--quiet", TOOL], check=True)
        answers = query(tool_python, engines)
    profiles = []
    for engine, answer in zip(engines, answers, strict=True):
        profiles.append(tabulated(engine, answer))
        if engine in variants:
            profiles.append(reading_kv_well(profiles[-1], engine))
    return [profile for profile in profiles if only in (None, profile["name"])]


def main() -> int:
    """Write or check the profiles; 0 when all is well."""
    names = [
        "a40-qwen3-0.6b",
        *(engine_name(*engine) for engine in ENGINES),
        *(engine_name(*engine, variant="-kv80") for engine in KV_READ_VARIANTS),
    ]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tool-python", type=Path, help=f"a Python that has {TOOL}")
    parser.add_argument("--only", choices=names, help="make one profile")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args()

    profiles = from_tables(options.tool_python, options.only)
    if options.only in (None, "a40-qwen3-0.6b"):
        profiles.append(measured_a40(json.loads((HERE / "a40_measured.json").read_text())))

    changed = 0
    TARGET.mkdir(exist_ok=True)
    for profile in profiles:
        path, text = TARGET / f"{profile['name']}.json", to_text(profile)
        parse_profile(text.encode(), origin=profile["name"])
        same = path.exists() and path.read_text() == text
        changed += not same
        if not options.check:
            path.write_text(text)
        print(f"{profile['name']}: {'unchanged' if same else 'changed'}")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
