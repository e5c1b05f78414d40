"""What a step does, how long it takes, and which decode steps run together.

Functions of the batch as it is: they begin no step, and what comes of one is the model's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from conserve_serving.engines.model_batch import DecodeBatch, Work
from conserve_serving.engines.model_types import Step
from conserve_serving.engines.steptime import StepTimes


def prompt_step(
    decode: DecodeBatch, times: StepTimes, chunks: list[tuple[Work, int]], start_s: float
) -> tuple[Step, float]:
    """One step that computes prompt chunks, and beside them a token for every running request.

    Returns:
        The step, and the prompts' share of the work in it.
    """
    batch = len(decode.running)
    kv_tokens = decode.kv_tokens + batch
    chunk_tokens = sum([tokens for _, tokens in chunks])
    prefill_s = times.prefill_batch_s([(tokens, work.computed_tokens) for work, tokens in chunks])
    decode_s = 0.0
    duration_s = prefill_s
    if batch:
        decode_s = times.decode_s(batch, kv_tokens)
        duration_s = times.mixed_s(
            prefill_s, decode_s, chunk_tokens=chunk_tokens, batch=batch, kv_tokens=kv_tokens
        )
    step = Step(
        start_s=start_s,
        duration_s=duration_s,
        steps=1,
        prefill_tokens=chunk_tokens,
        prefill_requests=len(chunks),
        decode_batch=batch,
        decode_kv_tokens=kv_tokens,
    )
    return step, prefill_s / (prefill_s + decode_s)


def decode_steps(
    decode: DecodeBatch, times: StepTimes, start_s: float, until_s: float, limit: int
) -> Step:
    """The decode steps that run together from ``start_s``, without prompts. At least one.

    Args:
        decode: the batch, not empty.
        times: step times.
        start_s: when the first begins.
        until_s: each of the others begins before this.
        limit: at most so many steps, 1 or more.
    """
    steps, duration_s = _plan(decode, times, until_s - start_s, limit)
    return as_step(decode, start_s, steps, duration_s)


def as_step(decode: DecodeBatch, start_s: float, steps: int, duration_s: float) -> Step:
    """The batch's next ``steps`` decode steps as one."""
    batch = len(decode.running)
    return Step(
        start_s=start_s,
        duration_s=duration_s,
        steps=steps,
        prefill_tokens=0,
        prefill_requests=0,
        decode_batch=batch,
        decode_kv_tokens=steps * decode.kv_tokens + batch * steps * (steps + 1) // 2,
    )


def burst_limit(decode: DecodeBatch, free_pages: int) -> int:
    """How many decode steps may run before the batch changes: until the first request has all its
    tokens, or pages would have to be evicted.

    At least one: its pages have been taken, those of the others are when the steps are over.
    """
    limit = decode.steps_to_finish()
    pages = free_pages + decode.pages_for_one()
    if decode.pages_for(limit) > pages:
        limit = _last_true(1, limit, lambda steps: decode.pages_for(steps) <= pages)
    return limit


def _plan(decode: DecodeBatch, times: StepTimes, horizon_s: float, limit: int) -> tuple[int, float]:
    """How many decode steps begin within ``horizon_s`` from now, and how long they take.

    Step times are linear in the KV read for stretches at a time, so that their sums are exact.
    """
    batch = len(decode.running)
    steps, duration_s = 0, 0.0
    kv_tokens = decode.kv_tokens + batch
    while steps < limit and (not steps or duration_s < horizon_s):
        base_s, s_per_kv_token, until_kv_tokens = times.decode_line(batch, kv_tokens)
        count = limit - steps
        if kv_tokens + (count - 1) * batch > until_kv_tokens:
            count = max(1, int((until_kv_tokens - kv_tokens) // batch) + 1)
        first_s = base_s + s_per_kv_token * kv_tokens
        grows_s = s_per_kv_token * batch
        left_s = horizon_s - duration_s
        if _sum_s(count - 1, first_s, grows_s) >= left_s:
            count = _begun(left_s, first_s, grows_s)
        duration_s += _sum_s(count, first_s, grows_s)
        steps += count
        kv_tokens += count * batch
    return steps, duration_s


def _sum_s(count: int, first_s: float, grows_s: float) -> float:
    """Time of ``count`` steps of which the first takes ``first_s`` and each next more."""
    return count * (first_s + grows_s * (count - 1) / 2)


def _begun(left_s: float, first_s: float, grows_s: float) -> int:
    """How many steps begin before ``left_s`` have passed; the first does in any case."""
    if left_s <= 0.0:
        return 1
    count = left_s / first_s
    if grows_s > 0.0:  # the root of count · first + grows · count · (count − 1) / 2 = left
        half = first_s - grows_s / 2
        count = (math.sqrt(half * half + 2 * grows_s * left_s) - half) / grows_s
    begun = max(1, math.ceil(count))
    while begun > 1 and _sum_s(begun - 1, first_s, grows_s) >= left_s:  # it was rounded
        begun -= 1
    while _sum_s(begun, first_s, grows_s) < left_s:
        begun += 1
    return begun


def _last_true(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest n in [low, high] for which ``holds``; it holds at ``low`` and stops once."""
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
