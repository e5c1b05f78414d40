"""The requests of one engine model and the batch that decodes in lockstep.

Every running request gains one token per decode step, so nothing is kept per request and step: a
request remembers the step count (*tick*) at which it joined, and its length follows. What the
whole batch needs, KV read and pages to allocate, is kept as sums. A thousand decode steps without
a change of the batch cost no more than one.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections.abc import Callable

from conserve_serving.engines.kv_nodes import Node
from conserve_serving.engines.model_types import ModelRequest
from conserve_serving.engines.steptime import StepTimes


class State(enum.IntEnum):
    """Where a request is; ``OVER`` ones are forgotten, heaps drop them when they surface."""

    QUEUED = 0
    LOADING = 1
    READY = 2
    DECODING = 3
    OVER = 4


class Work:
    """One request on its way through the engine. Owned by the model.

    Attributes:
        order: ``(-priority, arrival number)``: smaller runs first.
        entry: number of the newest entry in a ``WorkHeap``; older ones are stale.
        emitted: output tokens at ``joined_tick`` (or now, when it is not decoding).
        fill_tokens: KV the prefill must bring about: prompt, and output kept over a retraction.
        computed_tokens: KV there so far, cached or loaded tokens included.
        node, node_tokens: the locked path in the prefix tree and its length.
        reserved_tokens: private pages admission counts on this request to need at most.
    """

    __slots__ = (
        "admitted_s",
        "arrival_s",
        "cached_device",
        "cached_host",
        "cached_storage",
        "computed_tokens",
        "context",
        "emitted",
        "entry",
        "fill_tokens",
        "first_token_s",
        "joined_tick",
        "node",
        "node_tokens",
        "order",
        "prefilled",
        "ready_s",
        "request",
        "reserved_tokens",
        "session",
        "state",
    )

    def __init__(self, request: ModelRequest, number: int, arrival_s: float, root: Node) -> None:
        self.request = request
        self.order = (-request.priority, number)
        self.arrival_s = arrival_s
        self.state = State.QUEUED
        self.context = request.context
        self.session: set[Node] | None = None
        self.emitted = 0
        self.entry = 0
        self.fill_tokens = request.prompt.tokens
        self.computed_tokens = 0
        self.node = root
        self.node_tokens = 0
        self.reserved_tokens = 0
        self.joined_tick = 0
        self.ready_s = arrival_s
        self.prefilled = False
        self.cached_device = self.cached_host = self.cached_storage = 0
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed, wherever they came from."""
        return self.cached_device + self.cached_host + self.cached_storage


class WorkHeap:
    """Requests in one state, smallest key first.

    A request waits in at most one heap; its older entries, and those of a request that has left
    the state, are skipped.
    """

    __slots__ = ("_heap", "_state")

    def __init__(self, state: State) -> None:
        self._heap: list[tuple[tuple[float, int], int, Work]] = []
        self._state = state

    def push(self, key: tuple[float, int], work: Work) -> None:
        """Enter a request; keys of different requests differ."""
        work.entry += 1
        heapq.heappush(self._heap, (key, work.entry, work))

    def peek(self) -> Work | None:
        """The first request, or None."""
        heap = self._heap
        while heap:
            _, entry, work = heap[0]
            if work.state is self._state and work.entry == entry:
                return work
            heapq.heappop(heap)
        return None

    def pop(self) -> Work:
        """Take the request that :meth:`peek` has just shown."""
        return heapq.heappop(self._heap)[2]


class DecodeBatch:
    """The running requests. A step runs from :meth:`begin` to :meth:`end`."""

    __slots__ = (
        "_allocated_tick",
        "_finish",
        "_page",
        "_page_turns",
        "kv_tokens",
        "running",
        "tick",
    )

    def __init__(self, page_tokens: int) -> None:
        """Args: page size in tokens."""
        self._page = page_tokens
        self.tick = 0
        self._allocated_tick = 0
        self.kv_tokens = 0
        self.running: dict[Work, None] = {}
        #: How many requests start a new page in steps whose tick is i modulo the page size.
        self._page_turns = [0] * page_tokens
        self._finish: list[tuple[int, tuple[int, int], int, Work]] = []

    def add(self, work: Work, output_tokens: int) -> None:
        """The prefill of ``work`` is complete and its next token is in ``work.emitted``."""
        work.joined_tick = self.tick
        finish_tick = self.tick + output_tokens - work.emitted
        self.running[work] = None
        self.kv_tokens += work.fill_tokens
        self._page_turns[(self.tick - work.fill_tokens) % self._page] += 1
        heapq.heappush(self._finish, (finish_tick, work.order, work.joined_tick, work))

    def remove(self, work: Work) -> None:
        """Take a request out and settle its ``fill_tokens`` and ``emitted`` as of now.

        Afterwards ``fill_tokens`` is the KV it has, the newest token not included.
        """
        grown = self.tick - work.joined_tick
        self._page_turns[(work.joined_tick - work.fill_tokens) % self._page] -= 1
        del self.running[work]
        work.fill_tokens += grown
        work.emitted += grown
        self.kv_tokens -= work.fill_tokens

    def allocated_kv_tokens(self, work: Work) -> int:
        """KV for which a running request has pages, the step in progress included."""
        return work.fill_tokens + self._allocated_tick - work.joined_tick

    def pages_for_one(self) -> int:
        """Pages the batch starts in its next step."""
        return self._page_turns[self.tick % self._page]

    def pages_for(self, steps: int) -> int:
        """Pages the batch starts in its next ``steps`` steps."""
        whole, rest = divmod(steps, self._page)
        first = self.tick % self._page
        turns, wrapped = self._page_turns, first + rest - self._page
        pages = whole * len(self.running) + sum(turns[first : first + rest])
        return pages + sum(turns[:wrapped]) if wrapped > 0 else pages

    def steps_to_finish(self) -> int:
        """Steps until the first request has all its tokens; the batch is not empty."""
        heap = self._finish
        while not self._is_current(heap[0][2], heap[0][3]):
            heapq.heappop(heap)
        return heap[0][0] - self.tick

    @staticmethod
    def _is_current(joined_tick: int, work: Work) -> bool:
        """Whether an entry is of this stay in the batch, not of one that a retraction ended."""
        return work.state is State.DECODING and work.joined_tick == joined_tick

    def begin(self, steps: int) -> None:
        """Pages for ``steps`` steps have been allocated."""
        self._allocated_tick = self.tick + steps

    def end(self) -> list[Work]:
        """The steps are over; returns the requests that have all their tokens, still running."""
        self.kv_tokens += len(self.running) * (self._allocated_tick - self.tick)
        self.tick = self._allocated_tick
        done = []
        while self._finish and self._finish[0][0] <= self.tick:
            _, _, joined_tick, work = heapq.heappop(self._finish)
            if self._is_current(joined_tick, work):
                done.append(work)
        return done


def burst_limit(decode: DecodeBatch, free_pages: int) -> int:
    """How many decode steps may run before the batch changes: until the first request has all its
    tokens, or pages would have to be evicted. At least one; its pages are there."""
    limit = decode.steps_to_finish()
    if decode.pages_for(limit) > free_pages:
        limit = _last_true(1, limit, lambda steps: decode.pages_for(steps) <= free_pages)
    return limit


def plan_burst(
    decode: DecodeBatch, times: StepTimes, horizon_s: float, limit: int
) -> tuple[int, float]:
    """How many decode steps run together from now, and how long they take.

    Steps go together up to ``limit``, or until one would begin at ``horizon_s`` from now or later.
    At least one step.

    Args:
        decode: the batch, not empty.
        times: step times, linear in the KV read for stretches at a time: their sums are exact.
        horizon_s: seconds from now.
        limit: at most so many steps, 1 or more.
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
