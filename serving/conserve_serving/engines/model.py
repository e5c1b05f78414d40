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

Rules, those of SGLang 0.5.23 with ``--enable-mixed-chunk`` and priority scheduling:

* The queue is ordered by priority, then arrival. Its head is admitted when the device has room for
  its prompt and for the output reserve of everyone admitted; nobody overtakes a head that waits
  for room. Larger than the pool is refused at ``submit``, so the head always fits an empty engine.
* Admission takes the prompt's pages at once. Cached KV on the host, or in the hand-off store,
  comes in over the host link first, and the request waits for it beside the batch.
* A step computes prompt chunks within the token budget, a begun prompt first, and one token for
  every running request. When pages for those run out, the newest running request is retracted; it
  keeps its output and goes back to its place in the queue, and nobody is admitted until another
  request ends. One request alone always has room, so something always ends.
* KV of a finished or aborted request stays in the prefix tree as idle (evictable) KV.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from conserve_serving.engines.content import Prompt
from conserve_serving.engines.errors import (
    DuplicateRequestError,
    InvariantError,
    ModelError,
    ModelMisuseError,
)
from conserve_serving.engines.kv import KvPool
from conserve_serving.engines.kv_nodes import Node
from conserve_serving.engines.links import SerialLink
from conserve_serving.engines.model_batch import (
    DecodeBatch,
    State,
    Work,
    burst_limit,
    plan_burst,
)
from conserve_serving.engines.model_check import check_request
from conserve_serving.engines.model_counters import Counters
from conserve_serving.engines.model_desk import EPSILON_S, Desk
from conserve_serving.engines.model_types import (
    ModelConfig,
    ModelEvent,
    ModelRequest,
    ModelStats,
    PagesStored,
    PrefillDone,
    RequestFinished,
    Retracted,
    Step,
    TokensEmitted,
)
from conserve_serving.engines.power import EnergyMeter, StateSeconds
from conserve_serving.engines.profile import HardwareProfile
from conserve_serving.engines.steptime import StepTimes

#: Closed sessions whose KV is still known as theirs (as our SGLang plug-in remembers them).
_MOST_CLOSED: Final = 8192


class EngineModel:
    """One engine. Not thread-safe. Deterministic: equal calls give equal results."""

    def __init__(self, profile: HardwareProfile, config: ModelConfig) -> None:
        """Args: what the hardware does, and how the engine is set up.

        Raises:
            ModelError: a setting of ``config`` cannot work.
        """
        capacity = config.kv_capacity_tokens or profile.kv_capacity_tokens
        host = config.host_capacity_tokens
        for name, value in (
            ("page_tokens", config.page_tokens),
            ("max_running_requests", config.max_running_requests),
            ("chunk_tokens", config.chunk_tokens or profile.chunk_tokens),
            ("kv_capacity_tokens", capacity // max(config.page_tokens, 1)),
        ):
            if value <= 0:
                raise ModelError(f"{name} is too small: at least one page of one request must fit")
        self.profile = profile
        self.config = config
        self._pool_tokens = (capacity, profile.host_capacity_tokens if host is None else host)
        self.pool = self._empty_pool()
        self._chunk_tokens = config.chunk_tokens or profile.chunk_tokens
        self._times = StepTimes(profile)
        self._energy = EnergyMeter(profile.power)
        self.counters = Counters()
        self._desk = Desk(profile, config, self.pool)
        self._decode = DecodeBatch(config.page_tokens)
        self._egress_link = SerialLink()
        self._egress: list[PagesStored] = []  # in order of at_s: the link is serial
        self._step: Step | None = None
        self._chunks: list[tuple[Work, int]] = []
        self._prefill_share = 0.0
        self._closed: OrderedDict[str, set[Node]] = OrderedDict()  # KV of sessions closed lately
        self._leaving: list[Node] = []  # of it, what is to leave and still in use
        self._events: list[ModelEvent] = []
        self._now_s = 0.0
        self._arrivals = 0

    def _empty_pool(self) -> KvPool:
        capacity_tokens, host_capacity_tokens = self._pool_tokens
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
        arrival_s = max(now_s, self._now_s)
        self._desk.enter(Work(request, self._arrivals, arrival_s, self.pool.root))
        self._arrivals += 1

    def set_context(self, rid: str, context: Prompt) -> None:
        """Tell the content of prompt and output of a request in the engine (unknown: ignored)."""
        work = self._desk.works.get(rid)
        if work is None:
            return
        if (
            context.page_tokens != self.config.page_tokens
            or context.tokens < work.request.prompt.tokens
        ):
            raise ModelError(f"rid {rid!r}: context must extend the prompt in this engine's pages")
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
        self.settle(now_s=now_s)
        self._cut(now_s)
        self.counters.aborted_requests += 1
        self._abandon_chunks(work)
        if work.state is State.DECODING:
            allocated = self._decode.allocated_kv_tokens(work)
            self._decode.remove(work)
            if self._step is not None:
                self.counters.abandoned_output_tokens += 1  # of the step in progress
            self._desk.leave(work, allocated, work.fill_tokens)
        elif work.state is State.READY:
            self._desk.leave(work, work.fill_tokens, work.computed_tokens)
        else:  # queued: it holds nothing; loading: what is on the link is not there yet
            self._desk.leave(work, work.fill_tokens, work.node_tokens)
        self.counters.abandoned_output_tokens += work.emitted
        self._let_leave()
        return True

    def _abandon_chunks(self, work: Work) -> None:
        """Count what has been computed of a prompt that will not be completed."""
        for other, tokens in self._chunks:
            if other is work and work.prefilled:
                self.counters.recomputed_tokens += tokens
            elif other is work:
                self.counters.abandoned_tokens += tokens
        if work.state is State.READY and not work.prefilled:
            self.counters.abandoned_tokens += work.computed_tokens - work.cached_tokens

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
        self._send(rid, max(found - known_tokens, 0), found, max(now_s, self._now_s))
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
            self._closed[session_id] = leaves
            self._closed.move_to_end(session_id)
            if len(self._closed) > _MOST_CLOSED:
                self._closed.popitem(last=False)
        return leaves is not None

    def free_session(self, session_id: str, *, now_s: float) -> None:
        """Let a closed session's KV leave device and host, once nobody uses it."""
        self._advance(now_s)
        self._leaving += self._closed.pop(session_id, ())
        self._let_leave()

    def _let_leave(self) -> None:
        self._leaving = [node for node in self._leaving if not self.pool.drop(node)]

    def flush(self, *, now_s: float) -> bool:
        """Drop all idle KV, on the device and on the host; open sessions stay open, and empty.

        Returns:
            False, and nothing is done, while requests are in the engine.
        """
        if self._desk.works:
            return False
        self._advance(now_s)
        sessions = list(self.pool.sessions.leaves)
        old, self.pool = self.pool, self._empty_pool()
        self.pool.dropped_tokens_total = (
            old.dropped_tokens_total + old.evictable_tokens + old.host_used_tokens
        )
        self._desk = Desk(self.profile, self.config, self.pool)
        self._closed.clear()
        self._leaving.clear()
        for session_id in sessions:
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
        if not batch and not self._chunks:
            return None
        steps = 1
        kv_tokens = decode.kv_tokens + batch
        decode_s = self._times.decode_s(batch, kv_tokens) if batch else 0.0
        prefill_s, prefill_tokens = 0.0, 0
        duration_s = decode_s
        if self._chunks:
            prefill_tokens = sum([tokens for _, tokens in self._chunks])
            prefill_s = self._times.prefill_batch_s(
                [(tokens, work.computed_tokens) for work, tokens in self._chunks]
            )
            duration_s = prefill_s
            if batch:
                duration_s = self._times.mixed_s(
                    prefill_s,
                    decode_s,
                    chunk_tokens=prefill_tokens,
                    batch=batch,
                    kv_tokens=kv_tokens,
                )
        elif until_s is not None:
            loaded_s = desk.loading_until_s()
            horizon_s = (until_s if loaded_s is None else min(until_s, loaded_s)) - start_s
            # Pages are taken when the steps are over; those of the first have been already.
            free_pages = self.pool.available_tokens // self.config.page_tokens
            limit = burst_limit(decode, free_pages + decode.pages_for_one())
            steps, duration_s = plan_burst(decode, self._times, horizon_s, limit)
            kv_tokens = _kv_read(decode, steps)
        decode.begin(steps)
        self._prefill_share = prefill_s / (prefill_s + decode_s)
        self._step = Step(
            start_s=start_s,
            duration_s=duration_s,
            steps=steps,
            prefill_tokens=prefill_tokens,
            prefill_requests=len(self._chunks),
            decode_batch=batch,
            decode_kv_tokens=kv_tokens if batch else 0,
        )
        return self._step

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
        self._drain_egress(self._now_s)
        for work in self._decode.end():
            allocated = self._decode.allocated_kv_tokens(work)
            self._decode.remove(work)
            self._finish(work, allocated)
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
        steps, duration_s = plan_burst(self._decode, self._times, now_s - step.start_s, step.steps)
        if steps < step.steps:
            self._decode.begin(steps)
            self._step = self._decode_step(step, step.start_s, steps, duration_s)

    def settle(self, *, now_s: float) -> None:
        """Account for those of the steps that run together that have ended by ``now_s``.

        What :meth:`stats` says is then what it would say after single steps. The step in progress
        ends when it would have ended.
        """
        step = self._step
        if step is None or step.steps == 1:
            return
        begun, _ = plan_burst(self._decode, self._times, now_s - step.start_s, step.steps)
        if begun == 1:
            return
        over, over_s = plan_burst(self._decode, self._times, math.inf, begun - 1)
        done = self._decode_step(step, step.start_s, over, over_s)
        self._decode.begin(over)
        self._account(done)
        self._decode.end()  # nobody has all tokens yet: that ends the steps in any case
        self.pool.allocate(self._decode.pages_for_one() * self.config.page_tokens)
        left = step.steps - over
        self._decode.begin(left)
        self._step = self._decode_step(step, done.end_s, left, step.end_s - done.end_s)

    def _decode_step(self, step: Step, start_s: float, steps: int, duration_s: float) -> Step:
        """A part of a step that only decodes, from where the batch is."""
        return Step(
            start_s=start_s,
            duration_s=duration_s,
            steps=steps,
            prefill_tokens=0,
            prefill_requests=0,
            decode_batch=step.decode_batch,
            decode_kv_tokens=_kv_read(self._decode, steps),
        )

    def poll(self, *, now_s: float) -> list[ModelEvent]:
        """What happened without a step since events were last taken; counts idle time."""
        self._advance(now_s)
        return self._take_events()

    def wake_at_s(self) -> float | None:
        """When a transfer under way will be over: call ``poll`` and ``begin_step`` then."""
        loading_s = self._desk.loading_until_s()
        if not self._egress:
            return loading_s
        stored_s = self._egress[0].at_s
        return stored_s if loading_s is None else min(stored_s, loading_s)

    def loaded_at_s(self) -> float | None:
        """When the next request that waits for cached KV will have it; None: none waits."""
        return self._desk.loading_until_s()

    def stored_at_s(self) -> float | None:
        """When the next hand-off under way will be over; ``poll`` tells of it, even in a step."""
        return self._egress[0].at_s if self._egress else None

    def stats(self) -> ModelStats:
        """A reading of the engine as of the last call that brought a time."""
        pool, counters, desk = self.pool, self.counters, self._desk
        return ModelStats(
            now_s=self._now_s,
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
            energy=self._energy.reading(),
        )

    @property
    def link_busy_s(self) -> tuple[float, float]:
        """Seconds that transfers have taken or will take, out of this engine and into it."""
        return self._egress_link.busy_s, self._desk.ingress_busy_s

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
        if self._step is not None:
            self._drain_egress(now_s)  # transfers end while a step runs
            return
        if now_s > self._now_s:
            self._energy.idle(now_s - self._now_s)
            self._now_s = now_s
        self._drain_egress(self._now_s)

    def _drain_egress(self, now_s: float) -> None:
        if not self._egress:
            return
        done = 0
        while done < len(self._egress) and self._egress[done].at_s <= now_s + EPSILON_S:
            done += 1
        if done:
            self._events += self._egress[:done]
            del self._egress[:done]

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
                allocated = decode.allocated_kv_tokens(work)
                decode.remove(work)
            else:
                newest = desk.newest_prefilling()
                if newest is None:
                    raise InvariantError("one request alone has no room for its next token")
                work, allocated = newest, newest.fill_tokens
                self._abandon_chunks(work)
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
            self._events.append(
                PrefillDone(
                    rid=request.rid,
                    at_s=at_s,
                    prompt_tokens=request.prompt.tokens,
                    cached_device_tokens=work.cached_device,
                    cached_host_tokens=work.cached_host,
                    cached_storage_tokens=work.cached_storage,
                    queued_s=0.0 if work.admitted_s is None else work.admitted_s - work.arrival_s,
                )
            )
            if self.config.store_writes and request.stores:
                self._store(request, end)
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

    def _store(self, request: ModelRequest, end_tokens: int) -> None:
        """Write the prompt's pages that the store lacks to it, after what is on the link."""
        new = max(end_tokens - max(request.stored_tokens, request.known_tokens), 0)
        self._send(request.rid, new, end_tokens, self._now_s)
        self._drain_egress(self._now_s)

    def _send(self, rid: str, new_tokens: int, end_tokens: int, now_s: float) -> None:
        self.counters.stored_tokens += new_tokens
        done_s = self._egress_link.reserve(now_s, self.profile.handoff_s(new_tokens))
        self._egress.append(
            PagesStored(
                rid=rid,
                at_s=done_s,
                tokens=end_tokens,
                duration_s=done_s - now_s,
                sent_tokens=new_tokens,
            )
        )

    def _finish(self, work: Work, allocated_tokens: int) -> None:
        request = work.request
        self.counters.finished_requests += 1
        admitted_s = work.arrival_s if work.admitted_s is None else work.admitted_s
        self._events.append(
            RequestFinished(
                rid=request.rid,
                at_s=self._now_s,
                prompt_tokens=request.prompt.tokens,
                output_tokens=request.output_tokens,
                cached_tokens=work.cached_tokens,
                queued_s=admitted_s - work.arrival_s,
                first_token_s=work.first_token_s,
            )
        )
        self._desk.leave(work, allocated_tokens, work.fill_tokens)
        self._let_leave()


def _kv_read(decode: DecodeBatch, steps: int) -> int:
    """KV tokens the batch reads in its next ``steps`` steps together."""
    return steps * decode.kv_tokens + len(decode.running) * steps * (steps + 1) // 2
