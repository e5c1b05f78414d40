"""The engine model: what one SGLang engine does, step by step, without I/O or a clock.

Order of calls by a driver (the emulated server on the wall clock, the simulator on a virtual
one): ``submit``, ``abort``, ``open_session``, ``close_session`` at any time; then repeat
``step = begin_step(now_s=t)``; if a step came back, wait until ``step.end_s`` and call
``end_step(now_s=step.end_s)`` for its events; if None came back, wait for the next submission or
for ``wake_at_s()`` and take what happened meanwhile from ``poll(now_s=t)``. Times are model
seconds; a time before the latest one seen is taken for the latest.

A driver that does not live in real time lets decode steps run together (``until_s``). A submission
or an abort in the midst of them cuts them short (``step`` then ends earlier), and ``settle``
accounts for those that are over: the outcome is always that of single steps.

By which rules requests run stands in ``model_desk.py``, how long steps take in ``model_steps.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from conserve_serving.engines.content import Prompt
from conserve_serving.engines.errors import DuplicateRequestError, InvariantError, ModelMisuseError
from conserve_serving.engines.kv import KvPool
from conserve_serving.engines.model_batch import DecodeBatch, State, Work
from conserve_serving.engines.model_check import check_config, check_context, check_request
from conserve_serving.engines.model_closed import ClosedSessions
from conserve_serving.engines.model_counters import Counters, read_stats
from conserve_serving.engines.model_desk import EPSILON_S, Desk
from conserve_serving.engines.model_egress import Egress
from conserve_serving.engines.model_steps import as_step, burst_limit, decode_steps, prompt_step
from conserve_serving.engines.model_types import (
    ModelConfig,
    ModelEvent,
    ModelRequest,
    ModelStats,
    Retracted,
    Step,
    TokensEmitted,
)
from conserve_serving.engines.power import EnergyMeter, StateSeconds
from conserve_serving.engines.profile import HardwareProfile
from conserve_serving.engines.steptime import StepTimes


class EngineModel:
    """One engine. Not thread-safe. Deterministic: equal calls give equal results."""

    def __init__(self, profile: HardwareProfile, config: ModelConfig) -> None:
        """Args: what the hardware does, and how the engine is set up.

        Raises:
            ModelError: a setting of ``config`` cannot work.
        """
        capacity, host = config.kv_capacity_tokens, config.host_capacity_tokens
        if capacity is None:
            capacity = profile.kv_capacity_tokens
        chunk = config.chunk_tokens
        self._chunk_tokens = profile.chunk_tokens if chunk is None else chunk
        check_config(config, capacity_tokens=capacity, chunk_tokens=self._chunk_tokens)
        self.profile = profile
        self.config = config
        self.pool = self._empty_pool(
            capacity, profile.host_capacity_tokens if host is None else host
        )
        self._desk = Desk(profile, config, self.pool)
        self._closed = ClosedSessions(self.pool)
        self._decode = DecodeBatch(config.page_tokens)
        self._egress = Egress(profile)
        self._times = StepTimes(profile)
        self._energy = EnergyMeter(profile.power)
        self.counters = Counters()
        self._step: Step | None = None
        self._chunks: list[tuple[Work, int]] = []
        self._prefill_share = 0.0
        self._events: list[ModelEvent] = []
        self._now_s = 0.0
        self._arrivals = 0

    def _empty_pool(self, capacity_tokens: int, host_capacity_tokens: int) -> KvPool:
        return KvPool(
            capacity_tokens=capacity_tokens,
            host_capacity_tokens=host_capacity_tokens,
            page_tokens=self.config.page_tokens,
            session_protection=self.config.session_protection,
        )

    # --- requests ----------------------------------------------------------------------------
    def submit(self, request: ModelRequest, *, now_s: float) -> None:
        """Queue a request.

        Raises:
            DuplicateRequestError: its ``rid`` is still in the engine.
            RequestTooLargeError: prompt and output exceed the KV pool or the context length.
            ModelError: a field is out of range; the message names it.
        """
        if request.rid in self._desk.works:
            raise DuplicateRequestError(
                f"rid {request.rid!r} is in use: give every request its own"
            )
        check_request(request, self.config, self.profile, self.pool.capacity_tokens)
        self._advance(now_s)
        self._cut(now_s)
        self._desk.enter(Work(request, self._arrivals, max(now_s, self._now_s), self.pool.root))
        self._arrivals += 1

    def set_context(self, rid: str, context: Prompt) -> None:
        """Tell the content of prompt and output of a request in the engine (unknown: ignored)."""
        work = self._desk.works.get(rid)
        if work is not None:
            check_context(work.request, context, self.config)
            work.context = context

    def abort(self, rid: str, *, now_s: float) -> bool:
        """Forget a request, wherever it is; its KV becomes idle and it emits nothing more.

        Returns:
            False when the engine has no such request.
        """
        work = self._desk.works.get(rid)
        if work is None:
            return False
        self._advance(now_s)
        self._cut(now_s)  # first: where a step ends just now, both must see the same
        self.settle(now_s=now_s)
        self.counters.aborted_requests += 1
        in_step = sum([tokens for other, tokens in self._chunks if other is work])
        self.counters.abandoned(work, in_step)
        if work.state is State.DECODING:
            allocated = self._decode.remove(work)
            if self._step is not None:
                self.counters.abandoned_output_tokens += 1  # of the step in progress
            self._desk.leave(work, allocated, work.fill_tokens)
        elif work.state is State.READY:
            self._desk.leave(work, work.fill_tokens, work.computed_tokens)
        else:  # queued: it holds nothing; loading: what is on the link is not there yet
            self._desk.leave(work, work.fill_tokens, work.node_tokens)
        self.counters.abandoned_output_tokens += work.emitted
        self._closed.let_leave()
        return True

    def cached_tokens(self, prompt: Prompt) -> int:
        """Leading tokens of ``prompt`` whose KV is here, on the device or on the host."""
        return self.pool.cached_tokens(prompt)

    def send(self, rid: str, prompt: Prompt, *, known_tokens: int, now_s: float) -> int:
        """Write what is here of a prompt's KV to the hand-off store, without computing anything.

        ``PagesStored`` tells when that is done, as it does of a prefill's pages.

        Args:
            rid: what that event is to be called.
            prompt: whose KV; what the engine does not have of it is not sent.
            known_tokens: leading tokens that need not be sent, because the receiver has them.
            now_s: model time.

        Returns:
            Leading tokens of the prompt that the receiver can have then.
        """
        self._advance(now_s)
        found = self.cached_tokens(prompt)
        self.counters.stored_tokens += self._egress.send(
            rid, known_tokens=known_tokens, end_tokens=found, now_s=max(now_s, self._now_s)
        )
        return found

    def open_session(self, session_id: str, *, now_s: float) -> bool:
        """Protect what requests of this session leave behind; False when it is open already."""
        self._advance(now_s)
        return self.pool.sessions.open(session_id)

    def close_session(self, session_id: str, *, now_s: float) -> bool:
        """End the protection; False when the session was not open. Running requests go on."""
        self._advance(now_s)
        leaves = self.pool.sessions.close(session_id)
        if leaves:
            self._closed.remember(session_id, leaves)
        return leaves is not None

    def free_session(self, session_id: str, *, now_s: float) -> None:
        """Let a closed session's KV leave device and host, once nobody uses it."""
        self._advance(now_s)
        self._closed.free(session_id)

    def flush(self, *, now_s: float) -> bool:
        """Drop all idle KV, on the device and on the host; open sessions stay open, and empty.

        Returns:
            False, and nothing is done, while requests are in the engine.
        """
        if self._desk.works:
            return False
        self._advance(now_s)
        old = self.pool
        self.pool = self._empty_pool(old.capacity_tokens, old.host_capacity_tokens)
        self.pool.dropped_tokens_total = (
            old.dropped_tokens_total + old.evictable_tokens + old.host_used_tokens
        )
        self._desk = Desk(self.profile, self.config, self.pool)
        self._closed = ClosedSessions(self.pool)
        for session_id in old.sessions.leaves:
            self.pool.sessions.open(session_id)
        return True

    # --- steps -------------------------------------------------------------------------------
    def begin_step(self, *, now_s: float, until_s: float | None = None) -> Step | None:
        """Start the next step, or return None when nothing can run now.

        Args:
            now_s: model time.
            until_s: decode steps may be run together until the batch changes, as long as each
                begins before ``until_s``. The outcome is that of single steps; only the events
                come together. None: one step.

        Raises:
            ModelMisuseError: the previous step has not been ended.
        """
        if self._step is not None:
            raise ModelMisuseError("begin_step before end_step of the step in progress")
        self._advance(now_s)
        start_s = self._now_s
        desk, decode = self._desk, self._decode
        desk.wake_loaded(start_s)
        self._secure_decode_pages()
        batch = len(decode.running)
        budget = max(self.config.page_tokens, self._chunk_tokens - batch)
        self._chunks = desk.pick_chunks(budget, start_s) if desk.has_prompts else []
        if self._chunks:
            step, self._prefill_share = prompt_step(decode, self._times, self._chunks, start_s)
        elif batch:
            step, self._prefill_share = self._burst(start_s, until_s), 0.0
        else:
            return None
        decode.begin(step.steps)
        self._step = step
        return step

    def _burst(self, start_s: float, until_s: float | None) -> Step:
        """The next decode step, and those that may run together with it."""
        if until_s is None:
            return decode_steps(self._decode, self._times, start_s, start_s, 1)
        loaded_s = self._desk.loading_until_s()
        if loaded_s is not None:
            until_s = min(until_s, loaded_s)
        limit = burst_limit(self._decode, self.pool.available_tokens // self.config.page_tokens)
        return decode_steps(self._decode, self._times, start_s, until_s, limit)

    def end_step(self, *, now_s: float) -> list[ModelEvent]:
        """Finish the step in progress; returns what happened since events were last taken.

        Raises:
            ModelMisuseError: there is no step in progress, or ``now_s`` is before its end.
        """
        step = self._step
        if step is None:
            raise ModelMisuseError("end_step without begin_step")
        if now_s < step.end_s - EPSILON_S:
            raise ModelMisuseError(f"end_step at {now_s} s, but the step ends at {step.end_s} s")
        self._step = None
        self._account(step)
        self._egress.drain(self._now_s, self._events)
        for work in self._decode.end():
            self._finish(work, self._decode.remove(work))
        for work, tokens in self._chunks:
            if work.state is State.READY:  # else it was aborted during the step
                self._prefilled(work, tokens)
        self._chunks = []
        return self._take_events()

    def _account(self, step: Step) -> None:
        """Count a step that is over; the batch still is as it began."""
        self._now_s = step.end_s
        self.counters.step(step)
        self._energy.step(
            step.duration_s, prefill_share=self._prefill_share, decode_batch=step.decode_batch
        )
        decode = self._decode
        if step.steps > 1:
            more = decode.pages_for(step.steps) - decode.pages_for_one()
            if more:
                self.pool.allocate(more * self.config.page_tokens)
        if decode.running and self.config.token_events:
            rids = tuple(work.request.rid for work in decode.running)
            self._events.append(TokensEmitted(rids=rids, at_s=step.end_s, count=step.steps))

    # --- steps that run together -------------------------------------------------------------
    @property
    def step(self) -> Step | None:
        """The step in progress, as it ends now."""
        return self._step

    def _cut(self, now_s: float) -> None:
        """Let the steps that run together end with the one that runs at ``now_s``."""
        step = self._step
        if step is None or step.steps == 1:
            return
        cut = decode_steps(self._decode, self._times, step.start_s, now_s, step.steps)
        if cut.steps < step.steps:
            self._decode.begin(cut.steps)
            self._step = cut

    def settle(self, *, now_s: float) -> None:
        """Account for those of the steps that run together that have ended by ``now_s``.

        What :meth:`stats` says is then what it would say after single steps. The step in progress
        ends when it would have ended.
        """
        step = self._step
        if step is None or step.steps == 1:
            return
        decode, times = self._decode, self._times
        begun = decode_steps(decode, times, step.start_s, now_s, step.steps).steps
        if begun == 1:
            return
        over = decode_steps(decode, times, step.start_s, math.inf, begun - 1)
        decode.begin(over.steps)
        self._account(over)
        decode.end()  # nobody has all tokens yet: that ends the steps in any case
        self.pool.allocate(decode.pages_for_one() * self.config.page_tokens)
        left = step.steps - over.steps
        decode.begin(left)
        self._step = as_step(decode, over.end_s, left, step.end_s - over.end_s)

    def poll(self, *, now_s: float) -> list[ModelEvent]:
        """What happened without a step since events were last taken; counts idle time."""
        self._advance(now_s)
        return self._take_events()

    def wake_at_s(self) -> float | None:
        """When a transfer under way will be over: call ``poll`` and ``begin_step`` then."""
        times_s = [at_s for at_s in (self.loaded_at_s(), self.stored_at_s()) if at_s is not None]
        return min(times_s, default=None)

    def loaded_at_s(self) -> float | None:
        """When the next request that waits for cached KV will have it; None: none waits."""
        return self._desk.loading_until_s()

    def stored_at_s(self) -> float | None:
        """When the next hand-off under way will be over; ``poll`` tells of it, even in a step."""
        return self._egress.next_s()

    def stats(self) -> ModelStats:
        """A reading of the engine as of the last call that brought a time."""
        return read_stats(self._now_s, self.pool, self._desk, self.counters, self._energy)

    @property
    def link_busy_s(self) -> tuple[float, float]:
        """Seconds that transfers have taken or will take, out of this engine and into it."""
        return self._egress.busy_s, self._desk.ingress_busy_s

    @property
    def requests(self) -> Mapping[str, Work]:
        """Every request in the engine, by id. For reading."""
        return self._desk.works

    @property
    def running(self) -> int:
        """Requests that decode."""
        return self._desk.held[State.DECODING]

    @property
    def queued(self) -> int:
        """Requests that wait for admission."""
        return self._desk.held[State.QUEUED]

    def energy_seconds(self) -> StateSeconds:
        """Seconds by state behind the energy of :meth:`stats`."""
        return self._energy.seconds()

    # --- time --------------------------------------------------------------------------------
    def _advance(self, now_s: float) -> None:
        """Let idle time pass; a step in progress accounts for its own."""
        if self._step is None:
            if now_s > self._now_s:
                self._energy.idle(now_s - self._now_s)
                self._now_s = now_s
            now_s = self._now_s
        self._egress.drain(now_s, self._events)  # transfers end while a step runs

    def _take_events(self) -> list[ModelEvent]:
        events, self._events = self._events, []
        return events

    def _secure_decode_pages(self) -> None:
        """Allocate the next step's pages, retracting until they are there.

        The newest running request goes first, but never the last one: then those still at their
        prompts go, newest first.
        """
        decode, desk, page = self._decode, self._desk, self.config.page_tokens
        tokens = decode.pages_for_one() * page
        if not tokens:
            return
        while tokens > self.pool.room_tokens:
            if len(decode.running) > 1:
                work = next(reversed(decode.running))
                allocated = decode.remove(work)
            else:
                newest = desk.newest_prefilling()
                if newest is None:
                    raise InvariantError("one request alone has no room for its next token")
                work, allocated = newest, newest.fill_tokens
                self.counters.abandoned(work)
            desk.retract(work, allocated)
            self.counters.retractions += 1
            self._events.append(Retracted(rid=work.request.rid, at_s=self._now_s))
            tokens = decode.pages_for_one() * page
        self.pool.allocate(tokens)

    # --- what a step brought -----------------------------------------------------------------
    def _prefilled(self, work: Work, tokens: int) -> None:
        """A chunk of ``tokens`` has been computed."""
        work.computed_tokens += tokens
        if work.prefilled:
            self.counters.recomputed_tokens += tokens
        if work.computed_tokens < work.fill_tokens:
            self._desk.put_back(work)
            return
        request, at_s = work.request, self._now_s
        end = request.prompt.tokens - request.prompt.tokens % self.config.page_tokens
        self._desk.insert(work, request.prompt, end)
        if not work.prefilled:
            work.prefilled = True
            self.counters.cached(work)
            self._events.append(work.prefill_done(at_s))
            if self.config.store_writes and request.stores:
                known = max(request.stored_tokens, request.known_tokens)
                self.counters.stored_tokens += self._egress.send(
                    request.rid, known_tokens=known, end_tokens=end, now_s=at_s
                )
                self._egress.drain(at_s, self._events)  # it is over if nothing had to be sent
            if not request.prefill_only:
                work.first_token_s = at_s
        if request.prefill_only:
            self._finish(work, work.fill_tokens)
            return
        work.emitted += 1
        self.counters.first_tokens += 1
        if self.config.token_events:
            self._events.append(TokensEmitted(rids=(request.rid,), at_s=at_s, count=1))
        if work.emitted == request.output_tokens:
            self._finish(work, work.fill_tokens)
            return
        self._desk.move(work, State.DECODING)
        self._decode.add(work, request.output_tokens)

    def _finish(self, work: Work, allocated_tokens: int) -> None:
        self.counters.finished_requests += 1
        self._events.append(work.finished(self._now_s))
        self._desk.leave(work, allocated_tokens, work.fill_tokens)
        self._closed.let_leave()
