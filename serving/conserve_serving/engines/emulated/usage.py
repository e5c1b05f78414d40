"""Token counts in SGLang's shapes (as with ``--enable-cache-report``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conserve_serving.engines.emulated.runtime import Generation
from conserve_serving.engines.emulated.store import HandoffStore


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


def cached_details(generation: Generation, *, with_storage: bool) -> dict[str, Any] | None:
    """Cached prompt tokens by where they came from; storage only where there is a store.

    None where nothing was cached.
    """
    found = generation.prefill
    if found is None or not generation.cached_tokens:
        return None
    details: dict[str, Any] = {
        "device": found.cached_device_tokens,
        "host": found.cached_host_tokens,
    }
    if with_storage:
        details["storage"] = found.cached_storage_tokens
        details["storage_backend"] = HandoffStore.__name__
    return details


def meta_info(generation: Generation, *, with_storage: bool, now_s: float) -> dict[str, Any]:
    """``meta_info`` of ``/generate``; latencies in model seconds."""
    return {
        "id": generation.rid,
        "finish_reason": generation.finish if generation.ended else None,
        "prompt_tokens": generation.prompt_tokens,
        **weight_metadata(generation),
        "num_retractions": generation.retractions,
        "completion_tokens": generation.emitted,
        "cached_tokens": generation.cached_tokens,
        "cached_tokens_details": cached_details(generation, with_storage=with_storage),
        "e2e_latency": now_s - generation.submitted_s,
    }


def weight_metadata(generation: Generation) -> dict[str, Any]:
    """The ``metadata`` of an OpenAI response: one version of the weights, for every token."""
    spans = [{"version": "default", "start": 0, "end": generation.emitted}]
    return {"weight_version": "default", "weight_versions": spans}


def response_head(generation: Generation, kind: str, created: int, model: str) -> dict[str, Any]:
    """The fields every OpenAI response begins with."""
    return {"id": generation.rid, "object": kind, "created": created, "model": model}
