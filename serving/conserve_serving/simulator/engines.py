"""One engine of the virtual cluster: a model of it, driven through virtual time.

Decode steps run together until the model says otherwise; what is submitted or aborted in their
midst cuts them short, and the agenda's entry for their former end finds that it is stale. A step
begins when everything that happens at that time has happened.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import sub

from conserve_serving.core.events import EngineJoined, EngineReported, StepTimes
from conserve_serving.core.types import EngineId, Tier
from conserve_serving.engines.errors import ModelError
from conserve_serving.engines.model import EngineModel
from conserve_serving.engines.model_types import ModelConfig, ModelEvent, ModelRequest, PrefillDone
from conserve_serving.engines.profile import HardwareProfile
from conserve_serving.simulator.agenda import Agenda
from conserve_serving.simulator.errors import SimulationError
from conserve_serving.simulator.summary import EngineUse

_STEP_FIELDS = tuple(StepTimes.__dataclass_fields__)
_NOTHING = StepTimes()


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedEngine:
    """One engine of the cluster."""

    id: EngineId
    tier: Tier
    profile: HardwareProfile
    config: ModelConfig


class Engine:
    """A model with its place in virtual time.

    Args:
        spec: what it is.
        agenda: the clock.
        tell: takes what happened on it.
        dirty: engines that are to look for work when everything of this time has happened.
        single_steps: never let decode steps run together; much slower, and the same.
        model: what stands in for it.
    """

    __slots__ = (
        "_agenda",
        "_dirty",
        "_generation",
        "_is_dirty",
        "_read",
        "_stored_s",
        "_tell",
        "_until_s",
        "alive",
        "asked_tokens",
        "cached_tokens",
        "epoch",
        "id",
        "lost_s",
        "model",
        "output_tokens",
        "spec",
    )

    def __init__(
        self,
        spec: SimulatedEngine,
        agenda: Agenda,
        tell: Callable[[Engine, list[ModelEvent]], None],
        dirty: list[Engine],
        *,
        single_steps: bool,
        model: type[EngineModel] = EngineModel,
    ) -> None:
        self.spec = spec
        self.id = spec.id
        config = dataclasses.replace(spec.config, token_events=False)  # nobody looks at them
        try:
            self.model = model(spec.profile, config)
        except ModelError as error:
            raise SimulationError(f"engine {spec.id}: {error}") from error
        self.alive = True
        self.lost_s: float | None = None
        self.epoch = 1
        self.asked_tokens = self.cached_tokens = self.output_tokens = 0
        self._agenda = agenda
        self._tell = tell
        self._dirty = dirty
        self._is_dirty = False
        self._until_s = None if single_steps else math.inf
        self._generation = 0  # of the entry in the agenda that is not stale
        self._stored_s = -math.inf  # the newest hand-off whose end is in the agenda
        self._read = self.model.counters.sums()

    # --- what is asked of it -----------------------------------------------------------------
    def submit(self, request: ModelRequest) -> None:
        """Give it a request.

        Raises:
            RequestTooLargeError: it can never run here.
        """
        if not self.alive:
            raise AssertionError(f"{self.id} is lost and was given {request.rid}")
        model = self.model
        before = model.step
        model.submit(request, now_s=self._agenda.now_s)
        self._changed(before is not model.step)

    def abort(self, rid: str) -> None:
        """Take a request away from it."""
        model = self.model
        before = model.step
        if self.alive and model.abort(rid, now_s=self._agenda.now_s):
            self._changed(before is not model.step)

    def send(self, request: ModelRequest, *, known_tokens: int) -> None:
        """Write what it has of the request's prompt to the store, but what the reader knows."""
        self.model.send(
            request.rid, request.prompt, known_tokens=known_tokens, now_s=self._agenda.now_s
        )
        self._watch_stored()

    def close_session(self, session: str, *, free: bool) -> None:
        """End the protection of a session's KV; ``free``: let it leave the engine, too."""
        now_s = self._agenda.now_s
        self.model.close_session(session, now_s=now_s)
        if free:
            self.model.free_session(session, now_s=now_s)
        self._changed(False)

    def lose(self) -> None:
        """It is gone, and everything on it."""
        self.alive = False
        self.lost_s = self._agenda.now_s
        self._generation += 1

    # --- steps -------------------------------------------------------------------------------
    def _changed(self, was_cut: bool) -> None:
        step = self.model.step
        if step is None:
            if not self._is_dirty:
                self._is_dirty = True
                self._dirty.append(self)
        elif was_cut:
            self._await(step.end_s)

    def look(self) -> None:
        """Begin the next step, if the engine is free and there is one."""
        self._is_dirty = False
        if not self.alive or self.model.step is not None:
            return
        step = self.model.begin_step(now_s=self._agenda.now_s, until_s=self._until_s)
        if step is not None:
            self._await(step.end_s)
            return
        wake_s = self.model.loaded_at_s()
        if wake_s is not None:
            self._generation += 1
            self._agenda.at(wake_s, self._loaded, self._generation)

    def _await(self, end_s: float) -> None:
        self._generation += 1
        self._agenda.at(end_s, self._end_step, self._generation)

    def _end_step(self, generation: int) -> None:
        if generation != self._generation:
            return
        events = self.model.end_step(now_s=self._agenda.now_s)
        if not self._is_dirty:
            self._is_dirty = True
            self._dirty.append(self)
        self._tell(self, events)
        self._watch_stored()

    def _loaded(self, generation: int) -> None:
        """KV that a request waits for is there."""
        if generation == self._generation and not self._is_dirty:
            self._is_dirty = True
            self._dirty.append(self)

    def _watch_stored(self) -> None:
        """See to it that the end of every hand-off is told, in the midst of a step or not."""
        stored_s = self.model.stored_at_s()
        if stored_s is not None and stored_s > self._stored_s:
            self._stored_s = stored_s
            self._agenda.at(stored_s, self._stored, None)

    def _stored(self, _: None) -> None:
        if self.alive:
            self._tell(self, self.model.poll(now_s=self._agenda.now_s))
            self._watch_stored()

    # --- what it says of itself --------------------------------------------------------------
    def joined(self) -> EngineJoined:
        """The engine's introduction to the scheduler."""
        spec, pool = self.spec, self.model.pool
        return EngineJoined(
            engine=spec.id,
            epoch=self.epoch,
            tier=spec.tier,
            kv_capacity_tokens=pool.capacity_tokens,
            host_capacity_tokens=pool.host_capacity_tokens,
            page_tokens=spec.config.page_tokens,
            max_context_tokens=spec.profile.max_context_tokens,
            speeds=spec.profile.speeds(),
            link=spec.profile.link(),
        )

    def report(self) -> EngineReported:
        """What it did since its previous report, and what it holds."""
        model = self.model
        model.settle(now_s=self._agenda.now_s)
        before, now = self._read, model.counters.sums()
        steps = _NOTHING
        if now != before:
            self._read = now
            steps = StepTimes(**dict(zip(_STEP_FIELDS, map(sub, now, before), strict=True)))
        pool = model.pool
        return EngineReported(
            engine=self.id,
            epoch=self.epoch,
            kv_held_tokens=pool.used_tokens + pool.evictable_tokens,
            running_requests=model.running,
            queued_requests=model.queued,
            steps=steps,
        )

    def note_prefilled(self, event: PrefillDone) -> None:
        """Count a prompt that is complete here, for the checks at the end."""
        self.asked_tokens += event.prompt_tokens
        self.cached_tokens += (
            event.cached_device_tokens + event.cached_host_tokens + event.cached_storage_tokens
        )

    def use(self) -> EngineUse:
        """What it did up to now, which must not be before its latest step's end."""
        model, pool = self.model, self.model.pool
        alive_s = self._agenda.now_s if self.lost_s is None else self.lost_s
        if self.alive:
            model.settle(now_s=alive_s)
            model.poll(now_s=alive_s)
        stats, counters = model.stats(), model.counters
        steps = stats.counters
        egress_s, ingress_s = model.link_busy_s
        return EngineUse(
            tier=self.spec.tier,
            profile=self.spec.profile.name,
            alive_s=alive_s,
            lost=not self.alive,
            seconds=model.energy_seconds(),
            energy=stats.energy,
            prefill_tokens=steps.total_prefill_uncached_tokens,
            decode_tokens=steps.decode_batch_sum + steps.mixed_batch_sum,
            first_tokens=counters.first_tokens,
            asked_tokens=self.asked_tokens,
            cached_tokens=self.cached_tokens,
            recomputed_tokens=counters.recomputed_tokens,
            abandoned_tokens=counters.abandoned_tokens,
            output_tokens=self.output_tokens,
            abandoned_output_tokens=counters.abandoned_output_tokens,
            finished_requests=stats.finished_requests,
            aborted_requests=stats.aborted_requests,
            retractions=stats.retractions,
            evicted_tokens=pool.evicted_tokens_total,
            parked_tokens=pool.parked_tokens_total,
            dropped_tokens=pool.dropped_tokens_total - pool.freed_tokens_total,
            freed_tokens=pool.freed_tokens_total,
            restored_tokens=pool.restored_tokens_total,
            loaded_tokens=stats.cached_storage_tokens,
            sent_tokens=stats.stored_tokens,
            egress_busy_s=egress_s,
            ingress_busy_s=ingress_s,
            left_used_tokens=pool.used_tokens,
            left_requests=len(model.requests),
            left_sessions=stats.open_sessions,
        )

    def describe(self) -> str:
        """Its state in a line, for a deadlock's report."""
        if not self.alive:
            return f"{self.id}: lost at {self.lost_s:.3f} s"
        stats = self.model.stats()
        step = self.model.step
        doing = f"in a step until {step.end_s:.3f} s" if step is not None else "idle"
        names = ", ".join(list(self.model.requests)[:5]) or "none"
        return (
            f"{self.id} ({self.spec.tier}): {doing}; {stats.running} running, "
            f"{stats.prefilling} prefilling, {stats.loading} loading, {stats.queued} queued; KV "
            f"{stats.used_tokens} used + {stats.evictable_tokens} idle of "
            f"{stats.capacity_tokens}, host {stats.host_used_tokens} of "
            f"{stats.host_capacity_tokens}; {stats.open_sessions} sessions; requests: {names}"
        )
