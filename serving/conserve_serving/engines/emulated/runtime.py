"""Runs the engine model on a clock, and tells each request what became of it.

The model's time is exact: a step that should have ended a millisecond ago ends at its own time
and the next begins there, so a late timer or a busy event loop never slows the emulated device
down (``lag_s`` says how far the answers trail behind it). One step is taken per round of the event
loop, so that streams are written in between; when that falls behind, several are, and their tokens
go out together, as SGLang's do under load.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol

from conserve_serving.engines.emulated.plan import Plan
from conserve_serving.engines.model import EngineModel
from conserve_serving.engines.model_types import (
    ModelEvent,
    ModelRequest,
    ModelStats,
    PagesStored,
    PrefillDone,
    RequestFinished,
    Step,
    TokensEmitted,
)

#: When the loop is behind by this many steps, streams no longer get a turn after every one …
_LATE_STEPS: Final = 2
#: … but after this many, so that they and new requests are never shut out.
_CATCH_UP_STEPS: Final = 16


class Alarm(Protocol):
    """A call to come."""

    def cancel(self) -> None:
        """Take it back."""


class Clock(Protocol):
    """Model time."""

    def now_s(self) -> float:
        """Model seconds since the engine started; never goes back."""

    def call_at(self, at_s: float, callback: Callable[[], None]) -> Alarm:
        """Call back once model time has reached ``at_s``."""


class WallClock:
    """Model time that runs ``speed`` times as fast as the wall clock; starts at 0."""

    def __init__(self, speed: float = 1.0, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._speed = speed
        self._monotonic = monotonic
        self._start_s = monotonic()

    def now_s(self) -> float:
        """See :class:`Clock`."""
        return (self._monotonic() - self._start_s) * self._speed

    def call_at(self, at_s: float, callback: Callable[[], None]) -> Alarm:
        """See :class:`Clock`."""
        delay_s = max(0.0, (at_s - self.now_s()) / self._speed)
        return asyncio.get_running_loop().call_later(delay_s, callback)


class Signal:
    """Wakes the one coroutine that serves a response."""

    __slots__ = ("_set", "_waiter")

    def __init__(self) -> None:
        self._set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        """Something changed."""
        self._set = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Until something has changed since the last call."""
        while not self._set:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._set = False


class Generation:
    """One request in the engine, as seen by the response that serves it.

    Attributes:
        emitted: output tokens so far.
        prefill: set once the prompt is computed.
        finished: set once all tokens are out.
        aborted: it was aborted; nothing more will come.
        submitted_s: model time.
    """

    __slots__ = (
        "aborted",
        "each_token",
        "emitted",
        "finished",
        "plan",
        "prefill",
        "prompt_tokens",
        "retractions",
        "rid",
        "signal",
        "submitted_s",
    )

    def __init__(
        self, *, rid: str, plan: Plan, prompt_tokens: int, signal: Signal, each_token: bool
    ) -> None:
        self.rid = rid
        self.plan = plan
        self.prompt_tokens = prompt_tokens
        self.signal = signal
        self.each_token = each_token
        self.emitted = 0
        self.prefill: PrefillDone | None = None
        self.finished: RequestFinished | None = None
        self.aborted = False
        self.retractions = 0
        self.submitted_s = 0.0

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.aborted or self.finished is not None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed here, wherever they came from."""
        found = self.prefill
        if found is None:
            return 0
        return found.cached_device_tokens + found.cached_host_tokens + found.cached_storage_tokens

    @property
    def finish(self) -> dict[str, object]:
        """SGLang's ``finish_reason`` object."""
        if self.aborted:
            return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
        return self.plan.finish


class EngineRuntime:
    """Drives one model.

    Args:
        model: owned from now on; nothing else may call it.
        clock: model time.
        on_stored: called when a prompt's pages are all in the store.
        on_ended: called for each generation that ended, for the counters.

    Attributes:
        lag_s, max_lag_s: how late, in model time, the latest step's results were taken, and the
            latest ever.
        failed: the model broke; nothing runs any more.
    """

    def __init__(
        self,
        model: EngineModel,
        clock: Clock,
        *,
        on_stored: Callable[[PagesStored], None],
        on_ended: Callable[[Generation], None],
    ) -> None:
        self._model = model
        self._clock = clock
        self._on_stored = on_stored
        self._on_ended = on_ended
        self._generations: dict[str, Generation] = {}
        self._step: Step | None = None
        self._last_s = 0.0
        self._alarm: Alarm | None = None
        self._turn: asyncio.Handle | None = None
        self._closed = False
        self.failed = False
        self._watchers: list[asyncio.Future[None]] = []
        self.lag_s = 0.0
        self.max_lag_s = 0.0

    def now_s(self) -> float:
        """Model time at which something done now happens."""
        now = self._clock.now_s()
        if self._step is not None:
            # While a step runs its end is still to come for the model, however late we are.
            now = min(now, self._step.end_s)
        self._last_s = max(self._last_s, now)
        return self._last_s

    def submit(self, request: ModelRequest, generation: Generation) -> None:
        """Hand a request to the model.

        Raises:
            DuplicateRequestError, RequestTooLargeError: from the model; nothing has changed.
        """
        generation.submitted_s = self.now_s()
        self._model.submit(request, now_s=generation.submitted_s)
        self._generations[request.rid] = generation
        self._wake_watchers()
        self._kick()

    def abort(self, rid: str) -> bool:
        """End a request now, wherever it is; False when it is not in the engine."""
        generation = self._generations.pop(rid, None)
        if generation is None:
            return False
        self._model.abort(rid, now_s=self.now_s())
        generation.aborted = True
        self._over(generation)
        self._kick()
        return True

    async def changed(self) -> None:
        """Until the next request enters or leaves the engine."""
        watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers.append(watcher)
        await watcher

    def open_session(self, session_id: str) -> None:
        """See the model."""
        self._model.open_session(session_id, now_s=self.now_s())

    def close_session(self, session_id: str) -> bool:
        """See the model; whether the session was open."""
        closed = self._model.close_session(session_id, now_s=self.now_s())
        self._kick()
        return closed

    def free_session(self, session_id: str) -> None:
        """See the model."""
        self._model.free_session(session_id, now_s=self.now_s())

    def flush(self) -> bool:
        """Drop all idle KV; False, and nothing done, while requests are in the engine."""
        return self._model.flush(now_s=self.now_s())

    def stats(self) -> ModelStats:
        """A reading of the model, idle time until now included."""
        self._dispatch(self._model.poll(now_s=self.now_s()))
        return self._model.stats()

    def rids(self) -> list[str]:
        """Ids of the requests in the engine."""
        return list(self._generations)

    def has(self, rid: str) -> bool:
        """Whether a request with this id is in the engine."""
        return rid in self._generations

    def close(self) -> None:
        """Abort everything and stop the clock."""
        for rid in self.rids():
            self.abort(rid)
        self._closed = True
        if self._alarm is not None:
            self._alarm.cancel()
        if self._turn is not None:
            self._turn.cancel()

    # --- the loop -----------------------------------------------------------------------------

    def _kick(self) -> None:
        """Look at the model again soon, unless a step is running: it will be looked at then."""
        if self._step is None:
            self._soon()

    def _soon(self) -> None:
        if self._turn is None and not self._closed:
            self._turn = asyncio.get_running_loop().call_soon(self._take_turn)

    def _take_turn(self) -> None:
        """Let the model go on; a fault in it ends every request rather than leave them hanging."""
        try:
            self._go_on()
        except BaseException:  # no request may hang, whatever failed; raised again
            self.failed = self._closed = True
            for rid in self.rids():
                generation = self._generations.pop(rid)
                generation.aborted = True
                self._over(generation)
            raise

    def _go_on(self) -> None:
        """End the step that is due, begin the next one, and set the alarm."""
        self._turn = None
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        for _ in range(_CATCH_UP_STEPS):
            if self._step is None or self._clock.now_s() >= self._step.end_s:
                self._step = self._next_step(self._step)
            step = self._step
            if step is None:
                wake_s = self._model.wake_at_s()
                if wake_s is not None:
                    self._alarm = self._clock.call_at(wake_s, self._take_turn)
                return
            now = self._clock.now_s()
            if now < step.end_s:
                self._dispatch(self._model.poll(now_s=now))
                self._sleep_through(step, now)
                return
            if now - step.end_s < _LATE_STEPS * step.duration_s:
                break
        self._soon()

    def _next_step(self, done: Step | None) -> Step | None:
        """Finish ``done``, if a step was running, and begin another if there is work."""
        if done is None:
            now = self._idle_time()
            self._dispatch(self._model.poll(now_s=now))
            return self._model.begin_step(now_s=now)
        self._step = None
        self._last_s = done.end_s
        self.lag_s = self._clock.now_s() - done.end_s
        self.max_lag_s = max(self.max_lag_s, self.lag_s)
        self._dispatch(self._model.end_step(now_s=done.end_s))
        return self._model.begin_step(now_s=done.end_s)  # back to back, however late we are

    def _sleep_through(self, step: Step, now_s: float) -> None:
        """Wake at the step's end, or before when a transfer ends while it runs."""
        at_s = step.end_s
        wake_s = self._model.wake_at_s()
        if wake_s is not None and now_s < wake_s < at_s:
            at_s = wake_s
        self._alarm = self._clock.call_at(at_s, self._take_turn)

    def _idle_time(self) -> float:
        """Now, but not later than an event of the model's own that is due: it comes first."""
        now = self._clock.now_s()
        wake_s = self._model.wake_at_s()
        if wake_s is not None:
            now = min(now, wake_s)
        self._last_s = max(self._last_s, now)
        return self._last_s

    def _over(self, generation: Generation) -> None:
        self._on_ended(generation)
        generation.signal.set()
        self._wake_watchers()

    def _wake_watchers(self) -> None:
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            if not watcher.done():
                watcher.set_result(None)

    def _dispatch(self, events: list[ModelEvent]) -> None:
        for event in events:
            if isinstance(event, TokensEmitted):
                for rid in event.rids:
                    generation = self._generations.get(rid)
                    if generation is not None:
                        generation.emitted += event.count
                        if generation.each_token:
                            generation.signal.set()
            elif isinstance(event, PrefillDone):
                generation = self._generations.get(event.rid)
                if generation is not None:
                    generation.prefill = event
            elif isinstance(event, RequestFinished):
                generation = self._generations.pop(event.rid, None)
                if generation is not None:
                    generation.finished = event
                    generation.emitted = event.output_tokens
                    self._over(generation)
            elif isinstance(event, PagesStored):
                self._on_stored(event)
            else:
                generation = self._generations.get(event.rid)
                if generation is not None:
                    generation.retractions += 1
