"""What goes into and comes out of the engine model. Times in model seconds, sizes in tokens.

What is made for every request or step is a msgspec struct: it is made in a fifth of the time that
a frozen dataclass takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from conserve_serving.engines.content import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """How one engine is set up; what the hardware can do is the profile's.

    Attributes:
        page_tokens: KV page size; every prompt given to the model must use the same.
        max_running_requests: requests holding device KV at once (loading, prefilling, decoding).
        chunk_tokens: per-step token budget; None: the profile's.
        output_reserve_ratio: share of the running requests' remaining output limit that admission
            keeps free. SGLang: 1.0 for ``ignore_eos`` requests, else 0.7 decaying to 0.098.
        store_writes: whether prompts computed here are written to the hand-off store (prefiller).
        store_read_min_tokens: shorter hits in the store are computed instead of loaded (SGLang's
            ``prefetch_threshold``, 256).
        chunked_first: a prompt that has begun keeps its place in the next step before anything
            else, as in SGLang; False: priority decides anew at every step.
        session_protection: KV of open sessions is evicted only after all other KV
            (SGLang's ``--enable-session-radix-cache``).
        token_events: emit ``TokensEmitted``; a driver that only needs whole turns leaves it off.
        kv_capacity_tokens, host_capacity_tokens: smaller pools than the profile's, for tests and
            experiments; None: the profile's.
    """

    page_tokens: int = 64
    max_running_requests: int = 256
    chunk_tokens: int | None = None
    output_reserve_ratio: float = 1.0
    store_writes: bool = False
    store_read_min_tokens: int = 256
    chunked_first: bool = True
    session_protection: bool = True
    token_events: bool = True
    kv_capacity_tokens: int | None = None
    host_capacity_tokens: int | None = None


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request.

    Attributes:
        rid: unique among the requests in the engine.
        prompt: the prompt's content.
        output_tokens: tokens this request will really generate; 0 exactly when ``prefill_only``.
        max_output_tokens: the request's own limit, which admission reserves for; None: the same.
        context: prompt followed by output, where the driver knows the output's content; what it
            covers beyond the prompt becomes findable in the prefix tree when the request ends.
            None: only the prompt does. ``EngineModel.set_context`` may give it later.
        session_id: protects the KV this request leaves behind until the session is closed.
        priority: larger first; equal priorities in order of arrival.
        stored_tokens: leading prompt tokens that the hand-off store holds.
        prefill_only: compute the prompt's KV and stop (SGLang's ``max_new_tokens: 0``).
        stores: whether its prompt is written to the store, by an engine that writes to it.
        known_tokens: leading prompt tokens that need not be written, because the engine that will
            read the rest has them.
    """

    rid: str
    prompt: Prompt
    output_tokens: int
    max_output_tokens: int | None = None
    context: Prompt | None = None
    session_id: str | None = None
    priority: int = 0
    stored_tokens: int = 0
    prefill_only: bool = False
    stores: bool = True
    known_tokens: int = 0


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What the device does until ``start_s + duration_s``.

    Attributes:
        steps: identical decode steps covered (more than 1 only where ``until_s`` allowed it).
        prefill_tokens: uncached prompt tokens computed, over ``prefill_requests`` requests.
        decode_batch: requests that decode one token in each of the steps.
        decode_kv_tokens: KV tokens read by decode, summed over the steps.
    """

    start_s: float
    duration_s: float
    steps: int
    prefill_tokens: int
    prefill_requests: int
    decode_batch: int
    decode_kv_tokens: int

    @property
    def end_s(self) -> float:
        """Model time at which the step is over."""
        return self.start_s + self.duration_s


class PrefillDone(msgspec.Struct, frozen=True, kw_only=True):
    """The prompt's KV is complete (for the first time). Cached tokens by where they were.

    ``queued_s`` is the time it waited for admission.
    """

    rid: str
    at_s: float
    prompt_tokens: int
    cached_device_tokens: int
    cached_host_tokens: int
    cached_storage_tokens: int
    queued_s: float = 0.0


class TokensEmitted(msgspec.Struct, frozen=True, kw_only=True):
    """Each of these requests generated ``count`` more tokens."""

    rids: tuple[str, ...]
    at_s: float
    count: int


class RequestFinished(msgspec.Struct, frozen=True, kw_only=True):
    """The request is over and its KV is idle. ``cached_tokens`` is the sum over all places."""

    rid: str
    at_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    queued_s: float
    first_token_s: float | None


class PagesStored(msgspec.Struct, frozen=True, kw_only=True):
    """Every full page of the prompt is in the hand-off store (``tokens`` leading tokens).

    ``duration_s``: since the prompt was computed; waiting for the link included. ``sent_tokens``:
    how many of them crossed the link for it; the others were in the store, or not needed.
    """

    rid: str
    at_s: float
    tokens: int
    duration_s: float
    sent_tokens: int


class Retracted(msgspec.Struct, frozen=True, kw_only=True):
    """The request lost its device KV to others and went back to the queue; it will run again."""

    rid: str
    at_s: float


ModelEvent = PrefillDone | TokensEmitted | RequestFinished | PagesStored | Retracted


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounters:
    """Sums since the engine started; prefill beside decode counts as mixed, and only there.

    Attributes:
        decode_moments: SGLang's, as in ``/v1/loads``: ``[steps, Σbatch, Σµs, Σbatch², Σbatch·µs,
            Σgenerated]`` over the steps without prefill that followed another such step. The two
            totals below have the meaning they have there, too.
    """

    prefill_steps: int
    prefill_tokens: int
    prefill_s: float
    decode_steps: int
    decode_s: float
    decode_kv_tokens: int
    decode_batch_sum: int
    decode_moments: tuple[float, ...]
    mixed_steps: int
    mixed_s: float
    mixed_kv_tokens: int
    mixed_prefill_tokens: int
    mixed_batch_sum: int

    @property
    def total_prefill_uncached_tokens(self) -> int:
        """Prompt tokens computed, in steps of either kind."""
        return self.prefill_tokens + self.mixed_prefill_tokens

    @property
    def total_prefill_busy_us(self) -> int:
        """Microseconds of all steps with prefill in them (SGLang counts mixed steps here)."""
        return round((self.prefill_s + self.mixed_s) * 1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyJ:
    """Joules by what the device was doing; modelled, see ``power.py``."""

    idle_j: float = 0.0
    prefill_j: float = 0.0
    decode_j: float = 0.0
    mixed_j: float = 0.0

    @property
    def total_j(self) -> float:
        """The sum of the parts."""
        return self.idle_j + self.prefill_j + self.decode_j + self.mixed_j


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStats:
    """A reading of the engine. ``used + evictable + available == capacity``, on the device.

    An idle conversation's KV is *evictable*, as SGLang reports it; occupancy is used + evictable.
    """

    now_s: float
    capacity_tokens: int
    used_tokens: int
    evictable_tokens: int
    available_tokens: int
    host_capacity_tokens: int
    host_used_tokens: int
    running: int
    prefilling: int
    loading: int
    queued: int
    queued_tokens: int
    open_sessions: int
    finished_requests: int
    aborted_requests: int
    retractions: int
    cached_device_tokens: int
    cached_host_tokens: int
    cached_storage_tokens: int
    stored_tokens: int
    dropped_tokens: int
    counters: StepCounters
    energy: EnergyJ

    @property
    def held_tokens(self) -> int:
        """Device KV of running and idle conversations alike."""
        return self.used_tokens + self.evictable_tokens
