"""The requests of one engine model and the batch that decodes in lockstep.

Every running request gains one token per decode step, so nothing is kept per request and step: a
request remembers the step count (*tick*) at which it joined, and its length follows. What the
whole batch needs, KV read and pages to allocate, is kept as sums. A thousand decode steps without
a change of the batch cost no more than one.
"""

from __future__ import annotations

import enum
import heapq

from conserve_serving.engines.kv_nodes import Node
from conserve_serving.engines.model_types import ModelRequest, PrefillDone, RequestFinished


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
        self.session: dict[Node, None] | None = None
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

    @property
    def queued_s(self) -> float:
        """How long it waited for its first admission; 0 before that."""
        return 0.0 if self.admitted_s is None else self.admitted_s - self.arrival_s

    def prefill_done(self, at_s: float) -> PrefillDone:
        """The event that its prompt's KV is complete."""
        return PrefillDone(
            rid=self.request.rid,
            at_s=at_s,
            prompt_tokens=self.request.prompt.tokens,
            cached_device_tokens=self.cached_device,
            cached_host_tokens=self.cached_host,
            cached_storage_tokens=self.cached_storage,
            queued_s=self.queued_s,
        )

    def finished(self, at_s: float) -> RequestFinished:
        """The event that it is over, with all its tokens."""
        return RequestFinished(
            rid=self.request.rid,
            at_s=at_s,
            prompt_tokens=self.request.prompt.tokens,
            output_tokens=self.request.output_tokens,
            cached_tokens=self.cached_tokens,
            queued_s=self.queued_s,
            first_token_s=self.first_token_s,
        )


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

    def remove(self, work: Work) -> int:
        """Take a request out and settle its ``fill_tokens`` and ``emitted`` as of now.

        Afterwards ``fill_tokens`` is the KV it has, the newest token not included.

        Returns:
            KV for which it has pages, the step in progress included.
        """
        allocated = work.fill_tokens + self._allocated_tick - work.joined_tick
        grown = self.tick - work.joined_tick
        self._page_turns[(work.joined_tick - work.fill_tokens) % self._page] -= 1
        del self.running[work]
        work.fill_tokens += grown
        work.emitted += grown
        self.kv_tokens -= work.fill_tokens
        return allocated

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
