"""Make the hardware profiles in ``serving/conserve_serving/engines/profiles``.

Two sources: step-time tables of the PyPI tool ``aiconfigurator`` (installed by this script into an
environment of its own, about 850 MB on disk), and the measured figures in ``a40_measured.json``.
Constants that neither has stand in this file with their source; ``docs/profiles.md`` explains.

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

from conserve_serving.engines.profile import parse_profile

HERE: Final = Path(__file__).resolve().parent
TARGET: Final = HERE.parents[1] / "serving/conserve_serving/engines/profiles"
TOOL: Final = "aiconfigurator==0.12.0"

NEW: Final = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
PREFIX: Final = [0, 2048, 8192, 16384, 32768, 65536, 98304]
BATCH: Final = [1, 2, 4, 8, 16, 32, 64, 128]
CTX: Final = [512, 2048, 4096, 8192, 16384, 32768, 65536, 98304]

#: What one GPU has. ``memory_mib``: as nvidia-smi reports it. ``chunk_tokens`` and ``graph_batch``:
#: SGLang 0.5.23's defaults for that memory (arg_groups/memory_hook.py). Watts: idle with a loaded
#: model, compute-bound prefill, decode as p0 + (ps - p0)(1 - exp(-batch/h)).
GPUS: Final[dict[str, dict[str, Any]]] = {
    "h100": {
        "gpu": "NVIDIA H100 SXM 80 GB",
        "system": "h100_sxm",
        "memory_mib": 81559,
        "chunk_tokens": 8192,
        "graph_batch": 256,
        "power": (120, 690, 410, 630, 96),
        "power_confidence": "measured",
        "power_source": "decode: our fit to ML.ENERGY leaderboard points, batch 8-512, rmse 2-8 W "
        "(below batch 8 it reads high: 300 W reported at batch 1); idle: 75 W bare (Splitwise) "
        "+ context (arXiv 2605.23918), derived",
    },
    "h200": {
        "gpu": "NVIDIA H200 SXM 141 GB",
        "system": "h200_sxm",
        "memory_mib": 143771,
        "chunk_tokens": 8192,
        "graph_batch": 256,
        "power": (120, 690, 300, 560, 96),
        "power_confidence": "derived",
        "power_source": "decode 137-300 W over four attention kinds (arXiv 2605.11999), upper half "
        "derived; idle taken from the H100",
    },
    "a100": {
        "gpu": "NVIDIA A100 SXM 80 GB",
        "system": "a100_sxm",
        "memory_mib": 81920,
        "chunk_tokens": 8192,
        "graph_batch": 256,
        "power": (95, 400, 175, 385, 48),
        "power_confidence": "derived",
        "power_source": "Splitwise: requests average 0.39-0.64 of TDP, prompts of 512 tokens and "
        "more 0.98-1.05; decode curve 175-385 W from vLLM fleet-sim",
    },
    "l40s": {
        "gpu": "NVIDIA L40S 48 GB",
        "system": "l40s",
        "memory_mib": 46068,
        "chunk_tokens": 4096,
        "graph_batch": 32,
        "power": (100, 345, 220, 335, 64),
        "power_confidence": "assumed",
        "power_source": "no public measurement of this load; idle derived from arXiv 2605.23918",
    },
}
MODEL: Final = "Qwen/Qwen3-8B"
#: 8.19 · 10⁹ parameters in bf16, as the tool counts them.
WEIGHTS_MIB: Final = 15622
#: 2 (K, V) · 36 layers · 8 KV heads · 128 · 2 bytes; Qwen3-0.6B: 2 · 28 · 8 · 128 · 2.
KV_BYTES_8B: Final = 147456
KV_BYTES_06B: Final = 114688
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


def kv_capacity_tokens(gpu: dict[str, Any], weights_mib: int, kv_bytes: int) -> int:
    """Tokens of KV beside weights and SGLang's own reserve (``docs/profiles.md``)."""
    reserve_mib = 512 + 1.5 * gpu["chunk_tokens"] + 1024 / 8 + 2 * gpu["graph_batch"]
    if gpu["memory_mib"] > 60 * 1024:
        reserve_mib = max(reserve_mib, 10 * 1024)
    free_mib = gpu["memory_mib"] - reserve_mib - weights_mib
    return int(free_mib * 2**20) // kv_bytes // 64 * 64


def tabulated(short: str, answer: dict[str, Any]) -> dict[str, Any]:
    """A profile from one answer of the tool."""
    gpu = GPUS[short]
    capacity = kv_capacity_tokens(gpu, WEIGHTS_MIB, KV_BYTES_8B)
    table = f"{TOOL}, {answer['system']}, SGLang {answer['database']} tables, tensor parallelism 1"
    idle_w, prefill_w, p0_w, ps_w, h = gpu["power"]
    return {
        "name": f"{short}-qwen3-8b",
        "gpu": gpu["gpu"],
        "model": MODEL,
        "tensor_parallel": 1,
        "source": f"tabulated: {table}",
        "parts": {
            "prefill": {"confidence": "tabulated", "source": table},
            "decode": {
                "confidence": "tabulated",
                "source": f"{table}; plus 0.5 ms + 0.06 ms per request and step, the difference "
                "from ML.ENERGY's H100 measurements (derived there, assumed elsewhere)",
            },
            "mixed": MIXED,
            "kv_capacity": {
                "confidence": "derived",
                "source": "memory less weights less SGLang 0.5.23's reserve, docs/profiles.md",
            },
            "host_capacity": HOST_TIER,
            "host_link": HOST_LINK,
            "handoff": {
                "confidence": "assumed",
                "source": "1 ms + 40 GB/s to the store, 80 % of one 400 Gb/s NIC; then the host "
                "link into the receiver",
            },
            "power": {"confidence": gpu["power_confidence"], "source": gpu["power_source"]},
        },
        "kv_capacity_tokens": capacity,
        "host_capacity_tokens": capacity,
        "kv_bytes_per_token": KV_BYTES_8B,
        "max_context_tokens": MAX_CONTEXT,
        "chunk_tokens": gpu["chunk_tokens"],
        "mixed_slowdown": 1.0,
        "host_link_bytes_per_s": 25e9,
        "prefill": {
            "kind": "table",
            "new_tokens": NEW,
            "prefix_tokens": PREFIX,
            "ms": rounded(answer["prefill_ms"]),
        },
        "decode": {
            "kind": "table",
            "batch": BATCH,
            "ctx_tokens": CTX,
            "ms": rounded(answer["decode_ms"]),
            "overhead_ms": 0.5,
            "overhead_ms_per_request": 0.06,
        },
        "handoff": {"kind": "affine", "setup_ms": 1.0, "bytes_per_s": 40e9},
        "power": {
            "idle_w": idle_w,
            "prefill_w": prefill_w,
            "decode_p0_w": p0_w,
            "decode_ps_w": ps_w,
            "decode_h": h,
        },
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
            "power": {"confidence": "assumed", "source": "300 W board, no measurement"},
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
        "power": {
            "idle_w": 75,
            "prefill_w": 295,
            "decode_p0_w": 190,
            "decode_ps_w": 285,
            "decode_h": 64,
        },
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


def rounded(ms: list[list[float]]) -> list[list[float]]:
    """To 0.1 µs, so that files stay small and comparable."""
    return [[round(value, 4) for value in row] for row in ms]


def to_text(profile: dict[str, Any]) -> str:
    """JSON, one table row or grid cell per line."""
    text = json.dumps(profile, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([-\d.,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    text = re.sub(r"\{\s+(\"batch\"[^}]+?)\s+\}", lambda m: f"{{{' '.join(m[1].split())}}}", text)
    return text + "\n"


def query(tool_python: Path, shorts: list[str]) -> dict[str, dict[str, Any]]:
    """Ask the tool for every GPU's tables."""
    grids = {"new": NEW, "prefix": PREFIX, "batch": BATCH, "ctx": CTX}
    wanted = [{"system": GPUS[s]["system"], "model": MODEL, **grids} for s in shorts]
    done = subprocess.run(
        [tool_python, HERE / "query_tables.py"],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{TOOL} failed:\n{done.stderr[-2000:]}")
    return dict(zip(shorts, json.loads(done.stdout), strict=True))


def main() -> int:
    """Write or check the profiles; 0 when all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tool-python", type=Path, help=f"a Python that has {TOOL}")
    parser.add_argument("--only", choices=["a40", *GPUS], help="make one profile")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args()

    profiles = []
    if options.only in (None, "a40"):
        profiles.append(measured_a40(json.loads((HERE / "a40_measured.json").read_text())))
    shorts = [short for short in GPUS if options.only in (None, short)]
    if shorts:
        with tempfile.TemporaryDirectory() as folder:
            python = options.tool_python
            if python is None:
                venv.create(folder, with_pip=True)
                python = Path(folder) / "bin" / "python"
                subprocess.run([python, "-m", "pip", "install", "--quiet", TOOL], check=True)
            answers = query(python, shorts)
        profiles += [tabulated(short, answers[short]) for short in shorts]

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
