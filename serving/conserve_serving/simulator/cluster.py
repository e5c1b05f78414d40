"""The virtual cluster: one scheduler, its engines as models, and a queue of things to come.

Follows the same protocol as the gateway: a plan with a prefiller is prefilled there, handed over
when its pages are stored, and decoded on the decoder; a conversation's KV is protected by a
session on its decoder until it is parked or released.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from conserve_serving.core.decisions import (
    CloseTurn,
    Decision,
    Hold,
    Park,
    Place,
    Reject,
    Release,
    WakeAt,
)
from conserve_serving.core.events import (
    ConversationEnded,
    EngineJoined,
    EngineLost,
    EngineReported,
    Event,
    HandoffFinished,
    PrefillFinished,
    StepTimes,
    TimerFired,
    TurnArrived,
    TurnFinished,
)
from conserve_serving.core.scheduler import Scheduler
from conserve_serving.core.types import EngineId, Outcome, Tier, TurnId
from conserve_serving.engines.content import Run, StreamPrompt
from conserve_serving.engines.model import EngineModel
from conserve_serving.engines.model_types import (
    ModelConfig,
    ModelEvent,
    ModelRequest,
    PagesStored,
    PrefillDone,
    RequestFinished,
    StepCounters,
)
from conserve_serving.engines.profile import HardwareProfile
from conserve_serving.simulator.conversation import SimulatedConversation, TurnResult


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedEngine:
    """One engine of the cluster."""

    id: EngineId
    tier: Tier
    profile: HardwareProfile
    config: ModelConfig


class _Engine:
    """A model with its place in virtual time."""

    __slots__ = ("alive", "epoch", "in_step", "model", "read", "spec")

    def __init__(self, spec: SimulatedEngine) -> None:
        self.spec = spec
        self.model = EngineModel(spec.profile, spec.config)
        self.read: StepCounters = self.model.stats().counters
        self.alive = True
        self.epoch = 1
        self.in_step = False


class _Turn:
    """A turn under way."""

    __slots__ = (
        "conversation",
        "index",
        "output",
        "place",
        "prefilled_s",
        "prompt",
        "result",
        "stored",
        "turn",
    )

    def __init__(
        self, conversation: _Conversation, index: int, turn: TurnId, prompt: StreamPrompt
    ) -> None:
        self.conversation = conversation
        self.index = index
        self.turn = turn
        self.prompt = prompt
        self.output = conversation.spec.turns[index].output_tokens
        self.place: Place | None = None
        self.prefilled_s = 0.0
        self.stored = 0
        self.result: TurnResult | None = None


class _Conversation:
    """A conversation and the content of its context, as runs of streams of its own."""

    __slots__ = ("context", "next", "spec")

    def __init__(self, spec: SimulatedConversation) -> None:
        self.spec = spec
        self.next = 0
        self.context: list[Run] = []


class VirtualCluster:
    """Runs conversations through a scheduler and simulated engines, in virtual time.

    Args:
        scheduler: the very class the gateway hosts; it must be fresh.
        engines: the cluster.
        report_interval_s: how often engines report, as the gateway polls them.
        observer: told of each event and what was decided.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        engines: Iterable[SimulatedEngine],
        *,
        report_interval_s: float = 1.0,
        observer: Callable[[float, Event, list[Decision]], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.now_s = 0.0
        self.results: list[TurnResult] = []
        self._observer = observer
        self._report_interval_s = report_interval_s
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._open = 0
        self._wake_s: float | None = None
        self._turns: dict[TurnId, _Turn] = {}
        self._engines = {spec.id: _Engine(spec) for spec in engines}
        for engine in self._engines.values():
            self._join(engine)

    # --- running -----------------------------------------------------------------------------
    def add(self, conversation: SimulatedConversation) -> None:
        """Let a conversation arrive at its time."""
        self._open += 1
        state = _Conversation(conversation)
        self._at(conversation.arrival_s, lambda: self._arrive(state))

    def lose_engine(self, engine: EngineId, at_s: float) -> None:
        """Kill an engine at that time; it does not come back."""
        self._at(at_s, lambda: self._lose(self._engines[engine]))

    def run(self) -> list[TurnResult]:
        """Run until every conversation has ended; returns all turns in order of arrival."""
        for engine in self._engines.values():
            self._at(self._report_interval_s, partial(self._report, engine))
        while self._open and self._agenda:
            at_s, _, action = heapq.heappop(self._agenda)
            self.now_s = max(self.now_s, at_s)
            action()
        return self.results

    def joules(self) -> float:
        """Energy of all engines so far, idle included; modelled."""
        return sum(e.model.stats().energy.total_j for e in self._engines.values())

    def _at(self, at_s: float, action: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._agenda, (at_s, self._serial, action))

    def _send(self, event: Event) -> None:
        decisions = self.scheduler.handle(event, now_s=self.now_s)
        if self._observer is not None:
            self._observer(self.now_s, event, decisions)
        for decision in decisions:
            self._carry_out(decision)

    # --- decisions ---------------------------------------------------------------------------
    def _carry_out(self, decision: Decision) -> None:
        if isinstance(decision, Place):
            self._start(self._turns[decision.turn], decision)
        elif isinstance(decision, CloseTurn):
            self._close(decision)
        elif isinstance(decision, Reject):
            result = self._turns[decision.turn].result
            if result is not None:
                result.reason = decision.reason
        elif isinstance(decision, Park | Release):
            engine = self._engines[decision.engine]
            engine.model.close_session(decision.conversation, now_s=self.now_s)
            if isinstance(decision, Release):
                engine.model.free_session(decision.conversation, now_s=self.now_s)
        elif isinstance(decision, WakeAt):
            self._wake_s = at_s = decision.at_s
            self._at(at_s, lambda: self._fire(at_s))
        else:
            assert isinstance(decision, Hold)  # noqa: S101 -- nothing to do until it is placed

    def _fire(self, at_s: float) -> None:
        """The time of a wish has come; a later wish has replaced it unless it is still the one."""
        if self._wake_s == at_s:
            self._wake_s = None
            self._send(TimerFired())

    def _start(self, turn: _Turn, place: Place) -> None:
        result = turn.result
        if turn.place is not None:  # a new plan: the old one's requests are abandoned
            self._abandon(turn, turn.place)
        turn.place = place
        turn.stored = 0
        if result is not None:
            result.reason, result.transfer = place.reason, place.transfer
            result.prefiller, result.decoder = place.prefiller, place.decoder
            result.placements += 1
        if place.prefiller is None:
            self._decode(turn, place)
            return
        self._submit(
            self._engines[place.prefiller],
            ModelRequest(
                rid=f"{turn.turn}/{place.plan}/p",
                prompt=turn.prompt,
                output_tokens=0,
                priority=place.priority,
                prefill_only=True,
            ),
        )

    def _decode(self, turn: _Turn, place: Place) -> None:
        conversation = turn.conversation.spec.id
        context = [*turn.prompt.runs, (f"{conversation}/out{turn.index}", 0, turn.output)]
        self._submit(
            self._engines[place.decoder],
            ModelRequest(
                rid=f"{turn.turn}/{place.plan}/d",
                prompt=turn.prompt,
                output_tokens=turn.output,
                context=StreamPrompt(context, turn.prompt.page_tokens),
                session_id=conversation,
                priority=place.priority,
                stored_tokens=turn.stored,
            ),
        )

    def _abandon(self, turn: _Turn, place: Place) -> None:
        for engine_id, role in ((place.prefiller, "p"), (place.decoder, "d")):
            engine = self._engines.get(engine_id) if engine_id is not None else None
            if engine is not None and engine.alive:
                engine.model.abort(f"{turn.turn}/{place.plan}/{role}", now_s=self.now_s)
                self._kick(engine)

    def _close(self, decision: CloseTurn) -> None:
        turn = self._turns.pop(decision.turn)
        conversation = turn.conversation
        if turn.result is not None:
            turn.result.outcome = decision.outcome
            turn.result.finished_s = self.now_s
        if decision.outcome is Outcome.FINISHED and conversation.next < len(
            conversation.spec.turns
        ):
            gap_s = conversation.spec.turns[conversation.next].gap_s
            self._at(self.now_s + gap_s, lambda: self._arrive(conversation))
            return
        self._at(self.now_s, lambda: self._end(conversation))

    def _end(self, conversation: _Conversation) -> None:
        self._open -= 1
        self._send(ConversationEnded(conversation=conversation.spec.id))

    # --- conversations -----------------------------------------------------------------------
    def _arrive(self, conversation: _Conversation) -> None:
        index = conversation.next
        conversation.next += 1
        spec = conversation.spec
        wanted = spec.turns[index]
        page = next(iter(self._engines.values())).spec.config.page_tokens
        kept = wanted.prompt_tokens - wanted.new_tokens
        had = sum(length for _, _, length in conversation.context)
        runs = _cut(conversation.context, kept)
        runs.append((f"{spec.id}/in{index}", 0, wanted.new_tokens))
        prompt = StreamPrompt(runs, page)
        turn_id = TurnId(f"{spec.id}#{index + 1}")
        turn = _Turn(conversation, index, turn_id, prompt)
        conversation.context = [*runs, (f"{spec.id}/out{index}", 0, wanted.output_tokens)]
        turn.result = TurnResult(
            conversation=spec.id,
            index=index + 1,
            arrived_s=self.now_s,
            prompt_tokens=wanted.prompt_tokens,
            new_tokens=wanted.new_tokens,
        )
        self.results.append(turn.result)
        self._turns[turn_id] = turn
        self._send(
            TurnArrived(
                turn=turn_id,
                conversation=spec.id,
                prompt_tokens=wanted.prompt_tokens,
                prompt_exact=True,
                reusable_tokens=kept if kept < had else None,
                max_output_tokens=wanted.output_tokens,
            )
        )

    # --- engines -----------------------------------------------------------------------------
    def _join(self, engine: _Engine) -> None:
        spec = engine.spec
        config, profile = spec.config, spec.profile
        stats = engine.model.stats()
        self._send(
            EngineJoined(
                engine=spec.id,
                epoch=engine.epoch,
                tier=spec.tier,
                kv_capacity_tokens=stats.capacity_tokens,
                host_capacity_tokens=stats.host_capacity_tokens,
                page_tokens=config.page_tokens,
                max_context_tokens=profile.max_context_tokens,
                speeds=profile.speeds(),
                link=profile.link(),
            )
        )

    def _lose(self, engine: _Engine) -> None:
        engine.alive = False
        self._send(EngineLost(engine=engine.spec.id, epoch=engine.epoch))

    def _report(self, engine: _Engine) -> None:
        if not engine.alive:
            return
        stats = engine.model.stats()
        now, before = stats.counters, engine.read
        engine.read = now
        steps = StepTimes(
            **{
                name: getattr(now, name) - getattr(before, name)
                for name in StepTimes.__dataclass_fields__
            }
        )
        self._send(
            EngineReported(
                engine=engine.spec.id,
                epoch=engine.epoch,
                kv_held_tokens=stats.used_tokens + stats.evictable_tokens,
                running_requests=stats.running,
                queued_requests=stats.queued,
                steps=steps,
            )
        )
        if self._open:
            self._at(self.now_s + self._report_interval_s, lambda: self._report(engine))

    def _submit(self, engine: _Engine, request: ModelRequest) -> None:
        if not engine.alive:
            raise AssertionError(f"{engine.spec.id} is lost and was given {request.rid}")
        engine.model.submit(request, now_s=self.now_s)
        self._kick(engine)

    def _kick(self, engine: _Engine) -> None:
        """Let the engine start its next step, if it is free and there is one."""
        if not engine.alive or engine.in_step:
            return
        step = engine.model.begin_step(now_s=self.now_s)
        if step is not None:
            engine.in_step = True
            self._at(step.end_s, lambda: self._end_step(engine))
            return
        wake_s = engine.model.wake_at_s()
        if wake_s is not None:
            self._at(max(wake_s, self.now_s), lambda: self._poll(engine))

    def _end_step(self, engine: _Engine) -> None:
        engine.in_step = False
        if not engine.alive:
            return
        events = engine.model.end_step(now_s=self.now_s)
        self._tell(events)
        self._kick(engine)

    def _poll(self, engine: _Engine) -> None:
        if not engine.alive or engine.in_step:
            return  # a step is under way and will bring the events
        self._tell(engine.model.poll(now_s=self.now_s))
        self._kick(engine)

    def _tell(self, events: list[ModelEvent]) -> None:
        for event in events:
            if isinstance(event, PrefillDone | PagesStored | RequestFinished):
                turn_id, plan, role = event.rid.rsplit("/", 2)
                turn = self._turns.get(TurnId(turn_id))
                if turn is None or turn.place is None or turn.place.plan != int(plan):
                    continue
                self._progress(turn, turn.place, role, event)

    def _progress(
        self,
        turn: _Turn,
        place: Place,
        role: str,
        event: PrefillDone | PagesStored | RequestFinished,
    ) -> None:
        result = turn.result
        if isinstance(event, PrefillDone):
            turn.prefilled_s = event.at_s
            if role == "d" and result is not None:
                result.first_token_s = event.at_s
            self._send(
                PrefillFinished(turn=turn.turn, plan=place.plan, prompt_tokens=event.prompt_tokens)
            )
        elif isinstance(event, PagesStored):
            if role != "p":
                return  # an engine that stores all it computes stores a hosted turn's too
            turn.stored = event.tokens
            self._send(
                HandoffFinished(
                    turn=turn.turn,
                    plan=place.plan,
                    moved_tokens=event.tokens,
                    duration_s=event.at_s - turn.prefilled_s,
                )
            )
            self._decode(turn, place)
        elif role == "d":
            if result is not None:
                result.cached_tokens = event.cached_tokens
            self._send(
                TurnFinished(
                    turn=turn.turn,
                    plan=place.plan,
                    prompt_tokens=event.prompt_tokens,
                    output_tokens=event.output_tokens,
                    cached_tokens=event.cached_tokens,
                )
            )


def _cut(runs: list[Run], tokens: int) -> list[Run]:
    """The leading ``tokens`` of the runs."""
    kept: list[Run] = []
    for stream, offset, length in runs:
        if tokens <= 0:
            break
        kept.append((stream, offset, min(length, tokens)))
        tokens -= length
    return kept
