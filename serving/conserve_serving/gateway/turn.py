"""The life of one turn: arrive, be placed, be attempted, end exactly once.

::

    measure prompt ─► TurnArrived ─► wait for a decision ◄──────────────────┐
                                       │ Place                             │ TurnFailed
                                       └─ Attempt ─► TurnFinished          │ (retryable)
                                             └─ engine failed ─────────────┘

Whatever happens, the scheduler is told of one end: `TurnFinished`, `TurnFailed` or `TurnAborted`,
or it has refused the turn itself. A newer plan interrupts the current attempt, unless something
has reached the client already: then the turn fails, because it cannot begin again.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from conserve_serving.core.decisions import CloseTurn, Hold, Place, Reject
from conserve_serving.core.events import TurnAborted, TurnArrived, TurnFailed
from conserve_serving.core.types import EngineId, Outcome, Reason, TurnId
from conserve_serving.energy.work import Tally
from conserve_serving.engines.http_errors import EngineHttpError, ResponseTimeout
from conserve_serving.gateway.attempt import Attempt, EngineAnsweredError
from conserve_serving.gateway.attribution import Origin
from conserve_serving.gateway.conversations import TurnSummary, Usage
from conserve_serving.gateway.errors import (
    ApiError,
    ContextLengthError,
    InternalError,
    OverloadedError,
    UnavailableError,
    UpstreamError,
)
from conserve_serving.gateway.handover import tokenize
from conserve_serving.gateway.identity import scoped
from conserve_serving.gateway.lineage import Relation
from conserve_serving.gateway.relay import Client, conversation_headers
from conserve_serving.gateway.request import TurnRequest

if TYPE_CHECKING:
    from conserve_serving.gateway.gateway import Gateway

_log = logging.getLogger("conserve.gateway.turn")


class Turn:
    """One request's way through the gateway.

    Args:
        gateway: everything shared.
        turn: the scheduler's name for it, new for every request.
        client: receives the answer.
        request, origin: what was asked, by whom.
        arrived_s: when its body was complete (wall).

    Attributes:
        ids: the prompt's token ids, once they are known.
        prompt_tokens: its length, estimated until ``ids`` are known.
        waited_s: time spent waiting for others: not the gateway's own.
        energy: what it is charged, retries included.
    """

    def __init__(
        self,
        gateway: Gateway,
        turn: TurnId,
        client: Client,
        *,
        request: TurnRequest,
        origin: Origin,
        arrived_s: float,
    ) -> None:
        tags, conversation = origin.tags, origin.conversation
        self.gateway = gateway
        self.id = turn
        self.client = client
        self.request = request
        self.tags = tags
        self.conversation = conversation
        self.mark = origin.mark
        self.index = conversation.turn_index(tags.turn_id, origin.relation, tags.turn_index)
        self.ids: list[int] | None = request.token_ids
        self.prompt_tokens = 0
        self.arrived_s = arrived_s
        self.waited_s = 0.0
        self.energy = Tally(conversation.energy)
        self.relation = origin.relation
        self._kept_bytes = origin.kept_bytes
        self._ttft_s: float | None = None
        self._place: Place | None = None
        self._attempt: Attempt | None = None
        self._decision: Place | Reject | CloseTurn | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._interrupted = False
        self._gone = False
        self._noted = False
        self._concluded = False
        self._outcome = Outcome.FAILED
        self._last_error: ApiError | None = None
        self.task: asyncio.Task[None] | None = None

    # --- called from outside -----------------------------------------------------------------
    def start(self) -> asyncio.Task[None]:
        """Run the turn; the task ends when the client has its answer or has left."""
        self.conversation.running += 1  # at once: the next request may be this one's twin
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(self._over)
        return self.task

    def _over(self, task: asyncio.Task[None]) -> None:
        del task
        if not self._concluded:  # cancelled before its first step: it never ran
            self._conclude()
        self.gateway.forget_turn(self)

    def deliver(self, decision: Place | Hold | Reject | CloseTurn) -> None:
        """Take a decision in (see ``runtime.Inbox``)."""
        if isinstance(decision, Hold):
            self.conversation.phase = "held"
            return
        if isinstance(decision, CloseTurn):
            self._outcome = decision.outcome
            if isinstance(self._decision, Reject):
                return  # the refusal says more
        self._decision = decision
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        elif isinstance(decision, Place):
            self._interrupt()

    def client_gone(self) -> None:
        """The client has left: stop everything, upstream included."""
        if self.task is not None and not self.task.done() and not self._gone:
            self._gone = True
            self.task.cancel()

    def check_progress(self, now_s: float, limit_s: float) -> None:
        """Give the attempt up if its engine has been silent for longer than ``limit_s``.

        A reply that is not streamed brings nothing before it is complete: there the engine is
        asked whether it is at work.
        """
        attempt = self._attempt
        if attempt is None or not attempt.decoding or now_s - attempt.last_progress_s <= limit_s:
            return
        if self.request.stream:
            self._interrupt()
        elif not attempt.asking:
            attempt.asking = True
            self.gateway.background.start(self._ask(attempt), f"ask about turn {self.id}")

    async def _ask(self, attempt: Attempt) -> None:
        since_s, decoder = self.gateway.wall(), attempt.decoder
        await self.gateway.fleet.suspect(decoder)
        attempt.asking = False
        if self._attempt is not attempt:
            return
        loads = decoder.loads
        if (
            decoder.serving
            and decoder.last_byte_s >= since_s
            and loads is not None
            and (loads.running_requests or loads.waiting_requests)
        ):
            attempt.last_progress_s = self.gateway.wall()
        else:
            self._interrupt()

    def first_byte(self, now_s: float) -> None:
        """The first byte of an answer has come from the engine."""
        self._ttft_s = now_s - self.arrived_s
        self.gateway.metrics.ttft_s.observe(self._ttft_s)

    def note_finished(self, place: Place, usage: Usage, cached_tokens: int) -> None:
        """The turn finished with these counts; the scheduler has been told."""
        self.gateway.note_finished(self, place, usage, cached_tokens)
        self._summarise(place, usage, cached_tokens)
        if self.tags.final:
            self.gateway.end_conversation(self.conversation)

    def _interrupt(self) -> None:
        if self._attempt is not None and self.task is not None and not self._interrupted:
            if self.task is asyncio.current_task():
                return  # it is about to look for decisions by itself
            self._interrupted = True
            self.task.cancel()

    # --- the whole life ----------------------------------------------------------------------
    async def _run(self) -> None:
        gateway = self.gateway
        try:
            await self._serve()
        except ApiError as error:
            await self._answer(error)
        except asyncio.CancelledError:
            if not self._gone:
                raise
            gateway.metrics.aborts += 1
        except Exception as error:  # noqa: BLE001 -- the boundary: a defect must not leak a turn
            _log.error("turn %s: a defect of the gateway", self.id, exc_info=error)
            gateway.metrics.internal_errors += 1
            await self._answer(InternalError("the gateway failed; its log has the details"))
        finally:
            if gateway.runtime.is_live(self.id):
                gateway.runtime.handle(TurnAborted(turn=self.id))
            self._conclude()

    async def _serve(self) -> None:
        await self._measure()
        runtime = self.gateway.runtime
        runtime.register(self.id, self)
        runtime.handle(self._arrival())
        while True:
            decision = await self._next_decision()
            if isinstance(decision, Reject):
                raise self._refusal(decision)
            if isinstance(decision, CloseTurn):
                raise self._last_error or UpstreamError("the engine failed this turn: try again")
            if self.client.started:
                self._fail(decision, decision.decoder, retryable=False)
                raise self._last_error or UpstreamError("the engine was lost in mid-stream")
            self._place = decision
            if await self._try(decision):
                return

    async def _next_decision(self) -> Place | Reject | CloseTurn:
        if self._decision is None:
            since_s = self.gateway.wall()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
                self.waited_s += self.gateway.wall() - since_s
        decision, self._decision = self._decision, None
        if decision is None:
            raise AssertionError("woken without a decision")
        return decision

    async def _measure(self) -> None:
        """How long the prompt is: exact where a hand-off may follow, else an estimate."""
        conversation, gateway = self.conversation, self.gateway
        if self.ids is None and conversation.context_tokens == 0 and gateway.may_hand_over():
            await self._count()
        if self.ids is not None:
            self.prompt_tokens = len(self.ids)
        elif self.index == 1 and self.tags.counted_exactly and self.tags.first_turn_tokens:
            self.prompt_tokens = self.tags.first_turn_tokens
        else:
            self.prompt_tokens = conversation.estimate_prompt_tokens(len(self.request.content))
        longest = gateway.fleet.longest_context_tokens
        if self.ids is None and longest is not None and self.prompt_tokens >= longest:
            # An estimate alone refuses nothing: a picture, say, has many bytes and few tokens.
            await self._count()
            if self.ids is not None:
                self.prompt_tokens = len(self.ids)

    async def _count(self) -> None:
        since_s = self.gateway.wall()
        self.ids = await tokenize(self)
        self.waited_s += self.gateway.wall() - since_s

    def _arrival(self) -> TurnArrived:
        conversation, tags = self.conversation, self.tags
        hint = None
        if tags.placement is not None and conversation.context_tokens == 0:  # unknown here
            hint = self.gateway.signer.read(conversation.key, tags.placement)
            if hint is not None:
                conversation.turns = hint.turns
                conversation.transfers = hint.transfers
                conversation.in_store = hint.transfers > 0
                conversation.turn_ids, conversation.begun = None, 0
                self.index = conversation.turn_index(tags.turn_id, self.relation)
        reusable = None
        if self.relation is Relation.REWRITE:
            reusable = int(self._kept_bytes / conversation.bytes_per_token)
        parent = tags.parent
        return TurnArrived(
            turn=self.id,
            conversation=conversation.key,
            prompt_tokens=self.prompt_tokens,
            prompt_exact=self.ids is not None,
            reusable_tokens=reusable,
            max_output_tokens=self.request.max_output_tokens,
            parent=None if parent is None else scoped(tags.tenant, conversation.model, parent),
            hint=hint,
        )

    async def _try(self, place: Place) -> bool:
        """Attempt a plan. True: the turn has ended. False: a new decision is due."""
        decoder = self.gateway.fleet.get(place.decoder)
        if decoder is None or not decoder.serving:
            self._fail(place, place.decoder, retryable=True)
            return False
        attempt = self._attempt = Attempt(self, place, decoder)
        try:
            await attempt.run()
        except asyncio.CancelledError:
            if self._gone or not self._interrupted:
                raise
            self._interrupted = False
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
            if self._decision is not None and not attempt.finished:
                return False  # a newer plan
            error: EngineHttpError = ResponseTimeout(
                decoder.client.pool.origin, "silent for too long within a turn"
            )
        except EngineHttpError as failure:
            error = failure
        else:
            if attempt.refused:
                self._fail(place, place.decoder, retryable=False)
            return True
        finally:
            self._attempt = None
        if attempt.finished:  # everything had come but the end of the response
            self.client.finish()
            return True
        await self._upstream_failed(place, error)
        return False

    async def _upstream_failed(self, place: Place, error: EngineHttpError) -> None:
        """Tell the scheduler, so that a decision follows; or raise what ends the turn."""
        _log.warning("turn %s: %s", self.id, error)
        self._last_error = UpstreamError(f"engine {place.decoder} failed: {error}")
        if self.client.started:
            self._fail(place, place.decoder, retryable=False)
            raise self._last_error
        decoder = self.gateway.fleet.get(place.decoder)
        if decoder is not None and not isinstance(error, EngineAnsweredError):
            # If the engine is dead, the scheduler hears that first and has a new plan for us.
            await self.gateway.fleet.suspect(decoder)
        if self._decision is None:
            self._fail(place, place.decoder, retryable=True)

    def _fail(self, place: Place, engine: EngineId, *, retryable: bool) -> None:
        self.gateway.runtime.handle(
            TurnFailed(turn=self.id, plan=place.plan, engine=engine, retryable=retryable)
        )

    # --- ends --------------------------------------------------------------------------------
    def _refusal(self, decision: Reject) -> ApiError:
        reason, after_s = decision.reason, decision.retry_after_s
        after_s = (after_s or 1.0) / self.gateway.runtime.clock.speed
        if reason is Reason.PROMPT_TOO_LONG:
            return ContextLengthError(
                f"the prompt of about {self.prompt_tokens} tokens is longer than any decoder can "
                "hold: shorten it",
                param=self.request.prompt_field,
            )
        if reason is Reason.NO_ENGINE:
            text = "no engine is alive: try again later"
            return UnavailableError(text, code=reason.value, retry_after_s=after_s)
        text = "too many turns are waiting" if reason is Reason.QUEUE_FULL else "held too long"
        return OverloadedError(
            f"{text} for room: try again later", code=reason.value, retry_after_s=after_s
        )

    async def _answer(self, error: ApiError) -> None:
        """Send an error, as a response or, when one has begun, as its last event."""
        if self._gone:
            return
        if self.client.started:
            self.client.finish(error.event() if self.request.stream else b"")
            return
        body = error.body()
        headers = [*error.headers(), (b"content-length", b"%d" % len(body))]
        block = conversation_headers(
            conversation=self.conversation.id,
            source=self.tags.source,
            relation=self.relation,
            turn_index=self.index,
        )
        self.client.start(error.status, headers, block)
        self.client.finish(body)

    def _conclude(self) -> None:
        self._concluded = True
        conversation, gateway = self.conversation, self.gateway
        conversation.running -= 1
        if not conversation.running:
            conversation.phase = "idle"
        gateway.conversations.touch(conversation)
        gateway.if_over(conversation)
        if not self._noted:
            if self._gone:
                self._outcome = Outcome.ABORTED
            self._summarise(self._place, None, 0)
        gateway.metrics.turn_s.observe(gateway.wall() - self.arrived_s)

    def _summarise(self, place: Place | None, usage: Usage | None, cached_tokens: int) -> None:
        self._noted = True
        handed_over = self._attempt is not None and self._attempt.handed_over
        self.gateway.conversations.note_turn(
            self.conversation,
            TurnSummary(
                number=self.index,
                outcome=self._outcome,
                reason=None if place is None else place.reason,
                prefill_engine=None
                if place is None
                else (place.prefiller if handed_over else place.decoder),
                decode_engine=None if place is None else place.decoder,
                prompt_tokens=self.prompt_tokens if usage is None else usage.prompt_tokens,
                output_tokens=0 if usage is None else usage.output_tokens,
                cached_tokens=cached_tokens,
                ttft_s=self._ttft_s,
                duration_s=self.gateway.wall() - self.arrived_s,
                energy=self.energy,
            ),
        )
