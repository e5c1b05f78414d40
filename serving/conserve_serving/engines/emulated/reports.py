"""What the engine says of itself: its settings, its load, its metrics."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

from conserve_serving.engines.emulated import tokenizer as tk
from conserve_serving.engines.emulated.errors import ApiError
from conserve_serving.engines.emulated.service import EngineService
from conserve_serving.engines.model_types import ModelStats

#: The SGLang release whose API this server answers.
SGLANG_VERSION: Final = "0.5.23"

_LOAD_SECTIONS: Final = frozenset({"core", "memory", "spec", "lora", "disagg", "queues", "all"})


def model_card(service: EngineService) -> dict[str, Any]:
    """The served model as ``/v1/models`` lists it."""
    name = service.config.model_name
    return {
        "id": name,
        "object": "model",
        "created": int(service.started_at),
        "owned_by": "sglang",
        "root": name,
        "parent": None,
        "max_model_len": service.context_length,
    }


def model_info(service: EngineService) -> dict[str, Any]:
    """``/model_info``."""
    name = service.config.model_name
    return {
        "model_path": name,
        "served_model_name": name,
        "tokenizer_path": name,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "load_format": "auto",
        "reasoning_parser": None,
        "tool_call_parser": "qwen25",
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": None,
        "architectures": None,
    }


def server_info(service: EngineService) -> dict[str, Any]:
    """``/server_info``: the fields a driver reads, and the ``conserve`` key."""
    config, profile, stats = service.config, service.profile, service.runtime.stats()
    return {
        "model_path": config.model_name,
        "served_model_name": config.model_name,
        "tokenizer_path": config.model_name,
        "host": config.host,
        "port": config.port,
        "dtype": config.dtype,
        "kv_cache_dtype": "auto",
        "context_length": service.context_length,
        "tp_size": profile.tensor_parallel,
        "dp_size": 1,
        "pp_size": 1,
        "page_size": config.page_tokens,
        "chunked_prefill_size": profile.chunk_tokens,
        "max_running_requests": config.max_running_requests,
        "schedule_policy": "fcfs",
        "enable_priority_scheduling": True,
        "schedule_low_priority_values_first": False,
        "enable_mixed_chunk": True,
        "enable_metrics": True,
        "enable_cache_report": True,
        "enable_hierarchical_cache": True,
        "hicache_write_policy": "write_through",
        "hicache_mem_layout": "page_first",
        "hicache_storage_backend": "dynamic" if service.store is not None else None,
        "hicache_storage_backend_extra_config": _store_config(service),
        "enable_session_radix_cache": config.session_protection,
        "enable_streaming_session": False,
        "disaggregation_mode": "null",
        "max_total_num_tokens": service.kv_capacity_tokens,
        "max_req_input_len": service.max_req_input_len,
        "startup_time": service.started_at,
        "internal_states": [{"memory_usage": {"token_capacity": service.kv_capacity_tokens}}],
        "version": SGLANG_VERSION,
        "frontend": "python",
        "conserve": _conserve(service, stats),
    }


def _store_config(service: EngineService) -> str | None:
    """The hand-off store's settings, as SGLang repeats what it was started with."""
    if service.store is None:
        return None
    config = service.config
    return json.dumps(
        {
            "module_path": "conserve_serving.engines.emulated.store",
            "class_name": "HandoffStore",
            "role": config.role.value,
            "engine": config.engine_id,
            "ack_url": config.ack_url or "",
        }
    )


def _conserve(service: EngineService, stats: ModelStats) -> dict[str, Any]:
    config, profile = service.config, service.profile
    steps = stats.counters
    power = profile.parts["power"]
    return {
        "emulated": True,
        "engine": config.engine_id,
        "role": config.role.value,
        "profile": profile.name,
        "profile_source": profile.source,
        "speed": config.speed,
        "vocab_size": tk.VOCAB_SIZE,
        "host_capacity_tokens": stats.host_capacity_tokens,
        "link": asdict(service.link),
        "speeds": asdict(service.speeds),
        "energy_j": stats.energy.total_j,
        "energy_by_state_j": asdict(stats.energy),
        "energy_source": f"modelled: {profile.name} ({power.confidence.value})",
        "model_time_s": service.runtime.now_s(),
        "lag_s": service.runtime.lag_s,
        "max_lag_s": service.runtime.max_lag_s,
        "mixed_steps": {
            "steps": steps.mixed_steps,
            "s": steps.mixed_s,
            "kv_tokens": steps.mixed_kv_tokens,
            "prefill_tokens": steps.mixed_prefill_tokens,
        },
        "decode_kv_tokens": steps.decode_kv_tokens,
        "retractions": stats.retractions,
        "acks_sent": service.acks.sent if service.acks is not None else 0,
        "acks_lost": service.acks.lost if service.acks is not None else 0,
        "handoffs_refused": service.store.refused if service.store is not None else 0,
    }


def loads(service: EngineService, query: dict[str, str]) -> dict[str, Any]:
    """``/v1/loads``.

    Args:
        service: the engine.
        query: ``include``: comma-separated sections; ``dp_rank``: 0 is the only one.

    Raises:
        ApiError: 400; an unknown section, or another rank.
    """
    include = {part.strip() for part in query.get("include", "all").split(",")}
    if not include <= _LOAD_SECTIONS:
        raise ApiError(
            f"Invalid include sections: {include - _LOAD_SECTIONS}. "
            f"Valid options: {sorted(_LOAD_SECTIONS)}",
            kind="400",
        )
    if query.get("dp_rank", "0") != "0":
        raise ApiError(f"dp_rank {query['dp_rank']}: this engine has rank 0 only", kind="400")
    stats = service.runtime.stats()
    moments = stats.counters.decode_moments
    load: dict[str, Any] = {
        "timestamp": time.time(),
        "dp_rank": 0,
        "num_running_reqs": running(stats),
        "num_waiting_reqs": stats.queued,
        "num_waiting_uncached_tokens": stats.queued_tokens,
        "num_used_tokens": stats.used_tokens,
        "num_total_tokens": stats.used_tokens + stats.queued_tokens,
        "num_active_tokens": stats.used_tokens + stats.queued_tokens,
        "num_prealloc_ready_tokens": 0,
        "max_total_num_tokens": stats.capacity_tokens,
        "max_running_requests": service.config.max_running_requests,
        "token_usage": round(stats.used_tokens / stats.capacity_tokens, 4),
        "gen_throughput": round(_throughput(stats), 2),
        "cache_hit_rate": round(_hit_rate(service), 4),
        "utilization": 0.0,
        "total_prefill_uncached_tokens": stats.counters.total_prefill_uncached_tokens,
        "total_prefill_busy_us": stats.counters.total_prefill_busy_us,
        "decode_moments": list(moments) if moments[0] else None,
    }
    if include & {"all", "queues"}:
        load["queues"] = {
            "waiting": stats.queued,
            "grammar": 0,
            "paused": 0,
            "retracted": 0,
            "prealloc_ready": 0,
        }
    return {
        "timestamp": datetime.now(UTC).isoformat(),
        "version": SGLANG_VERSION,
        "accelerator": service.profile.gpu,
        "num_accelerators": service.profile.tensor_parallel,
        "loads": [load],
    }


def running(stats: ModelStats) -> int:
    """Requests on the device: decoding, prefilling, or loading their KV."""
    return stats.running + stats.prefilling + stats.loading


def metrics(service: EngineService) -> str:
    """``/metrics``, in Prometheus' text format, with SGLang's names and labels."""
    stats, counters, config = service.runtime.stats(), service.counters, service.config
    base = f'model_name="{_escape(config.model_name)}",engine_type="unified"'
    rank = f'{base},tp_rank="0",pp_rank="0",moe_ep_rank="0"'
    lines: list[str] = []

    def gauge(name: str, value: float, text: str) -> None:
        lines.append(f"# HELP sglang:{name} {text}\n# TYPE sglang:{name} gauge")
        lines.append(f"sglang:{name}{{{rank}}} {float(value)}")

    def counter(name: str, text: str, *samples: tuple[str, float], labels: str = base) -> None:
        lines.append(f"# HELP sglang:{name} {text}\n# TYPE sglang:{name} counter")
        for label, value in samples:
            lines.append(f"sglang:{name}{{{labels}{label}}} {float(value)}")

    usage = stats.used_tokens / stats.capacity_tokens
    gauge("num_running_reqs", running(stats), "The number of running requests.")
    gauge("num_queue_reqs", stats.queued, "The number of requests in the waiting queue.")
    gauge("gen_throughput", _throughput(stats), "The generation throughput (token/s).")
    gauge("cache_hit_rate", _hit_rate(service), "The prefix cache hit rate.")
    gauge("token_usage", usage, "The token usage.")
    gauge("full_token_usage", usage, "The token usage for full attention layers.")
    gauge("num_used_tokens", stats.used_tokens, "The number of used tokens.")
    gauge("kv_available_tokens", stats.available_tokens, "Free token slots in the KV cache pool.")
    gauge("kv_evictable_tokens", stats.evictable_tokens, "Evictable (radix-cached) token slots.")
    gauge("kv_used_tokens", stats.used_tokens, "Actively used token slots in the KV cache pool.")
    gauge("max_total_num_tokens", stats.capacity_tokens, "Maximum total number of tokens.")
    gauge("page_size", config.page_tokens, "The page size of the KV cache.")
    gauge("context_len", service.context_length, "The context length.")
    gauge("hicache_host_used_tokens", stats.host_used_tokens, "Tokens in the host KV cache.")
    gauge("hicache_host_total_tokens", stats.host_capacity_tokens, "Capacity of the host KV cache.")
    counter(
        "num_retracted_requests_total",
        "Total number of retracted requests.",
        ("", stats.retractions),
        labels=rank,
    )
    for name, text, values in (
        ("prompt_tokens_total", "Number of prefill tokens processed.", counters.prompt_tokens),
        (
            "generation_tokens_total",
            "Number of generation tokens processed.",
            counters.generated_tokens,
        ),
        ("num_requests_total", "Number of requests processed.", counters.requests),
    ):
        samples = [(f',is_streaming="{str(key).lower()}"', float(values[key])) for key in values]
        counter(name, text, *samples)
    counter(
        "cached_tokens_total",
        "Number of cached prompt tokens by source.",
        (',cache_source="device"', counters.cached_device_tokens),
        (',cache_source="host"', counters.cached_host_tokens),
        (',cache_source="storage"', counters.cached_storage_tokens),
    )
    counter("num_aborted_requests_total", "Number of requests aborted.", ("", counters.aborted))
    counter(
        "prefetched_tokens_total",
        "Prompt tokens transferred from storage.",
        ("", counters.cached_storage_tokens),
    )
    counter("backuped_tokens_total", "Number of backuped tokens.", ("", counters.backed_up_tokens))
    return "\n".join(lines) + "\n"


def _throughput(stats: ModelStats) -> float:
    """Output tokens per model second of decode, since the start."""
    steps = stats.counters
    busy_s = steps.decode_s + steps.mixed_s
    return (steps.decode_batch_sum + steps.mixed_batch_sum) / busy_s if busy_s else 0.0


def _hit_rate(service: EngineService) -> float:
    counters = service.counters
    cached = (
        counters.cached_device_tokens + counters.cached_host_tokens + counters.cached_storage_tokens
    )
    prompts = sum(counters.prompt_tokens.values())
    return cached / prompts if prompts else 0.0


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
