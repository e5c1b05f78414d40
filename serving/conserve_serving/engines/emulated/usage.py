"""Token counts in SGLang's shapes (as with ``--enable-cache-report``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conserve_serving.engines.emulated.runtime import Generation


def usage_of(generations: Sequence[Generation]) -> dict[str, Any]:
    """The ``usage`` object, summed over prompts; of a stream, so far."""
    prompt = sum(generation.prompt_tokens for generation in generations)
    completion = sum(generation.emitted for generation in generations)
    cached = sum(generation.cached_tokens for generation in generations)
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "reasoning_tokens": 0,
        "completion_tokens_details": None,
    }


def cached_details(generation: Generation, *, with_storage: bool) -> dict[str, Any]:
    """Cached prompt tokens by where they came from; storage only where there is a store."""
    found = generation.prefill
    details: dict[str, Any] = {
        "device": found.cached_device_tokens if found else 0,
        "host": found.cached_host_tokens if found else 0,
    }
    if with_storage:
        details["storage"] = found.cached_storage_tokens if found else 0
        details["storage_backend"] = "dynamic"
    return details


def meta_info(generation: Generation, *, with_storage: bool, now_s: float) -> dict[str, Any]:
    """``meta_info`` of ``/generate``; latencies in model seconds."""
    return {
        "id": generation.rid,
        "finish_reason": generation.finish if generation.ended else None,
        "prompt_tokens": generation.prompt_tokens,
        "weight_version": "default",
        "total_retractions": generation.retractions,
        "completion_tokens": generation.emitted,
        "cached_tokens": generation.cached_tokens,
        "cached_tokens_details": cached_details(generation, with_storage=with_storage),
        "e2e_latency": now_s - generation.submitted_s,
    }


def response_head(generation: Generation, kind: str, created: int, model: str) -> dict[str, Any]:
    """The fields every OpenAI response begins with."""
    return {"id": generation.rid, "object": kind, "created": created, "model": model}
