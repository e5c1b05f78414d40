"""The virtual cluster: one scheduler, its engines as models, and a queue of things to come.

Follows the same protocol as the gateway: see ``carrier.py`` for what becomes of a plan. A
conversation's KV is protected by a session on its decoder until it is parked or released.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

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
    EngineLost,
    Event,
    TimerFired,
    TurnArrived,
)
from conserve_serving.core.scheduler import Scheduler
from conserve_serving.core.types import EngineId, Outcome, TurnId
from conserve_serving.engines.model import EngineModel
from conserve_serving.simulator.agenda import Agenda
from conserve_serving.simulator.carrier import Carrier
from conserve_serving.simulator.conservation import check_conservation
from conserve_serving.simulator.conversation import SimulatedConversation, TurnResult
from conserve_serving.simulator.engines import Engine, SimulatedEngine
from conserve_serving.simulator.errors import DeadlockError, SimulationError
from conserve_serving.simulator.summary import RunSummary
from conserve_serving.simulator.turns import Conversation, Turn

__all__ = ["SimulatedEngine", "VirtualCluster"]

#: Timers at one and the same time: each event leaves some work over for the next at most.
_MOST_TIMERS: Final = 100_000

#: Replaced alarms are forgotten so many at a time: a far one would stay until the end.
_MOST_WISHES: Final = 1_000

Observer = Callable[[float, Event, list[Decision]], None]


class VirtualCluster:
    """Runs conversations through a scheduler and simulated engines, in virtual time.

    Args:
        scheduler: the very class the gateway hosts; it must be fresh.
        engines: the cluster; all with pages of one size.
        report_interval_s: how often engines report, as the gateway polls them.
        observer: told of each event and what was decided.
        on_turn: given each turn when it is over. With it nothing is kept, so that memory is
            bounded by the conversations that are open; without, ``results`` has all turns in
            order of arrival.
        on_progress: told now and then how many turns are over.
        retry_refused: send a refused turn again when the refusal says it may succeed, as clients
            do; otherwise a refused turn ends its conversation.
        stall_s: a run in which turns are under way and none of them ends for so much virtual time
            is a deadlock.
        single_steps: never let decode steps run together: the same results, much slower.
        output_limits: a turn arrives with what it will generate as the request's own limit, as a
            replay through a gateway sends it; False: it has no limit, and nobody is told.
        model: what stands in for an engine.

    Raises:
        SimulationError: the engines cannot work together.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        engines: Iterable[SimulatedEngine],
        *,
        report_interval_s: float = 1.0,
        observer: Observer | None = None,
        on_turn: Callable[[TurnResult], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
        retry_refused: bool = False,
        stall_s: float = 14_400.0,
        single_steps: bool = False,
        output_limits: bool = True,
        model: type[EngineModel] = EngineModel,
    ) -> None:
        self.scheduler = scheduler
        self.results: list[TurnResult] = []
        self._observer = observer
        self._on_turn = on_turn
        self._on_progress = on_progress
        self._retry_refused = retry_refused
        self._output_limits = output_limits
        self._report_interval_s = report_interval_s
        self._stall_s = stall_s
        self._agenda = Agenda()
        self._wake_s: float | None = None
        self._wishes = 0  # alarms set since those that nobody waits for were last forgotten
        self._fired_s = -1.0  # when a timer last went off, and how many have at that time
        self._timers = 0
        self._turns: dict[TurnId, Turn] = {}
        self._dirty: list[Engine] = []
        self._feeding = 0  # streams that have more to bring
        self._open = 0
        self._moved_s = 0.0  # when a turn was last over, or the first of those under way arrived
        self._conversations = self._ended = 0
        self._arrived = self._closed = self._finished = self._refusals = 0
        self._output_tokens = 0
        self._engines: dict[EngineId, Engine] = {}
        specs = list(engines)
        sizes = {spec.config.page_tokens for spec in specs}
        if len(sizes) != 1:
            raise SimulationError(f"engines have pages of {sorted(sizes)} tokens: use one size")
        self._page_tokens = sizes.pop()
        self._carrier = Carrier(self._agenda, self._engines, self._send, self._page_tokens)
        for spec in specs:
            if spec.id in self._engines:
                raise SimulationError(f"two engines are called {spec.id}: ids must differ")
            self._engines[spec.id] = Engine(
                spec,
                self._agenda,
                self._carrier.tell,
                self._dirty,
                single_steps=single_steps,
                model=model,
            )
        for engine in self._engines.values():
            self._send(engine.joined())

    # --- running -----------------------------------------------------------------------------
    @property
    def now_s(self) -> float:
        """Virtual time."""
        return self._agenda.now_s

    def add(self, conversation: SimulatedConversation) -> None:
        """Let a conversation arrive at its time."""
        self._open += 1
        self._agenda.at(conversation.arrival_s, self._begin, conversation)

    def feed(self, conversations: Iterable[SimulatedConversation]) -> None:
        """Let conversations arrive at their times, taking each when the one before has arrived.

        Args:
            conversations: in order of arrival; an earlier arrival than the one before is refused
                with a SimulationError when it is reached.
        """
        self._feeding += 1
        self._take_next(iter(conversations))

    def lose_engine(self, engine: EngineId, at_s: float) -> None:
        """Kill an engine at that time; it does not come back."""
        self._agenda.at(at_s, self._lose, self._engines[engine])

    def run(self) -> RunSummary:
        """Run until every conversation has ended.

        Raises:
            DeadlockError: conversations are open and nothing happens any more.
            ConservationError: the run's books do not add up.
            SimulationError: a conversation cannot be run as it is; the message says why.
        """
        for engine in self._engines.values():
            self._agenda.at(self.now_s + self._report_interval_s, self._report, engine)
        agenda, dirty = self._agenda, self._dirty
        while self._open or self._feeding:
            if not agenda.heap:
                raise DeadlockError(self._describe("nothing is left to happen"))
            agenda.next()
            if dirty and not (agenda.heap and agenda.heap[0][0] <= agenda.now_s):
                for engine in dirty:
                    engine.look()
                dirty.clear()
        while any(engine.alive and engine.model.step for engine in self._engines.values()):
            agenda.next()  # steps of requests that were abandoned
            dirty.clear()
        summary = self._summary()
        powers = {e.id: e.spec.profile.power for e in self._engines.values()}
        check_conservation(summary, powers)
        return summary

    def joules(self) -> float:
        """Energy of all engines so far, idle included; modelled."""
        return sum(e.model.stats().energy.total_j for e in self._engines.values())

    def _summary(self) -> RunSummary:
        books = self.scheduler
        return RunSummary(
            conversations=self._conversations,
            ended_conversations=self._ended,
            arrived_turns=self._arrived,
            turns=self._closed,
            finished_turns=self._finished,
            output_tokens=self._output_tokens,
            refusals=self._refusals,
            virtual_s=self.now_s,
            engines={engine.id: engine.use() for engine in self._engines.values()},
            booked_tokens=sum(e.held_tokens + e.parked_tokens for e in books.engines.values()),
            booked_turns=books.live_turns,
            booked_conversations=books.open_conversations,
        )

    def _describe(self, why: str) -> str:
        books = self.scheduler
        turns = [
            f"  {turn.id}: {turn.place or 'waits'}; requests {turn.rids or 'none'}"
            for turn in list(self._turns.values())[:10]
        ]
        lines = [
            f"at {self.now_s:.3f} s {why}, and {self._open} conversations are open",
            f"scheduler: {books.live_turns} turns, {books.waiting_turns} of them waiting, "
            f"{books.open_conversations} conversations; holds {dict(books.counters.holds)}",
            *turns,
            *(engine.describe() for engine in self._engines.values()),
            *(
                f"books of {e.id}: {e.resident_tokens} resident + {e.reserved_tokens} reserved of "
                f"{e.capacity_tokens}, {e.parked_tokens} parked, {len(e.waiting)} wait for it"
                for e in books.engines.values()
            ),
        ]
        return "\n".join(lines)

    def _send(self, event: Event) -> None:
        decisions = self.scheduler.handle(event, now_s=self._agenda.now_s)
        if self._observer is not None:
            self._observer(self._agenda.now_s, event, decisions)
        for decision in decisions:
            self._carry_out(decision)

    # --- decisions ---------------------------------------------------------------------------
    def _carry_out(self, decision: Decision) -> None:
        if isinstance(decision, Place):
            self._carrier.start(self._turns[decision.turn], decision)
        elif isinstance(decision, CloseTurn):
            self._close(decision)
        elif isinstance(decision, WakeAt):
            self._wake_s = decision.at_s
            self._agenda.at(decision.at_s, self._fire, decision.at_s)
            self._wishes += 1
            if self._wishes > max(_MOST_WISHES, len(self._agenda.heap) // 2):
                self._agenda.forget(self._fire, but=decision.at_s)
                self._wishes = 0
        elif isinstance(decision, Park | Release):
            engine = self._engines[decision.engine]
            engine.close_session(decision.conversation, free=isinstance(decision, Release))
        elif isinstance(decision, Reject):
            turn = self._turns[decision.turn]
            turn.result.reason = decision.reason
            turn.retry_after_s = decision.retry_after_s
        else:
            assert isinstance(decision, Hold)  # noqa: S101 -- nothing to do until it is placed

    def _fire(self, at_s: float) -> None:
        """The time of a wish has come; a later wish has replaced it unless it is still the one."""
        if self._wake_s == at_s:
            self._wake_s = None
            self._timers = self._timers + 1 if at_s <= self._fired_s else 0
            self._fired_s = self._agenda.now_s
            if self._timers > _MOST_TIMERS:
                raise DeadlockError(
                    self._describe("the scheduler asks for a timer again and again")
                )
            self._send(TimerFired())

    def _close(self, decision: CloseTurn) -> None:
        turn = self._turns.pop(decision.turn)
        if turn.rids:
            self._carrier.abandon(turn)
        outcome, conversation = decision.outcome, turn.conversation
        if outcome is Outcome.REJECTED and turn.retry_after_s is not None and self._retry_refused:
            self._refusals += 1
            self._agenda.at(self._agenda.now_s + turn.retry_after_s, self._send_again, turn)
            return
        turn.over = True
        result = turn.result
        result.outcome = outcome
        result.finished_s = self._agenda.now_s
        self._closed += 1
        self._moved_s = self._agenda.now_s
        if outcome is Outcome.FINISHED:
            self._finished += 1
            self._output_tokens += turn.wanted.output_tokens
        if self._on_turn is not None:
            self._on_turn(result)
        if self._on_progress is not None and not self._closed % 1000:
            self._on_progress(self._closed)
        if outcome is Outcome.FINISHED and not conversation.over:
            gap_s = conversation.spec.turns[conversation.next].gap_s
            self._agenda.at(self._agenda.now_s + gap_s, self._arrive, conversation)
        else:
            self._agenda.at(self._agenda.now_s, self._end, conversation)

    # --- conversations -----------------------------------------------------------------------
    def _take_next(self, conversations: Iterator[SimulatedConversation]) -> None:
        conversation = next(conversations, None)
        if conversation is None:
            self._feeding -= 1
            return
        if conversation.arrival_s < self.now_s:
            raise SimulationError(
                f"conversation {conversation.id} arrives at {conversation.arrival_s} s, after one "
                f"that arrives at {self.now_s} s: feed them in order of arrival"
            )
        self._agenda.at(conversation.arrival_s, self._begin_fed, (conversation, conversations))

    def _begin_fed(
        self, fed: tuple[SimulatedConversation, Iterator[SimulatedConversation]]
    ) -> None:
        conversation, rest = fed
        self._open += 1
        self._begin(conversation)
        self._take_next(rest)

    def _begin(self, spec: SimulatedConversation) -> None:
        self._conversations += 1
        self._arrive(Conversation(spec))

    def _end(self, conversation: Conversation) -> None:
        self._open -= 1
        self._ended += 1
        self._send(ConversationEnded(conversation=conversation.spec.id))

    def _arrive(self, conversation: Conversation) -> None:
        turn = Turn(conversation, self._page_tokens, self._agenda.now_s)
        self._arrived += 1
        if self._on_turn is None:
            self.results.append(turn.result)
        self._tell_of_arrival(turn)

    def _send_again(self, turn: Turn) -> None:
        turn.sent_again()
        self._tell_of_arrival(turn)

    def _tell_of_arrival(self, turn: Turn) -> None:
        if turn.id in self._turns:
            raise SimulationError(f"two conversations are called {turn.conversation.spec.id}")
        if not self._turns:
            self._moved_s = max(self._moved_s, self._agenda.now_s)
        self._turns[turn.id] = turn
        spec, wanted = turn.conversation.spec, turn.wanted
        self._send(
            TurnArrived(
                turn=turn.id,
                conversation=spec.id,
                prompt_tokens=wanted.prompt_tokens,
                prompt_exact=True,
                reusable_tokens=turn.kept if turn.rewritten else None,
                max_output_tokens=wanted.output_tokens if self._output_limits else None,
                parent=spec.parent,
                predicted_output_tokens=wanted.predicted_output_tokens,
                foreseen_tokens=spec.foreseen_tokens or 0,
            )
        )

    # --- engines -----------------------------------------------------------------------------
    def _lose(self, engine: Engine) -> None:
        engine.lose()
        self._send(EngineLost(engine=engine.id, epoch=engine.epoch))

    def _report(self, engine: Engine) -> None:
        if not engine.alive:
            return
        self._send(engine.report())
        if not self._open and not self._feeding:
            return
        now_s = self._agenda.now_s
        self._agenda.at(now_s + self._report_interval_s, self._report, engine)
        if self._turns and now_s - self._moved_s > self._stall_s:
            raise DeadlockError(self._describe(f"no turn has ended for {self._stall_s} s"))
