"""Sums the engine model keeps since its start, and what it says of itself with them."""

from __future__ import annotations

from conserve_serving.engines.kv import KvPool
from conserve_serving.engines.model_batch import State, Work
from conserve_serving.engines.model_desk import Desk
from conserve_serving.engines.model_types import ModelStats, Step, StepCounters
from conserve_serving.engines.power import EnergyMeter


class Counters:
    """Mutable sums behind ``ModelStats``; only the model writes them.

    Attributes:
        recomputed_tokens: prompt tokens computed again after a retraction.
        abandoned_tokens: prompt tokens computed for requests that were aborted, or retracted,
            before their prompts were complete.
        first_tokens: output tokens that came with a prefill rather than a decode step.
        abandoned_output_tokens: output tokens of requests that were aborted.
    """

    def __init__(self) -> None:
        self.recomputed_tokens = 0
        self.abandoned_tokens = 0
        self.first_tokens = 0
        self.abandoned_output_tokens = 0
        self.finished_requests = 0
        self.aborted_requests = 0
        self.retractions = 0
        self.cached_device_tokens = 0
        self.cached_host_tokens = 0
        self.cached_storage_tokens = 0
        self.stored_tokens = 0
        self._prefill_steps = self._prefill_tokens = 0
        self._prefill_s = 0.0
        self._decode_steps = self._decode_kv_tokens = 0
        self._decode_s = 0.0
        self._decode_batch_sum = 0
        self._moments = [0.0] * 6
        self._decoded_until_s: float | None = None  # end of the last step, if it was decode only
        self._mixed_steps = self._mixed_kv_tokens = self._mixed_prefill_tokens = 0
        self._mixed_batch_sum = 0
        self._mixed_s = 0.0

    def step(self, step: Step) -> None:
        """Count a step that has ended."""
        if not step.prefill_tokens:
            self._decode_steps += step.steps
            self._decode_s += step.duration_s
            self._decode_kv_tokens += step.decode_kv_tokens
            self._decode_batch_sum += step.steps * step.decode_batch
            self._moment(step)
            self._decoded_until_s = step.start_s + step.duration_s
            return
        self._decoded_until_s = None
        if step.decode_batch:
            self._mixed_steps += 1
            self._mixed_s += step.duration_s
            self._mixed_kv_tokens += step.decode_kv_tokens
            self._mixed_prefill_tokens += step.prefill_tokens
            self._mixed_batch_sum += step.decode_batch
        else:
            self._prefill_steps += 1
            self._prefill_s += step.duration_s
            self._prefill_tokens += step.prefill_tokens

    def _moment(self, step: Step) -> None:
        """SGLang times decode by its cadence: a step that no decode step led up to has none."""
        steps, batch, us = step.steps, step.decode_batch, step.duration_s * 1e6
        if self._decoded_until_s != step.start_s:
            us *= (steps - 1) / steps
            steps -= 1
        generated = steps * batch
        moments = self._moments
        moments[0] += steps
        moments[1] += generated
        moments[2] += us
        moments[3] += generated * batch
        moments[4] += batch * us
        moments[5] += generated

    def cached(self, work: Work) -> None:
        """Count a prompt's cached tokens, once, when its prefill is complete."""
        self.cached_device_tokens += work.cached_device
        self.cached_host_tokens += work.cached_host
        self.cached_storage_tokens += work.cached_storage

    def abandoned(self, work: Work, chunk_tokens: int = 0) -> None:
        """Count what has been computed of a prompt that will not be completed.

        Args:
            work: its request, where it was when that was decided.
            chunk_tokens: of the prompt, what the step in progress computes.
        """
        if work.prefilled:
            self.recomputed_tokens += chunk_tokens
            return
        self.abandoned_tokens += chunk_tokens
        if work.state is State.READY:
            self.abandoned_tokens += work.computed_tokens - work.cached_tokens

    def sums(self) -> tuple[int, float, int, float, int, int, float, int, int]:
        """What the scheduler's ``StepTimes`` reports, in the order of its fields."""
        return (
            self._prefill_tokens,
            self._prefill_s,
            self._decode_steps,
            self._decode_s,
            self._decode_kv_tokens,
            self._mixed_steps,
            self._mixed_s,
            self._mixed_kv_tokens,
            self._mixed_prefill_tokens,
        )

    def reading(self) -> StepCounters:
        """The step sums as a value."""
        return StepCounters(
            prefill_steps=self._prefill_steps,
            prefill_tokens=self._prefill_tokens,
            prefill_s=self._prefill_s,
            decode_steps=self._decode_steps,
            decode_s=self._decode_s,
            decode_kv_tokens=self._decode_kv_tokens,
            decode_batch_sum=self._decode_batch_sum,
            decode_moments=tuple(self._moments),
            mixed_steps=self._mixed_steps,
            mixed_s=self._mixed_s,
            mixed_kv_tokens=self._mixed_kv_tokens,
            mixed_prefill_tokens=self._mixed_prefill_tokens,
            mixed_batch_sum=self._mixed_batch_sum,
        )


def read_stats(
    now_s: float, pool: KvPool, desk: Desk, counters: Counters, energy: EnergyMeter
) -> ModelStats:
    """A reading of everything an engine has, as of ``now_s``."""
    return ModelStats(
        now_s=now_s,
        capacity_tokens=pool.capacity_tokens,
        used_tokens=pool.used_tokens,
        evictable_tokens=pool.evictable_tokens,
        available_tokens=pool.available_tokens,
        host_capacity_tokens=pool.host_capacity_tokens,
        host_used_tokens=pool.host_used_tokens,
        running=desk.held[State.DECODING],
        prefilling=desk.held[State.READY],
        loading=desk.held[State.LOADING],
        queued=desk.held[State.QUEUED],
        queued_tokens=desk.queued_tokens,
        open_sessions=len(pool.sessions.leaves),
        finished_requests=counters.finished_requests,
        aborted_requests=counters.aborted_requests,
        retractions=counters.retractions,
        cached_device_tokens=counters.cached_device_tokens,
        cached_host_tokens=counters.cached_host_tokens,
        cached_storage_tokens=counters.cached_storage_tokens,
        stored_tokens=counters.stored_tokens,
        dropped_tokens=pool.dropped_tokens_total,
        counters=counters.reading(),
        energy=energy.reading(),
    )
