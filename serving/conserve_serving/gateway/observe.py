"""Mixed steps, observed from outside: how decode steps stretch while a prompt is prefilled.

SGLang's counters book a step with prefill in it as prefill, so what its neighbours paid is not in
them. It can be seen in the streams that pass through the gateway: while exactly one prompt is
being prefilled on an engine, one other stream's events are counted and timed.
"""

from __future__ import annotations

from typing import Final

from conserve_serving.core.events import StepTimes

#: Shorter prefills end within a step or two and say nothing.
_MIN_PREFILL_TOKENS: Final = 256
_MIN_EVENTS: Final = 3


class MixedSteps:
    """Sums over the mixed steps of one engine since the last `take`."""

    __slots__ = (
        "_events",
        "_last_s",
        "_observer",
        "_prefills",
        "_sums",
        "_window",
    )

    def __init__(self) -> None:
        self._observer: object | None = None
        self._events = 0
        self._last_s = 0.0
        self._prefills = 0
        #: Observer, its event count and time when the only prefill in flight began.
        self._window: tuple[object, int, float] | None = None
        self._sums = (0, 0.0, 0, 0)

    def event(self, stream: object, count: int, now_s: float) -> None:
        """``count`` events of ``stream`` arrived now. Called for every chunk: kept tiny."""
        if self._observer is None:
            self._observer = stream
        if self._observer is stream:
            self._events += count
            self._last_s = now_s

    def stream_ended(self, stream: object) -> None:
        """``stream`` gives no more events."""
        if self._observer is stream:
            self._observer = None
            self._window = None

    def prefill_started(self) -> None:
        """A prompt was sent to the engine, to be prefilled there."""
        self._prefills += 1
        self._window = None
        if self._prefills == 1 and self._observer is not None:
            self._window = (self._observer, self._events, self._last_s)

    def prefill_ended(self, *, tokens: int, active_tokens: int) -> None:
        """Its first token came, or it failed.

        Args:
            tokens: uncached tokens that were prefilled; 0 where that is not known.
            active_tokens: context of the turns running on the engine.
        """
        self._prefills = max(0, self._prefills - 1)
        window, self._window = self._window, None
        if window is None or window[0] is not self._observer or tokens < _MIN_PREFILL_TOKENS:
            return
        events = self._events - window[1]
        if events < _MIN_EVENTS:
            return
        steps, total_s, kv_tokens, prefill_tokens = self._sums
        self._sums = (
            steps + events,
            total_s + self._last_s - window[2],
            kv_tokens + events * active_tokens,
            prefill_tokens + tokens,
        )

    def take(self) -> StepTimes | None:
        """The sums since the last call; None if there was nothing."""
        steps, total_s, kv_tokens, prefill_tokens = self._sums
        if not steps:
            return None
        self._sums = (0, 0.0, 0, 0)
        return StepTimes(
            mixed_steps=steps,
            mixed_s=total_s,
            mixed_kv_tokens=kv_tokens,
            mixed_prefill_tokens=prefill_tokens,
        )
