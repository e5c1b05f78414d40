"""Which requests hold device KV, and which of their prompts run next.

The desk knows every request in the engine. It queues, admits, brings cached KV in, hands out
prompt chunks, and takes KV back when a request ends or is retracted. When a step runs, and what
comes of it, is the model's business.

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

from typing import Final

from conserve_serving.engines.content import Prompt
from conserve_serving.engines.kv import KvPool
from conserve_serving.engines.links import SerialLink
from conserve_serving.engines.model_batch import State, Work, WorkHeap
from conserve_serving.engines.model_types import ModelConfig
from conserve_serving.engines.profile import HardwareProfile

#: Output beyond this is not reserved for (SGLang's SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION).
_RESERVE_CLIP_TOKENS: Final = 4096
_QUEUED: Final = int(State.QUEUED)
_READY: Final = int(State.READY)
#: Slack for times that went through a driver's arithmetic.
EPSILON_S: Final = 1e-6


class Desk:
    """Requests and their KV.

    Attributes:
        works: every request in the engine, by id.
        held: how many there are, by state.
        queued_tokens: prompt tokens waiting in the queue, cached or not.
    """

    def __init__(self, profile: HardwareProfile, config: ModelConfig, pool: KvPool) -> None:
        """Args: as for the model, and the pool all requests share."""
        self.works: dict[str, Work] = {}
        self.held = [0] * len(State)
        self.queued_tokens = 0
        self._pool = pool
        self._profile = profile
        self._config = config
        self._page = config.page_tokens
        self._host_link = SerialLink()
        self._queue = WorkHeap(State.QUEUED)
        self._ready = WorkHeap(State.READY)
        self._loading = WorkHeap(State.LOADING)
        self._begun: Work | None = None  # a prompt whose chunks have not all been computed
        self._reserved_tokens = 0
        self._blocked = False  # the head found no room, and nothing has changed since
        self._retracting = False  # nobody is admitted until a request ends

    @property
    def has_prompts(self) -> bool:
        """Whether there may be a prompt to compute now."""
        held = self.held
        return held[_READY] > 0 or (held[_QUEUED] > 0 and not (self._blocked or self._retracting))

    @property
    def ingress_busy_s(self) -> float:
        """Seconds of all transfers into the device, those that wait included."""
        return self._host_link.busy_s

    def paged(self, tokens: int) -> int:
        """``tokens`` rounded up to whole pages."""
        return tokens + -tokens % self._page

    def move(self, work: Work, state: State) -> None:
        """Change a request's state and the counts."""
        self.held[work.state] -= 1
        self.held[state] += 1
        work.state = state

    # --- queue -------------------------------------------------------------------------------
    def enter(self, work: Work) -> None:
        """Take in a new request."""
        request = work.request
        if request.session_id is not None:
            self._pool.sessions.open(request.session_id)
            work.session = self._pool.sessions.leaves[request.session_id]
        self.works[request.rid] = work
        self.held[State.QUEUED] += 1
        self._enqueue(work)

    def _enqueue(self, work: Work) -> None:
        self._queue.push(work.order, work)
        self.queued_tokens += work.fill_tokens
        if self._queue.peek() is work:
            self._blocked = False

    def loading_until_s(self) -> float | None:
        """When the next loading request will have its KV; None when none is loading."""
        work = self._loading.peek()
        return None if work is None else work.ready_s

    def wake_loaded(self, now_s: float) -> None:
        """Let requests whose cached KV has arrived by ``now_s`` go on."""
        while (work := self._loading.peek()) and work.ready_s <= now_s + EPSILON_S:
            self._loading.pop()
            self._make_ready(work)

    def _make_ready(self, work: Work) -> None:
        self.move(work, State.READY)
        self._ready.push(work.order, work)

    # --- prompts -----------------------------------------------------------------------------
    def pick_chunks(self, budget_tokens: int, now_s: float) -> list[tuple[Work, int]]:
        """Prompt chunks for one step, admitting from the queue while the budget lasts.

        Args:
            budget_tokens: at least a page.
            now_s: model time.

        Returns:
            Requests and the tokens each is to compute; they are READY until :meth:`put_back`,
            :meth:`leave` or a move of the caller's.
        """
        budget = budget_tokens
        chunks: list[tuple[Work, int]] = []
        while budget > 0 and (work := self._next_prefill(now_s)) is not None:
            left = work.fill_tokens - work.computed_tokens
            take = left if left <= budget else budget - budget % self._page
            if not take:  # less than a page of the budget is left
                self.put_back(work)
                break
            chunks.append((work, take))
            budget -= take
        return chunks

    def put_back(self, work: Work) -> None:
        """The prompt is not complete: it goes on in a later step."""
        if self._config.chunked_first and self._begun is None:
            self._begun = work
        else:
            self._ready.push(work.order, work)

    def _next_prefill(self, now_s: float) -> Work | None:
        """The next prompt to compute: a begun one, else the better of ready and queued."""
        begun, self._begun = self._begun, None
        if begun is not None and begun.state is State.READY:
            return begun
        while True:
            ready = self._ready.peek()
            head = None if self._blocked or self._retracting else self._queue.peek()
            if head is None or (ready is not None and ready.order < head.order):
                return self._ready.pop() if ready is not None else None
            if not self._admit(head, now_s):
                self._blocked = True
                continue
            self._queue.pop()
            self.queued_tokens -= head.fill_tokens
            if head.ready_s > now_s + EPSILON_S:
                self.move(head, State.LOADING)
                self._loading.push((head.ready_s, head.order[1]), head)
            else:
                self._make_ready(head)

    def _admit(self, work: Work, now_s: float) -> bool:
        """Give the head of the queue its pages, if there is room; it stays in the queue."""
        if len(self.works) - self.held[State.QUEUED] >= self._config.max_running_requests:
            return False
        pool, request = self._pool, work.request
        # SGLang always computes at least the last token, for its logits.
        limit = min(request.prompt.tokens, work.fill_tokens - 1)
        limit -= limit % self._page
        match = pool.match(request.prompt, limit)
        found = match.device_tokens + match.host_tokens
        private = self.paged(work.fill_tokens) - found
        expected = self.paged(work.fill_tokens + self._output_reserve(work))
        reserved = min(expected, pool.capacity_tokens) - found
        pool.lock(match.node)
        promised = pool.locked_tokens + self._reserved_tokens + match.host_tokens + reserved
        if promised > pool.capacity_tokens or match.host_tokens + private > pool.room_tokens:
            pool.unlock(match.node)
            return False
        ready_s = match.ready_s
        if match.host_tokens:
            cost_s = self._profile.restore_s(match.host_tokens)
            ready_s = max(ready_s, self._host_link.reserve(now_s, cost_s))
            pool.restore(match.node, ready_s=ready_s)
        pool.allocate(private)
        stored = min(request.stored_tokens, limit)
        loaded = stored - stored % self._page - found
        if loaded < max(self._config.store_read_min_tokens, 1):
            loaded = 0
        elif cost_s := self._profile.ingress_s(loaded):
            ready_s = max(ready_s, self._host_link.reserve(now_s, cost_s))
        self._reserved_tokens += reserved
        work.reserved_tokens = reserved
        work.node, work.node_tokens = match.node, found
        work.computed_tokens = found + loaded
        work.ready_s = ready_s
        if work.admitted_s is None:
            work.admitted_s = now_s
        if not work.prefilled:
            work.cached_device, work.cached_host = match.device_tokens, match.host_tokens
            work.cached_storage = loaded
        return True

    def _output_reserve(self, work: Work) -> int:
        """Output tokens to keep room for, from the request's own limit."""
        request = work.request
        limit = max(request.max_output_tokens or 0, request.output_tokens) - work.emitted
        ratio = self._config.output_reserve_ratio
        return int(min(max(limit, 0), _RESERVE_CLIP_TOKENS) * ratio)

    # --- giving KV back ----------------------------------------------------------------------
    def insert(self, work: Work, content: Prompt, end_tokens: int) -> None:
        """Give the tree the whole pages up to ``end_tokens`` that the request holds privately."""
        given = end_tokens - work.node_tokens
        if given <= 0:
            return
        used_tokens = self._pool.used_tokens
        session = work.request.session_id if self._session_open(work) else None
        work.node = self._pool.insert(work.node, work.node_tokens, content, end_tokens, session)
        work.node_tokens = end_tokens
        work.reserved_tokens -= given
        self._reserved_tokens -= given
        if self._pool.used_tokens < used_tokens:  # others had computed the same meanwhile
            self._blocked = False

    def leave(self, work: Work, allocated_tokens: int, kv_tokens: int) -> None:
        """Let a request go: what it computed becomes idle KV, the rest is freed.

        Args:
            work: the request, in any state.
            allocated_tokens: KV it has pages for; not looked at while it is queued.
            kv_tokens: KV that is really there.
        """
        if work.state is State.QUEUED:
            self.queued_tokens -= work.fill_tokens
            self._blocked = False  # it may have been the head
        else:
            content = work.request.prompt if work.context is None else work.context
            known = min(kv_tokens, content.tokens)
            self.insert(work, content, known - known % self._page)
            if self._session_open(work) and work.request.session_id is not None:
                self._pool.sessions.reach(work.request.session_id, work.node)
            self._give_back(work, allocated_tokens)
            self._retracting = False
        self.move(work, State.OVER)
        del self.works[work.request.rid]

    def retract(self, work: Work, allocated_tokens: int) -> None:
        """Take an admitted request's KV from it and queue it again, at its old place."""
        self._give_back(work, allocated_tokens)
        work.node, work.node_tokens = self._pool.root, 0
        work.fill_tokens = work.request.prompt.tokens + work.emitted
        work.computed_tokens = 0
        self.move(work, State.QUEUED)
        self._enqueue(work)
        self._retracting = True

    def newest_prefilling(self) -> Work | None:
        """The last to arrive of those admitted that do not decode yet."""
        waiting = [w for w in self.works.values() if w.state in (State.READY, State.LOADING)]
        return max(waiting, key=lambda work: work.order[1], default=None)

    def _session_open(self, work: Work) -> bool:
        """Whether the session the request came with is still the one of that name."""
        leaves = self._pool.sessions.leaves.get(work.request.session_id or "")
        return leaves is not None and leaves is work.session

    def _give_back(self, work: Work, allocated_tokens: int) -> None:
        """Free the request's private pages, its lock and its reserve."""
        self._pool.release(self.paged(allocated_tokens) - work.node_tokens)
        self._pool.unlock(work.node)
        self._reserved_tokens -= work.reserved_tokens
        work.reserved_tokens = 0
        self._blocked = False
