"""The scheduler: facts in, decisions out. All changes of scheduling state happen here.

The life of a turn::

    TurnArrived ──► WAITING ──Place──► PREFILL ──► HANDOFF ──► DECODE ──► CloseTurn(finished)
                      │  ▲   (remote)     └────────────┴──────────┤
                      │  └── a new plan: engine lost, retry ◄─────┘  TurnFailed, TurnAborted
                      └──► Reject, CloseTurn(rejected)               ──► CloseTurn(failed | aborted)

What a decoder prefills by itself begins with DECODE, the copy of a conversation that moves with
HANDOFF.

The rules:

1. Every turn that arrives is closed exactly once, with one outcome. A turn that waits has an
   event that wakes it and a time at which it is refused.
2. A conversation is pinned to its home until it ends, its engine is lost or drains, its home has
   no room for it even after parking, or the policy has it moved, with its KV, at a turn boundary.
   Each move is counted with its reason.
3. Room is reserved on decoder and prefiller together, before anything runs, so that neither can
   wait for the other.
4. Idle conversations are parked before anything is held, moved or refused.
5. Tail turns go before new conversations: where one waits for room, no new conversation takes it.
   Otherwise a turn that does not fit never blocks one that does.
6. An event about an engine's former incarnation, a superseded plan or a closed turn is ignored,
   and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from conserve_serving.core import audit, ledger
from conserve_serving.core.counters import Counters
from conserve_serving.core.decisions import CloseTurn, Decision, Reject, WakeAt
from conserve_serving.core.dispatch import Dispatcher
from conserve_serving.core.events import (
    ConversationEnded,
    ConversationIdled,
    EngineDraining,
    EngineJoined,
    EngineLost,
    EngineReported,
    Event,
    HandoffFinished,
    PrefillFinished,
    TimerFired,
    TurnAborted,
    TurnArrived,
    TurnFailed,
    TurnFinished,
)
from conserve_serving.core.registry import Conversations, Turns
from conserve_serving.core.roster import Roster
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.state import ConversationState, EngineState, Phase, TurnState
from conserve_serving.core.types import (
    ConversationId,
    EngineId,
    Fallback,
    Outcome,
    Reason,
    TransferReason,
    TurnId,
)
from conserve_serving.core.views import Policy
from conserve_serving.core.waiting import Pace

# Conversations that expire in one event; the rest in the next.
_EXPIRE: Final = 64


class Scheduler:
    """Conversation-level scheduling. Synchronous, deterministic; time is an argument.

    Args:
        settings: behaviour that does not depend on the policy.
        policy: chooses among engines.
    """

    def __init__(self, settings: SchedulerSettings, policy: Policy) -> None:
        self.settings = settings
        self.policy = policy
        self.counters = Counters()
        self._do = Dispatcher(settings, policy, self.counters)
        self._placer = self._do.placer
        self._waiting = self._do.waiting
        self._roster = Roster(self._placer)
        self._conversations = Conversations(settings.idle_timeout_s)
        self._turns = Turns()
        self._wake_s: float | None = None
        self._review_s = 0.0
        self._pace = Pace()
        self._handlers: dict[type, Callable[[Any], None]] = {
            EngineJoined: self._on_engine_joined,
            EngineReported: self._on_engine_reported,
            EngineDraining: self._on_engine_draining,
            EngineLost: self._on_engine_lost,
            TurnArrived: self._on_turn_arrived,
            PrefillFinished: self._on_prefill_finished,
            HandoffFinished: self._on_handoff_finished,
            TurnFinished: self._on_turn_finished,
            TurnFailed: self._on_turn_failed,
            TurnAborted: self._on_turn_aborted,
            ConversationIdled: self._on_conversation_idled,
            ConversationEnded: self._on_conversation_ended,
            TimerFired: self._on_timer_fired,
        }

    # --- the one entrance --------------------------------------------------------------------
    def handle(self, event: Event, *, now_s: float) -> list[Decision]:
        """Take one fact in and return what is to be done about it.

        Args:
            event: any of ``core.events``.
            now_s: the driver's clock, in seconds; a step back is treated as no time passed.

        Returns:
            Decisions, in the order they are to be carried out. A new list each time.
        """
        self._do.now_s = max(self._do.now_s, now_s)
        self._do.say.out = []
        self._handlers[type(event)](event)
        if self._do.unfinished:
            self._do.wake()
        self._set_alarm()
        return self._do.say.out

    # --- what can be looked at ---------------------------------------------------------------
    @property
    def engines(self) -> Mapping[EngineId, EngineState]:
        """Engines that are alive, draining ones included. For reading."""
        return self._placer.engines

    @property
    def open_conversations(self) -> int:
        return len(self._conversations.open)

    @property
    def live_turns(self) -> int:
        return len(self._turns.open)

    @property
    def waiting_turns(self) -> int:
        return sum(1 for t in self._turns.open.values() if t.phase is Phase.WAITING)

    def conversation(self, conversation: ConversationId) -> ConversationState | None:
        """One open conversation. For reading."""
        return self._conversations.open.get(conversation)

    def check_invariants(self, *, recount: bool = False) -> None:
        """Raise ``InvariantError`` unless the books add up.

        Args:
            recount: also add up every conversation and turn (linear in their number).
        """
        for engine in self._placer.engines.values():
            audit.check(engine)
        if recount:
            audit.recount(
                self._placer.engines.values(),
                self._conversations.open.values(),
                self._turns.open.values(),
            )

    # --- engines -----------------------------------------------------------------------------
    def _on_engine_joined(self, event: EngineJoined) -> None:
        if not self._roster.is_newer(event.engine, event.epoch):
            self._ignore(event)
            return
        former = self._placer.engines.get(event.engine)
        if former is not None:
            self._lose(former)
        self._do.free(self._roster.admit(event))

    def _on_engine_reported(self, event: EngineReported) -> None:
        engine = self._roster.current(event.engine, event.epoch)
        if engine is None:
            self._ignore(event)
            return
        engine.reported_held_tokens = event.kv_held_tokens
        engine.running_requests = event.running_requests
        engine.queued_requests = event.queued_requests
        if event.steps is not None:
            self._roster.learn(engine, event.steps)
        if self._do.now_s >= self._review_s:
            self._review_s = self._do.now_s + self.settings.review_interval_s
            opened = self._placer.review()
            if opened is not None:
                self._do.free(opened)  # who waits for room may live there now, or beside it

    def _on_engine_draining(self, event: EngineDraining) -> None:
        engine = self._roster.current(event.engine, event.epoch)
        if engine is None:
            self._ignore(event)
            return
        engine.draining = True
        self._placer.retire(engine)
        self._do.free(engine)  # who waits for room there need wait no longer

    def _on_engine_lost(self, event: EngineLost) -> None:
        self._roster.heard_of(event.engine, event.epoch)
        engine = self._placer.engines.get(event.engine)
        if engine is None or event.epoch < engine.epoch:
            self._ignore(event)
        else:
            self._lose(engine)

    def _lose(self, engine: EngineState) -> None:
        self._roster.strike(engine)
        for turn in list(engine.turns.values()):
            if turn.decoder is engine:
                followers = self._do.unplan(turn, context_tokens=None)
                self._do.note_kv_lost(turn.conversation, TransferReason.ENGINE_LOST)
                self._replan(turn)
                self._dispatch_all(followers)
            elif turn.prefiller is engine:
                self.counters.fallbacks[Fallback.PREFILLER_LOST] += 1
                self._dispatch_all(self._do.change_prefiller(turn))
            else:
                self.counters.fallbacks[Fallback.SOURCE_LOST] += 1
                self._dispatch_all(self._do.lose_source(turn))
        self._do.orphan(engine)

    # --- arrivals ----------------------------------------------------------------------------
    def _on_turn_arrived(self, event: TurnArrived) -> None:
        if self._turns.is_spent(event.turn):
            self._ignore(event)
            return
        conversation = self._conversations.open.get(event.conversation)
        if conversation is None:
            conversation = ConversationState(event.conversation, self._do.now_s)
            conversation.foreseen = event.foreseen_tokens
            if event.hint is None:
                self._do.load.arrived(self._do.now_s)
            self._conversations.open[event.conversation] = conversation
            self._adopt(conversation, event)
        conversation.ended = False
        turn = TurnState(
            event.turn,
            conversation,
            prompt_tokens=max(1, event.prompt_tokens),
            reusable_tokens=event.reusable_tokens,
            max_output_tokens=event.max_output_tokens,
            predicted_output_tokens=event.predicted_output_tokens,
        )
        conversation.live += 1
        self._conversations.touch(conversation, self._do.now_s)
        self._turns.open[turn.id] = turn
        longest = self._placer.longest_context_tokens()
        home = self._do.home(conversation)
        if home is not None:  # which may take no others any more
            longest = max(longest or 0, home.longest_context_tokens)
        if longest is None:
            self._reject(turn, Reason.NO_ENGINE)
        elif turn.prompt_tokens >= longest:
            self._reject(turn, Reason.PROMPT_TOO_LONG)
        else:
            self._note_went_on(conversation)
            self._dispatch(turn)

    def _note_went_on(self, conversation: ConversationState) -> None:
        """It has another turn: told once for each number of turns behind it."""
        if conversation.turns > conversation.went_on:
            conversation.went_on = conversation.turns
            self._do.load.went_on(conversation.turns)

    def _adopt(self, conversation: ConversationState, event: TurnArrived) -> None:
        """Believe where the client says the conversation lived, if that engine still runs."""
        hint = event.hint
        if hint is None:
            return
        conversation.turns = conversation.went_on = max(0, hint.turns)
        conversation.transfers = max(0, hint.transfers)
        engine = self._roster.current(hint.engine, hint.epoch)
        if engine is None:
            conversation.moved_because = TransferReason.ENGINE_LOST
        elif self._placer.takes(engine):
            ledger.adopt(conversation, engine, max(0, hint.context_tokens))
            self._placer.touch(engine)

    def _dispatch(self, turn: TurnState) -> None:
        refusal = self._do.dispatch(turn)
        if refusal is not None:
            self._reject(turn, refusal)

    def _dispatch_all(self, turns: list[TurnState]) -> None:
        for turn in turns:
            if turn.phase is Phase.WAITING:
                self._dispatch(turn)

    # --- progress ----------------------------------------------------------------------------
    def _on_prefill_finished(self, event: PrefillFinished) -> None:
        turn = self._planned(event.turn, event.plan)
        if turn is None or (turn.phase is Phase.HANDOFF and turn.source is None):
            self._ignore(event)
            return
        where = turn.prefiller if turn.phase is Phase.PREFILL else turn.decoder
        ledger.end_backlog(where, turn)
        freed = ledger.correct_prompt(turn, max(1, event.prompt_tokens))
        if turn.phase is Phase.PREFILL:
            turn.phase = Phase.HANDOFF
            ledger.start_egress(turn)
        else:
            turn.prefilled = True
        for engine in (where, turn.decoder):
            if engine is not None:
                self._placer.touch(engine)
        if freed > 0 and turn.decoder is not None:
            self._do.free(turn.decoder)

    def _on_handoff_finished(self, event: HandoffFinished) -> None:
        turn = self._planned(event.turn, event.plan)
        if turn is None or turn.phase not in (Phase.PREFILL, Phase.HANDOFF):
            self._ignore(event)
            return
        conversation, decoder = turn.conversation, turn.decoder
        if turn.phase is Phase.PREFILL:
            ledger.end_backlog(turn.prefiller, turn)
        prefiller = ledger.end_prefill(turn)
        sender = prefiller or turn.source
        turn.phase = Phase.DECODE
        if event.fallback is not None:
            self.counters.fallbacks[event.fallback] += 1
            turn.expected_cached_tokens = turn.cached_tokens  # with what it has at its home
            if decoder is not None:
                ledger.end_backlog(decoder, turn)
                ledger.add_backlog(decoder, turn, turn.new_tokens)
                self._placer.touch(decoder)
        else:
            turn.prefilled = prefiller is not None  # after a copy, what is appended is to come
            conversation.transfers += 1
            self.counters.transfers[turn.transfer or TransferReason.FIRST_TURN] += 1
            self.counters.transferred_tokens += event.moved_tokens
            if sender is not None:
                sender.link.observe(event.moved_tokens, event.duration_s)
        self._do.copied(turn)
        if prefiller is not None:
            self._do.free(prefiller)
        self._dispatch_all(self._do.opened(turn))

    def _on_turn_finished(self, event: TurnFinished) -> None:
        turn = self._planned(event.turn, event.plan)
        if turn is None:
            self._ignore(event)
            return
        conversation = turn.conversation
        before = conversation.context_tokens
        context = event.prompt_tokens + event.output_tokens
        self._note_went_on(conversation)  # turns in parallel: none has arrived since one finished
        self._do.load.observe(
            turns=conversation.turns,
            prompt_tokens=event.prompt_tokens,
            new_tokens=turn.new_tokens,
            output=event.output_tokens,
        )
        self._do.growth.observe_output(conversation.turns, event.output_tokens)
        if conversation.turns and before:
            self._do.growth.observe_growth(conversation.turns, context - before)
        conversation.moved_because = None
        self._count_shortfall(turn, event)
        followers = self._do.unplan(turn, context_tokens=context)
        ledger.grow_older(conversation)
        self._pace.finished(self._do.now_s)
        self._close(turn, Outcome.FINISHED)
        self._dispatch_all(followers)

    def _on_turn_failed(self, event: TurnFailed) -> None:
        turn = self._planned(event.turn, event.plan)
        if turn is None:
            self._ignore(event)
            return
        kept = turn.prompt_tokens if turn.prefilled else None
        followers = self._do.unplan(turn, context_tokens=kept)
        self._do.note_kv_lost(turn.conversation, TransferReason.RETRY)
        if not event.retryable:
            self._close(turn, Outcome.FAILED)
        else:
            if turn.attempts >= 2 or turn.conversation.turns == 0:
                turn.avoid = event.engine
            self._replan(turn)
        self._dispatch_all(followers)

    def _on_turn_aborted(self, event: TurnAborted) -> None:
        turn = self._turns.open.get(event.turn)
        if turn is None:
            self._ignore(event)
            return
        followers: list[TurnState] = []
        if turn.phase is Phase.WAITING:
            self._do.leave(turn)
        else:
            kept = turn.prompt_tokens if turn.prefilled else None
            followers = self._do.unplan(turn, context_tokens=kept)
        self._close(turn, Outcome.ABORTED)
        self._dispatch_all(followers)

    def _count_shortfall(self, turn: TurnState, event: TurnFinished) -> None:
        """Context that should have been found cached and was not, beyond one page and one token."""
        decoder = turn.decoder
        if decoder is None:
            return
        expected = min(turn.expected_cached_tokens, event.prompt_tokens)
        missing = expected - decoder.page_tokens - 1 - event.cached_tokens
        if missing > 0:
            self.counters.shortfall_turns += 1
            self.counters.shortfall_tokens += missing

    def _replan(self, turn: TurnState) -> None:
        """Run a turn again whose plan came to nothing."""
        if turn.attempts >= self.settings.max_attempts:
            self._close(turn, Outcome.FAILED)
        else:
            self._dispatch(turn)

    # --- endings -----------------------------------------------------------------------------
    def _on_conversation_idled(self, event: ConversationIdled) -> None:
        conversation = self._conversations.open.get(event.conversation)
        if conversation is None or conversation.live:
            self._ignore(event)
        else:
            ledger.park_first(conversation)

    def _on_conversation_ended(self, event: ConversationEnded) -> None:
        conversation = self._conversations.open.get(event.conversation)
        if conversation is None:
            self._ignore(event)
            return
        conversation.ended = True
        if conversation.live == 0:
            self._forget(conversation, Reason.CONVERSATION_ENDED)

    def _close(self, turn: TurnState, outcome: Outcome) -> None:
        conversation = turn.conversation
        turn.phase = Phase.CLOSED
        self._turns.close(turn.id)
        self.counters.outcomes[outcome] += 1
        self._do.say.out.append(
            CloseTurn(turn=turn.id, conversation=conversation.id, outcome=outcome)
        )
        conversation.live -= 1
        self._conversations.touch(conversation, self._do.now_s)
        if conversation.live == 0 and (
            conversation.ended or (conversation.turns == 0 and conversation.home is None)
        ):
            self._forget(conversation, Reason.CONVERSATION_ENDED)

    def _forget(self, conversation: ConversationState, reason: Reason) -> None:
        if conversation.turns:
            self._do.growth.observe_end(conversation.turns)
        self._do.release(conversation, reason)
        self._conversations.open.pop(conversation.id, None)

    # --- waiting -----------------------------------------------------------------------------
    def _on_timer_fired(self, _: TimerFired) -> None:
        self._wake_s = None
        for turn in self._waiting.overdue(self._do.now_s):
            self._do.leave(turn)
            is_up = self._placer.has_hosts
            self._reject(turn, Reason.HELD_TOO_LONG if is_up else Reason.NO_ENGINE)
        self._do.recheck()
        for _once in range(_EXPIRE):
            conversation = self._conversations.expired(self._do.now_s)
            if conversation is None:
                break
            if conversation.live:
                self._conversations.touch(conversation, self._do.now_s)
            else:
                self._forget(conversation, Reason.CONVERSATION_EXPIRED)

    def _set_alarm(self) -> None:
        due_s = self._do.now_s if self._do.unfinished else self._waiting.next_alarm_s()
        expires_s = self._conversations.expires_s()
        if expires_s is not None:
            due_s = expires_s if due_s is None else min(due_s, expires_s)
        if due_s is not None and (self._wake_s is None or due_s < self._wake_s):
            self._wake_s = due_s
            self._do.say.out.append(WakeAt(at_s=due_s))

    def _reject(self, turn: TurnState, reason: Reason) -> None:
        never = reason is Reason.PROMPT_TOO_LONG
        self.counters.rejections[reason] += 1
        self._do.say.out.append(
            Reject(
                turn=turn.id,
                conversation=turn.conversation.id,
                reason=reason,
                retry_after_s=None if never else self._pace.time_for_s(1 + len(self._waiting)),
            )
        )
        self._close(turn, Outcome.REJECTED)

    # --- small things ------------------------------------------------------------------------
    def _planned(self, turn_id: TurnId, plan: int) -> TurnState | None:
        turn = self._turns.open.get(turn_id)
        if turn is None or turn.plan != plan or turn.phase is Phase.WAITING:
            return None
        return turn

    def _ignore(self, event: Event) -> None:
        self.counters.ignored_events[type(event).__name__] += 1
