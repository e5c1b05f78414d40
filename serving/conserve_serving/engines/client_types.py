"""What an engine says of itself, as values; and step times from two successive readings."""

from __future__ import annotations

from dataclasses import dataclass

from conserve_serving.core.events import StepTimes
from conserve_serving.core.types import EngineSpeeds, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedExtension:
    """The ``conserve`` key of ``/server_info``, which only the emulated engine has.

    Attributes:
        profile: hardware profile it runs.
        speed: how much faster than the wall clock its model runs.
        energy_j: joules since it started, by the profile's power model.
        energy_source: says that they are modelled, and by what.
        model_time_s: model seconds since it started.
    """

    profile: str
    speed: float
    host_capacity_tokens: int
    link: Link
    speeds: EngineSpeeds
    energy_j: float
    energy_source: str
    model_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDescription:
    """What joining needs to know of an engine.

    Attributes:
        model: the name it serves its model under.
        kv_layout: what must agree between engines that exchange KV pages and is not part of
            their keys: page size, data types, memory layout, tensor-parallel size.
        keeps_sessions: it can hold a conversation's KV on the device between turns.
        takes_priority: it orders waiting requests by ``priority``.
        low_priority_first: the smaller value goes first there.
        version: of the server, empty when it does not say.
        emulated: set when it is an emulated engine.
        handoff_role: ``prefill``, ``decode`` or ``both``, where it runs our hand-off store.
    """

    model: str
    page_tokens: int
    kv_capacity_tokens: int
    max_context_tokens: int
    kv_layout: str
    keeps_sessions: bool
    takes_priority: bool
    low_priority_first: bool
    version: str
    emulated: EmulatedExtension | None
    handoff_role: str | None = None

    @property
    def cannot_acknowledge(self) -> bool:
        """Whether it is SGLang without our store, which will never say that a prompt is stored."""
        return bool(self.version) and self.emulated is None and self.handoff_role is None

    def priority_field(self, priority: int) -> int | None:
        """The value to send for ``priority`` (larger first); None: send none."""
        if not self.takes_priority:
            return None
        return -priority if self.low_priority_first else priority


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """``/v1/loads``: requests now, and counters since the engine started (summed over ranks).

    Attributes:
        waiting_uncached_tokens: an estimate: SGLang takes its recent cache hit rate for what
            waits, unless its policy looks at caches (``load_inquirer.py`` of 0.5.23).
        prefill_tokens: uncached prompt tokens computed.
        prefill_busy_us: time spent on them.
        decode_steps: decode steps timed (those between two other decode steps).
        decode_batch_sum: sum over those steps of the requests in the batch.
        decode_us: sum of their durations.
        decode_generated_tokens: tokens they produced.
    """

    running_requests: int
    waiting_requests: int
    waiting_uncached_tokens: int
    prefill_tokens: int
    prefill_busy_us: int
    decode_steps: int
    decode_batch_sum: float
    decode_us: float
    decode_generated_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """KV of an engine. An idle conversation's KV counts as evictable, so held is the sum.

    Attributes:
        host_used_tokens, host_total_tokens: of the host tier; None when it has none.
    """

    kv_used_tokens: int
    kv_evictable_tokens: int
    host_used_tokens: int | None = None
    host_total_tokens: int | None = None

    @property
    def kv_held_tokens(self) -> int:
        """Tokens on the device, in use or not."""
        return self.kv_used_tokens + self.kv_evictable_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    """Token ids of a prompt, and the longest context the model takes (None: it does not say)."""

    tokens: list[int]
    max_model_len_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """A prefill without generation: prompt length, and how much of it was cached."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """One entry of ``/v1/models``."""

    id: str
    max_context_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDelta:
    """Steps between two readings of ``/v1/loads``.

    Attributes:
        times: with ``decode_kv_tokens`` 0: the engine does not count what its steps read. The
            caller, who knows the contexts, puts its estimate there.
        decode_batch_sum: sum over the decode steps of the requests in the batch; times the mean
            context length it is ``decode_kv_tokens``.
        decode_generated_tokens: tokens those steps produced.
    """

    times: StepTimes
    decode_batch_sum: float
    decode_generated_tokens: float


def step_delta(before: Loads, after: Loads) -> StepDelta | None:
    """What the engine did between two readings.

    SGLang times decode steps only where the step before was one too, and counts a step with
    prefill in it as prefill: the ``mixed`` sums stay 0 here.

    Returns:
        None when a counter went backwards: the engine has restarted, its KV is gone.
    """
    prefill_tokens = after.prefill_tokens - before.prefill_tokens
    prefill_us = after.prefill_busy_us - before.prefill_busy_us
    steps = after.decode_steps - before.decode_steps
    batch_sum = after.decode_batch_sum - before.decode_batch_sum
    decode_us = after.decode_us - before.decode_us
    generated = after.decode_generated_tokens - before.decode_generated_tokens
    if min(prefill_tokens, prefill_us, steps, batch_sum, decode_us, generated) < 0:
        return None
    return StepDelta(
        times=StepTimes(
            prefill_tokens=prefill_tokens,
            prefill_s=prefill_us / 1e6,
            decode_steps=steps,
            decode_s=decode_us / 1e6,
        ),
        decode_batch_sum=batch_sum,
        decode_generated_tokens=generated,
    )
