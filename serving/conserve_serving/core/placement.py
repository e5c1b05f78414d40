"""Finding room: the engines in the order the policy ranks them, and what fits where."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain, islice
from typing import Final

from conserve_serving.core.growth import GrowthModel
from conserve_serving.core.load import ObservedLoad
from conserve_serving.core.ranking import Ranking
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.state import EngineState, TurnState
from conserve_serving.core.types import EngineId, Tier
from conserve_serving.core.views import Policy

# Engines looked at for one decision, best rank first: bounds its cost on a full cluster.
_SCAN_FIRST: Final = 4
_SCAN_DECODERS: Final = 64
_SCAN_ROOMIEST: Final = 16
_SCAN_PREFILLERS: Final = 16
# Of those with room, in the order for a typical prompt, how many are compared for this one.
_COMPARE_PREFILLERS: Final = 4
# Prefillers are kept in the order in which they would be done with a prompt of this length.
_TYPICAL_PROMPT_TOKENS: Final = 8192


class Placer:
    """The engines, ranked, and the arithmetic of room. Changes nothing but its rankings."""

    def __init__(
        self,
        settings: SchedulerSettings,
        policy: Policy,
        growth: GrowthModel,
        load: ObservedLoad,
    ) -> None:
        self.engines: dict[EngineId, EngineState] = {}
        self._settings = settings
        self._policy = policy
        self._growth = growth
        self._load = load
        self._hosts: Ranking[EngineState] = Ranking()
        # By room within reach. Only a cluster short of room asks for it: brought up to date then.
        self._by_room: Ranking[EngineState] = Ranking()
        self._stale: dict[EngineId, EngineState] = {}
        self._prefillers: Ranking[EngineState] = Ranking()
        self._longest: int | None = None
        self.hosting = False  # the prefill tier, by the policy's last review

    # --- membership --------------------------------------------------------------------------
    def add(self, engine: EngineState) -> None:
        self.engines[engine.id] = engine
        self._measure_longest()
        others = (e.placed_turns for e in self.engines.values() if e is not engine)
        engine.placed_turns = min(others, default=0)  # it takes its place, it catches up on nothing
        if self.takes(engine):
            self._rank_host(engine)
        if engine.tier is Tier.PREFILL:
            self._rank_prefiller(engine)

    def remove(self, engine: EngineState) -> None:
        del self.engines[engine.id]
        self._measure_longest()
        self.retire(engine)

    def retire(self, engine: EngineState) -> None:
        """Offer the engine nothing new."""
        self._stop_hosting(engine)
        self._prefillers.drop(engine.id)

    def touch(self, engine: EngineState) -> None:
        """The engine's books changed: rank it anew, if it is offered anything at all."""
        if engine.lost:
            return
        if engine.id in self._hosts:
            self._rank_host(engine)
        if engine.id in self._prefillers:
            self._rank_prefiller(engine)

    def takes(self, engine: EngineState) -> bool:
        """Whether the engine may hold conversations."""
        return (self.hosting and engine.tier is Tier.PREFILL) or self._policy.hosts(engine)

    def review(self) -> EngineState | None:
        """Let the policy say whether the prefill tier takes conversations from now on.

        Those that live there when it no longer does stay until they end.

        Returns:
            Of the engines that take conversations now and did not before, the one with most room.
        """
        engines = [engine for engine in self.engines.values() if not engine.draining]
        hosting = self._policy.prefill_tier_hosts(engines, self._load, hosting=self.hosting)
        if hosting == self.hosting:
            return None
        self.hosting = hosting
        opened: list[EngineState] = []
        for engine in engines:
            if engine.tier is not Tier.PREFILL:
                continue
            if not self.takes(engine):
                self._stop_hosting(engine)
            elif not engine.hosts:
                self._rank_host(engine)
                opened.append(engine)
        self._measure_longest()
        return max(opened, key=EngineState.reachable_tokens, default=None)

    def _stop_hosting(self, engine: EngineState) -> None:
        engine.hosts = False
        self._hosts.drop(engine.id)
        self._by_room.drop(engine.id)
        self._stale.pop(engine.id, None)

    def _rank_host(self, engine: EngineState) -> None:
        engine.hosts = True
        self._hosts.put(engine.id, engine, self._policy.rank(engine, self._load))
        self._stale[engine.id] = engine

    def _rank_prefiller(self, engine: EngineState) -> None:
        done_s = engine.prefill_backlog_s + engine.prefill_s(_TYPICAL_PROMPT_TOKENS)
        self._prefillers.put(engine.id, engine, done_s)

    @property
    def has_hosts(self) -> bool:
        return len(self._hosts) > 0

    def best_host(self) -> EngineState | None:
        """The engine ranked best of those that take conversations."""
        return next(iter(self._hosts), None)

    def longest_context_tokens(self) -> int | None:
        """Longest context any engine that hosts could hold; None when there is no such engine."""
        return self._longest

    def _measure_longest(self) -> None:
        hosting = [e for e in self.engines.values() if self.takes(e)]
        self._longest = max((e.longest_context_tokens for e in hosting), default=None)

    def _roomiest(self) -> Ranking[EngineState]:
        for engine in self._stale.values():
            self._by_room.put(engine.id, engine, -engine.reachable_tokens())
        self._stale.clear()
        return self._by_room

    def room_tokens(self) -> int:
        """The most that could be free on any one engine that takes conversations."""
        return max((e.reachable_tokens() for e in islice(self._roomiest(), 1)), default=0)

    def offered_tokens(self, engine: EngineState) -> float:
        """The most that a new conversation could get now that there is room on the engine.

        Elsewhere nothing has changed, except where the engine is one that others' prompts wait for.
        """
        if not engine.hosts or (self._policy.hands_over and engine.id in self._prefillers):
            return self.room_tokens()
        return engine.reachable_tokens() - self._headroom_tokens(engine)

    def waiting_place(self, turn: TurnState) -> EngineState | None:
        """Where a turn whose conversation has no home waits, so that room gathers there: an engine
        with much room already, and few that wait for it."""
        able = (
            e
            for e in islice(self._roomiest(), _SCAN_ROOMIEST)
            if turn.prompt_tokens < e.longest_context_tokens
        )
        return min(able, key=lambda engine: len(engine.waiting), default=None)

    # --- room --------------------------------------------------------------------------------
    def target_tokens(self, turn: TurnState) -> float:
        """Its prompt, and the output to be expected from what turns of its age put out."""
        output: float | None = turn.predicted_output_tokens
        if output is None:
            output = self._growth.output_tokens(turn.conversation.turns)
        if turn.max_output_tokens is not None:
            output = min(output, turn.max_output_tokens)
        return turn.prompt_tokens + output

    def need(self, turn: TurnState, engine: EngineState) -> int:
        """Tokens to be free on the engine for the turn, less what its conversation has there."""
        conversation = turn.conversation
        target = engine.pages(min(self.target_tokens(turn), engine.capacity_tokens))
        if conversation.home is not engine:
            return target
        return max(target - conversation.resident, conversation.parked, 0)

    def wanted_tokens(self, turn: TurnState, engine: EngineState) -> float:
        """What must be within reach on the engine for `find_decoder` to take it, or for the turn
        to run at its home."""
        need = self.need(turn, engine)
        if turn.conversation.home is engine or turn.conversation.turns:
            return need
        return need + self._headroom_tokens(engine)

    def longest_idle(self, turn: TurnState) -> EngineState | None:
        """Of the engines ranked best, the one whose longest-idle conversation is the most idle."""
        able = (
            e
            for e in islice(self._hosts, _SCAN_ROOMIEST)
            if e.idle and not e.waiting and turn.prompt_tokens < e.longest_context_tokens
        )
        return min(able, key=lambda e: next(iter(e.idle.values())).last_active_s, default=None)

    def find_decoder(
        self, turn: TurnState, *, exclude: Collection[EngineState], new: bool
    ) -> tuple[EngineState, int] | None:
        """First engine in rank order with room, rather without parking than with it.

        Args:
            turn: the turn to be placed.
            exclude: engines that are no answer (the home that is being left).
            new: leave room for the growth of the conversations that live there too, and where a
                tail turn waits for room, leave all of it.

        Returns:
            The engine and the tokens to be free on it, or None.
        """
        best = self._first_with_room(turn, islice(self._hosts, _SCAN_FIRST), exclude, new=new)
        if best is not None and best[0].free_tokens >= best[1] and best[0].id != turn.avoid:
            return best
        if len(self._hosts) <= _SCAN_FIRST:
            return best  # there are no others
        home = turn.conversation.home
        if (home is None or home in exclude) and self.room_tokens() < turn.prompt_tokens:
            return None
        # The best by rank, and those with the most room in case none of the best has enough.
        engines = chain(
            islice(self._hosts, _SCAN_DECODERS), islice(self._roomiest(), _SCAN_ROOMIEST)
        )
        return self._first_with_room(turn, engines, exclude, new=new)

    def _first_with_room(
        self,
        turn: TurnState,
        engines: Iterable[EngineState],
        exclude: Collection[EngineState],
        *,
        new: bool,
    ) -> tuple[EngineState, int] | None:
        after_parking: tuple[EngineState, int] | None = None
        last_resort: tuple[EngineState, int] | None = None
        for engine in engines:
            if engine in exclude or turn.prompt_tokens >= engine.longest_context_tokens:
                continue
            if new and engine.waiting and not turn.conversation.turns:
                continue
            need = self.need(turn, engine)
            reserve = self._headroom_tokens(engine) if new else 0.0
            reachable = engine.reachable_tokens(turn.conversation)
            if reachable < need + reserve:
                continue
            if engine.id == turn.avoid:
                last_resort = last_resort or (engine, need)
            elif engine.free_tokens >= need:
                return engine, need
            else:
                after_parking = after_parking or (engine, need)
        return after_parking or last_resort

    def _headroom_tokens(self, engine: EngineState) -> float:
        if not engine.conversations:
            return 0.0  # nobody there to grow: a conversation that fits is never refused
        if engine.foreseen_tokens:
            return max(0, engine.foreseen_tokens - engine.held_tokens - engine.parked_tokens)
        return self._settings.headroom * self._growth.headroom_tokens(engine.ages)

    def best_prefiller(self, turn: TurnState, decoder: EngineState) -> EngineState | None:
        """The prefiller that would be done first with its backlog and then this prompt.

        Rather one with room now; else one that has room once the prompts on it are handed over.
        None where only conversations that live there could make room: that may take for ever.
        """
        best: EngineState | None = None
        best_s = 0.0
        compared = 0
        full: EngineState | None = None
        for engine in islice(self._prefillers, _SCAN_PREFILLERS):
            pages = engine.pages(turn.prompt_tokens)
            if engine is decoder or engine.id == turn.avoid:
                continue
            if turn.prompt_tokens >= engine.longest_context_tokens:
                continue
            reachable = engine.reachable_tokens()
            if reachable >= pages:
                done_s = engine.prefill_backlog_s + engine.prefill_s(turn.prompt_tokens)
                if best is None or done_s < best_s:
                    best, best_s = engine, done_s
                compared += 1
                if compared == _COMPARE_PREFILLERS:
                    break
            elif full is None and reachable + engine.handing_over_tokens >= pages:
                full = engine
        return best or full
