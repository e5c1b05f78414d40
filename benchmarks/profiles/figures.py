"""What ``make_profiles.py`` puts together: GPUs, models, engines, and the band of each power model.

Constants stand here with their source; ``docs/profiles.md`` explains them.
"""

from __future__ import annotations

from typing import Any, Final

#: What one GPU has. ``memory_mib``: as nvidia-smi reports it. ``chunk_tokens`` and ``graph_batch``
#: (below and from tensor parallelism 4): SGLang 0.5.23's defaults for that memory
#: (arg_groups/memory_hook.py). ``power``, watts of one board: idle with a loaded model,
#: compute-bound prefill, decode as p0 + (ps - p0)(1 - exp(-batch/h)). The band around it is a
#: quarter either way within ``rated_w``, but where ``low`` and ``high`` say otherwise.
GPUS: Final[dict[str, dict[str, Any]]] = {
    "h100": {
        "gpu": "NVIDIA H100 SXM 80 GB",
        "system": "h100_sxm",
        "memory_mib": 81559,
        "chunk_tokens": 8192,
        "graph_batch": (256, 512),
        "rated_w": 700,
        "power": (120, 690, 410, 630, 96),
        "low": {"decode_p0_w": 300, "decode_ps_w": 630},
        "high": {"decode_p0_w": 470, "decode_ps_w": 690, "decode_h": 64},
        "power_confidence": "measured",
        "power_source": "decode: our fit to ML.ENERGY leaderboard points, batch 8-512, rmse 2-8 W "
        "(below batch 8 it reads high: 300 W reported at batch 1); idle: 75 W bare (Splitwise) "
        "+ context (arXiv 2605.23918), derived",
        "band_source": "low: decode from the 300 W at batch 1; high: the same fit for "
        "Llama-3.1-8B; idle and prefill 25 % either way, within 700 W",
    },
    "h200": {
        "gpu": "NVIDIA H200 SXM 141 GB",
        "system": "h200_sxm",
        "memory_mib": 143771,
        "chunk_tokens": 8192,
        "graph_batch": (256, 512),
        "rated_w": 700,
        "power": (120, 690, 300, 560, 96),
        "low": {"decode_p0_w": 137, "decode_ps_w": 300},
        "power_confidence": "derived",
        "power_source": "decode 137-300 W over four attention kinds (arXiv 2605.11999), upper half "
        "derived; idle taken from the H100",
        "band_source": "low: decode at the published 137-300 W; the rest 25 % either way, within "
        "700 W",
    },
    "a100": {
        "gpu": "NVIDIA A100 SXM 80 GB",
        "system": "a100_sxm",
        "memory_mib": 81920,
        "bandwidth_bytes_per_s": 2039e9,
        "chunk_tokens": 8192,
        "graph_batch": (256, 512),
        "rated_w": 400,
        "power": (95, 400, 175, 385, 48),
        "power_confidence": "derived",
        "power_source": "Splitwise: requests average 0.39-0.64 of TDP, prompts of 512 tokens and "
        "more 0.98-1.05; decode curve 175-385 W from vLLM fleet-sim",
        "band_source": "25 % either way, within 400 W",
    },
    "l40s": {
        "gpu": "NVIDIA L40S 48 GB",
        "system": "l40s",
        "memory_mib": 46068,
        "chunk_tokens": 4096,
        "graph_batch": (32, 160),
        "rated_w": 350,
        "power": (100, 345, 220, 335, 64),
        "power_confidence": "assumed",
        "power_source": "no public measurement of this load; idle derived from arXiv 2605.23918",
        "band_source": "25 % either way, within 350 W",
    },
    "a40": {
        "gpu": "NVIDIA A40 48 GB",
        "memory_mib": 46068,
        "chunk_tokens": 4096,
        "graph_batch": (32, 160),
        "rated_w": 300,
        "power": (75, 295, 190, 285, 64),
        "power_confidence": "assumed",
        "power_source": "300 W board, no measurement",
        "band_source": "25 % either way, within 300 W",
        # The tool does not know the A40. Compute: Vidur's dense GEMMs reach 109 TFLOPS there, the
        # tool's L40S 165. Memory: 864 against 696 GB/s.
        "derived_from": ("l40s", 1.51, 1.241),
        "derived_source": "prefill 1.51 times as long (dense GEMM 109 TFLOPS in Vidur's A40 tables "
        "against 165 in the L40S table), decode 1.241 times (864 against 696 GB/s of memory "
        "bandwidth); good to 20 % or so",
    },
}

#: ``weights_mib``: bf16, as the tool counts them. ``kv_bytes``: K and V, layers, KV heads, 128, 2
#: bytes (36 layers and 64, 8 heads). ``power``: a model that has a fit of its own on a GPU.
MODELS: Final[dict[str, dict[str, Any]]] = {
    "qwen3-8b": {
        "model": "Qwen/Qwen3-8B",
        "weights_mib": 15622,
        "kv_bytes": 2 * 36 * 8 * 128 * 2,
        "power": {},
    },
    "qwen3-32b": {
        "model": "Qwen/Qwen3-32B",
        "weights_mib": 62488,
        "kv_bytes": 2 * 64 * 8 * 128 * 2,
        "power": {
            "h100": {
                "power": (120, 690, 500, 670, 32),
                "low": {"decode_p0_w": 410, "decode_ps_w": 630, "decode_h": 96},
                "high": {},
                "power_source": "decode: our fit to ML.ENERGY leaderboard points of Qwen3-32B; "
                "idle: 75 W bare (Splitwise) + context (arXiv 2605.23918), derived",
                "band_source": "low: decode as with Qwen3-8B; the rest 25 % either way, within "
                "700 W",
            }
        },
    },
}
#: Qwen3-0.6B: 28 layers.
KV_BYTES_06B: Final = 2 * 28 * 8 * 128 * 2

#: (GPU, model, tensor parallelism): every engine made from the tool's tables.
ENGINES: Final = (
    ("h100", "qwen3-8b", 1),
    ("h200", "qwen3-8b", 1),
    ("a100", "qwen3-8b", 1),
    ("l40s", "qwen3-8b", 1),
    ("a40", "qwen3-8b", 1),
    ("h100", "qwen3-32b", 2),
    ("h200", "qwen3-32b", 1),
    ("a100", "qwen3-32b", 2),
    ("l40s", "qwen3-32b", 4),
)
#: Share of the memory bandwidth at which the variant of an engine reads KV in decode.
KV_READ_SHARE: Final = 0.8
KV_READ_VARIANTS: Final = (("a100", "qwen3-8b", 1), ("a100", "qwen3-32b", 2))


def engine_name(gpu: str, model: str, tensor_parallel: int, *, variant: str = "") -> str:
    """The name of a profile."""
    name = f"{gpu}{variant}-{model}"
    return name if tensor_parallel == 1 else f"{name}-tp{tensor_parallel}"


def kv_capacity_tokens(gpu: dict[str, Any], model: dict[str, Any], tensor_parallel: int) -> int:
    """Tokens of KV beside weights and SGLang's own reserve (``docs/profiles.md``)."""
    graph_batch = gpu["graph_batch"][tensor_parallel >= 4]
    reserve_mib = 512 + 1.5 * gpu["chunk_tokens"] + 1024 / 8 * tensor_parallel + 2 * graph_batch
    if gpu["memory_mib"] > 60 * 1024:
        reserve_mib = max(reserve_mib, 10 * 1024)
    free_mib = gpu["memory_mib"] - reserve_mib - model["weights_mib"] / tensor_parallel
    tokens = int(free_mib * 2**20) // (model["kv_bytes"] // tensor_parallel) // 64 * 64
    if tokens < 64:
        raise SystemExit(f"{model['model']} does not fit {tensor_parallel} x {gpu['gpu']}")
    return tokens


def power_fields(gpu: dict[str, Any], boards: int) -> dict[str, Any]:
    """The power model of an engine, and both ends of its band."""
    idle_w, prefill_w, p0_w, ps_w, h = gpu["power"]
    mid = {
        "idle_w": idle_w,
        "prefill_w": prefill_w,
        "decode_p0_w": p0_w,
        "decode_ps_w": ps_w,
        "decode_h": h,
    }
    fields = {"power": mid}
    for name, factor in (("low", 0.75), ("high", 1.25)):
        end = {
            key: min(round(value * factor, 2), gpu["rated_w"]) if key.endswith("_w") else value
            for key, value in mid.items()
        }
        fields[f"power_{name}"] = end | gpu.get(name, {})
    if boards > 1:
        fields = {name: power | {"boards": boards} for name, power in fields.items()}
    return fields
