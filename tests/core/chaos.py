"""A driver that does to the scheduler whatever a list of small numbers says, and keeps score."""

from __future__ import annotations

from collections import Counter

from conserve_serving.core import Scheduler, SchedulerSettings, make_policy
from conserve_serving.core.decisions import (
    CloseTurn,
    Decision,
    Hold,
    Place,
    Reject,
    Release,
    WakeAt,
)
from conserve_serving.core.events import (
    ConversationEnded,
    ConversationIdled,
    EngineDraining,
    EngineJoined,
    EngineLost,
    EngineReported,
    Event,
    HandoffFinished,
    PlacementHint,
    PrefillFinished,
    StepTimes,
    TimerFired,
    TurnAborted,
    TurnArrived,
    TurnFailed,
    TurnFinished,
)
from conserve_serving.core.state import ConversationState, EngineState, Phase, TurnState
from conserve_serving.core.types import (
    ConversationId,
    EngineId,
    EngineSpeeds,
    Fallback,
    Link,
    Outcome,
    Tier,
    TierMode,
    TransferReason,
    TurnId,
)
from conserve_serving.core.views import Tail

SPEEDS = EngineSpeeds(
    prefill_tokens_per_s=25_000.0, decode_step_s=0.014, decode_step_s_per_kv_token=1e-7
)
LINK = Link(setup_s=0.005, bytes_per_s=1e11, kv_bytes_per_token=114_688)


def joined(
    engine: str,
    tier: Tier = Tier.DECODE,
    *,
    epoch: int = 1,
    capacity: int = 100_000,
    host: int = 0,
    speeds: EngineSpeeds = SPEEDS,
    speeds_guessed: bool = False,
) -> EngineJoined:
    """An engine joins, with figures like an A40's unless told otherwise."""
    return EngineJoined(
        engine=EngineId(engine),
        epoch=epoch,
        tier=tier,
        kv_capacity_tokens=capacity,
        host_capacity_tokens=host,
        page_tokens=16,
        max_context_tokens=1_000_000,
        speeds=speeds,
        link=LINK,
        speeds_guessed=speeds_guessed,
    )


# No turn puts out more.
MAX_OUTPUT = 800


def live_turns(scheduler: Scheduler) -> list[TurnState]:
    """The scheduler's own records of the turns that have not ended."""
    return list(scheduler._turns.open.values())


class Chaos:
    """Engines, conversations and turns in any state; every operation is legal at any time."""

    def __init__(
        self,
        policy: str,
        *,
        tier_mode: TierMode = TierMode.DEDICATED,
        tight: bool = False,
        copies: bool = True,
    ) -> None:
        """With ``tight``, engines hold two or three contexts, and no room is kept for growth."""
        settings = SchedulerSettings(
            tier_mode=tier_mode,
            max_hold_s=20.0,
            idle_timeout_s=300.0,
            no_engine_hold_s=5.0,
            protect_idle_s=6.0,
            max_waiting_turns=6,
            headroom=0.0 if tight else 1.0,
            copies=copies,
            review_interval_s=0.5,
        )
        self.tight = tight
        self.scheduler = Scheduler(settings, make_policy(policy, settings))
        self.sticky = self.scheduler.policy.tail is not Tail.ANYWHERE
        self.now_s = 0.0
        self.log: list[tuple[float, Event, list[Decision]]] = []
        self.epochs: dict[str, int] = {}
        self.alive: set[str] = set()
        self.draining: set[str] = set()
        self.plans: dict[TurnId, Place] = {}
        self.stale: list[Event] = []
        self.arrived: dict[TurnId, ConversationId] = {}
        self.prompts: dict[TurnId, int] = {}
        self.outcomes: dict[TurnId, Outcome] = {}
        self.handed_over: set[TurnId] = set()
        self.prefilled: set[TurnId] = set()
        self.copied: set[TurnId] = set()
        self.kv: set[tuple[EngineState, ConversationId]] = set()  # what engines have, for certain
        self.first_transfers: Counter[ConversationState] = Counter()
        self.wake_s: float | None = None
        self.holding: dict[TurnId, Hold] = {}

    # --- driving -----------------------------------------------------------------------------
    def send(self, event: Event) -> list[Decision]:
        counted = self.scheduler.counters.transfers
        place = self.plans.get(event.turn) if isinstance(event, HandoffFinished) else None
        state = self.scheduler.conversation(place.conversation) if place is not None else None
        before = counted[TransferReason.FIRST_TURN]
        self.note_kv(event)
        decisions = self.scheduler.handle(event, now_s=self.now_s)
        if state is not None and counted[TransferReason.FIRST_TURN] > before:
            self.first_transfers[state] += 1
            assert self.first_transfers[state] == 1, "a second transfer has its own reason"
        self.log.append((self.now_s, event, decisions))
        for decision in decisions:
            self.follow(decision)
        self.scheduler.check_invariants(recount=True)
        self.check_waiting()
        self.check_kv()
        return decisions

    def note_kv(self, event: Event) -> None:
        """An engine has KV of a turn's conversation now, if the event is about a current plan."""
        if not isinstance(event, PrefillFinished | HandoffFinished | TurnFinished):
            return
        place = self.plans.get(event.turn)
        if place is None or place.plan != event.plan:
            return
        if isinstance(event, HandoffFinished):
            failed = event.fallback is not None or place.transfer is None
            if failed or event.turn in self.copied:
                self.copied.add(event.turn)
                return
            self.copied.add(event.turn)
        elif isinstance(event, PrefillFinished) and place.prefiller is not None:
            return
        self.kv.add((self.scheduler.engines[place.decoder], place.conversation))

    def check_kv(self) -> None:
        """KV that is on an engine is in the books, until its release has been decided."""
        used = {
            (engine, turn.conversation.id)
            for turn in live_turns(self.scheduler)
            for engine in (turn.decoder, turn.source)
        }
        self.kv = {(engine, id) for engine, id in self.kv if not engine.lost}
        for engine, id in self.kv - used:
            conversation = self.scheduler.conversation(id)
            assert conversation is not None, f"KV of {id}, which is over, is left on {engine.id}"
            assert conversation.home is engine, f"KV of {id} on {engine.id} is in no book"

    def check_waiting(self) -> None:
        """Whoever waits will be woken, waits for somebody, and waits for no room that is there."""
        turns = {turn.id: turn for turn in live_turns(self.scheduler)}
        waiting = {turn_id for turn_id, turn in turns.items() if turn.phase is Phase.WAITING}
        assert waiting == self.holding.keys()
        if waiting:
            assert self.wake_s is not None
            assert self.wake_s <= min(hold.until_s for hold in self.holding.values())
        engines = self.scheduler.engines
        for engine in engines.values():
            for turn in engine.waiting.values():
                assert turn.id in waiting
                assert turn.waits_at is engine
        for turn_id in waiting:
            turn = turns[turn_id]
            conversation = turn.conversation
            if conversation.opening is not None:
                assert conversation.opening.phase in (Phase.PREFILL, Phase.HANDOFF)
                continue
            assert turn_id in self.scheduler._waiting, "it waits for nobody"
            if self.wake_s is not None and self.wake_s <= self.now_s:
                continue  # more will be tried at once
            if not self.sticky:
                continue
            home = conversation.home
            if home is None or home.lost:
                self.check_no_room_anywhere(turn)
                continue
            assert turn.waits_at is home
            if turn.prompt_tokens < home.longest_context_tokens:
                most = home.pages(turn.prompt_tokens + MAX_OUTPUT)
                need = max(most - conversation.resident, conversation.parked)
                assert home.free_tokens < need, "there is room and it waits"

    def check_no_room_anywhere(self, turn: TurnState) -> None:
        if not self.tight or turn.avoid is not None:
            return
        offered = [e for e in self.scheduler.engines.values() if not e.draining]
        for engine in offered:
            prefillers = [e for e in offered if e.tier is Tier.PREFILL and e is not engine]
            assert not (
                self.scheduler._placer.takes(engine)
                and turn.prompt_tokens < engine.longest_context_tokens
                and engine.free_tokens >= engine.pages(turn.prompt_tokens + MAX_OUTPUT)
                and (turn.conversation.turns or not engine.waiting)
                and all(e.free_tokens >= e.pages(turn.prompt_tokens) for e in prefillers)
            ), "there is room somewhere and it waits"

    def follow(self, decision: Decision) -> None:
        if isinstance(decision, Place):
            assert decision.turn in self.arrived
            assert decision.turn not in self.outcomes
            assert decision.decoder in self.alive
            assert decision.prefiller is None or decision.prefiller in self.alive
            crosses = decision.prefiller is not None or decision.source is not None
            assert crosses == (decision.transfer is not None)
            assert decision.source is None or decision.source in self.alive
            assert decision.prefiller != decision.decoder
            assert decision.decoder not in self.draining or self.lives_at(decision)
            assert decision.prefiller not in self.draining
            state = self.scheduler.conversation(decision.conversation)
            assert decision.priority == (1 if state is not None and state.turns else 0)
            room = self.scheduler.engines[decision.decoder].longest_context_tokens
            assert self.prompts[decision.turn] < room
            self.plans[decision.turn] = decision
            for done in (self.handed_over, self.prefilled, self.copied):
                done.discard(decision.turn)
            self.holding.pop(decision.turn, None)
        elif isinstance(decision, CloseTurn):
            assert decision.turn not in self.outcomes, "a turn ended twice"
            self.outcomes[decision.turn] = decision.outcome
            self.plans.pop(decision.turn, None)
            self.holding.pop(decision.turn, None)
        elif isinstance(decision, Hold):
            assert decision.until_s >= self.now_s
            self.plans.pop(decision.turn, None)
            assert decision.waits_for
            self.holding[decision.turn] = decision
        elif isinstance(decision, Release):
            self.kv.discard((self.scheduler.engines[decision.engine], decision.conversation))
        elif isinstance(decision, Reject):
            assert decision.retry_after_s is None or decision.retry_after_s > 0
        elif isinstance(decision, WakeAt):
            self.wake_s = decision.at_s

    def step(self, kind: int, a: int, b: int) -> None:
        """Do operation ``kind`` with two numbers to choose its objects by."""
        engine = f"{'pd'[a % 4 > 0]}{a % 4}"
        if kind == 0:
            self.join(engine, b)
        elif kind == 1 and engine in self.alive:
            self.lose(engine)
        elif kind == 2 and engine in self.alive:
            self.draining.add(engine)
            self.send(EngineDraining(engine=EngineId(engine), epoch=self.epochs[engine]))
        elif kind == 3 and engine in self.alive:
            self.report(engine, b)
        elif kind == 4:
            over = ConversationIdled if b % 3 == 0 else ConversationEnded
            self.send(over(conversation=ConversationId(f"c{a % 8}")))
        elif kind == 5:
            self.now_s += b / 10
            self.fire_timer()
        elif kind == 6 and self.arrived:
            self.abort(sorted(self.arrived)[a % len(self.arrived)])
        elif kind == 7 and self.log:
            event = self.log[-1 - a % min(len(self.log), 40)][1]  # again, late or twice
            if not isinstance(event, EngineJoined | EngineLost | EngineDraining):
                self.send(event)
            elif event.epoch == self.epochs[event.engine] and event.engine in self.alive:
                self.follow_engine(event)
            else:
                assert not [d for d in self.send(event) if isinstance(d, Place)], "stale, and heard"
        elif kind <= 11:
            self.arrive(a, b)
        elif self.plans:
            self.progress(self.plans[sorted(self.plans)[a % len(self.plans)]], b)

    def join(self, engine: str, b: int) -> None:
        self.epochs[engine] = self.epochs.get(engine, 0) + 1
        self.alive.add(engine)
        self.draining.discard(engine)
        self.send(
            joined(
                engine,
                Tier.PREFILL if engine[0] == "p" else Tier.DECODE,
                epoch=self.epochs[engine],
                capacity=1_000 + 80 * b if self.tight else 2_000 + 400 * b,
                host=(b % 3) * (600 if self.tight else 2_000),
            )
        )

    def follow_engine(self, event: EngineJoined | EngineLost | EngineDraining) -> None:
        """An engine event told again while it is still news of the present incarnation."""
        if isinstance(event, EngineLost):
            self.alive.discard(event.engine)
        elif isinstance(event, EngineDraining):
            self.draining.add(event.engine)
        self.send(event)

    def lives_at(self, place: Place) -> bool:
        state = self.scheduler.conversation(place.conversation)
        return state is not None and state.home is not None and state.home.id == place.decoder

    def lose(self, engine: str) -> None:
        self.alive.discard(engine)
        self.send(EngineLost(engine=EngineId(engine), epoch=self.epochs[engine]))

    def report(self, engine: str, b: int) -> None:
        steps = StepTimes(
            prefill_tokens=100 * b,
            prefill_s=0.01 * b,
            decode_steps=b,
            decode_s=0.02 * b,
            decode_kv_tokens=500 * b * b,
            mixed_steps=b // 2,
            mixed_s=0.03 * (b // 2),
            mixed_kv_tokens=400 * b,
            mixed_prefill_tokens=64 * b,
        )
        self.send(
            EngineReported(
                engine=EngineId(engine),
                epoch=self.epochs[engine],
                kv_held_tokens=b * 100,
                steps=steps,
            )
        )

    def arrive(self, a: int, b: int) -> None:
        turn = TurnId(f"t{len(self.arrived):04d}")
        conversation = ConversationId(f"c{a % 8}")
        self.arrived[turn] = conversation
        self.prompts[turn] = max(1, 40 * b + a)
        hint = None
        if b % 7 == 0:
            hint = PlacementHint(
                engine=EngineId("d1"), epoch=b % 3, context_tokens=50 * b, turns=b % 4, transfers=1
            )
        self.send(
            TurnArrived(
                turn=turn,
                conversation=conversation,
                prompt_tokens=40 * b + a,
                reusable_tokens=(None, 0, 10 * b)[b % 3],
                max_output_tokens=(None, 5 * b)[a % 2],
                hint=hint,
            )
        )

    def progress(self, place: Place, b: int) -> None:
        """The next thing that can happen to a placed turn, or any later one (events get lost)."""
        turn, plan = place.turn, place.plan
        if b % 10 == 0:
            at = place.decoder
            self.send(TurnFailed(turn=turn, plan=plan, engine=at, retryable=b % 20 == 0))
        elif place.transfer is not None and turn not in self.handed_over and b % 10 != 1:
            if b % 2:
                # Estimates are not so far off that it fits its decoder no more.
                room = self.scheduler.engines[place.decoder].longest_context_tokens
                self.prompts[turn] = max(1, min(38 * b, room - 1))
                self.send(PrefillFinished(turn=turn, plan=plan, prompt_tokens=self.prompts[turn]))
                if b % 4 == 3 and turn not in self.prefilled:
                    self.prefilled.add(turn)
                    return  # its KV is on the link; anything may happen before it arrives
            fallback = Fallback.ACK_LATE if b % 5 == 0 else None
            self.handed_over.add(turn)
            self.send(
                HandoffFinished(
                    turn=turn, plan=plan, moved_tokens=10 * b, duration_s=0.01, fallback=fallback
                )
            )
        else:
            self.send(
                TurnFinished(
                    turn=turn,
                    plan=plan,
                    prompt_tokens=30 * b + 1,
                    output_tokens=min(MAX_OUTPUT, 20 * b),
                    cached_tokens=b,
                )
            )

    def abort(self, turn: TurnId) -> None:
        self.send(TurnAborted(turn=turn))

    def fire_timer(self) -> None:
        if self.wake_s is not None and self.wake_s <= self.now_s:
            self.wake_s = None
            self.send(TimerFired())

    # --- the end -----------------------------------------------------------------------------
    def settle(self) -> None:
        """Let everything that runs finish, time out what waits, end every conversation."""
        for _ in range(10_000):
            if self.plans:
                place = self.plans[min(self.plans)]
                self.progress(place, 2 if place.turn not in self.handed_over else 3)
            elif len(self.outcomes) < len(self.arrived):
                assert self.wake_s is not None, "a turn waits and nothing will wake it"
                self.now_s = max(self.now_s, self.wake_s)
                self.fire_timer()
            else:
                break
        for conversation in sorted(set(self.arrived.values())):
            self.send(ConversationEnded(conversation=conversation))
