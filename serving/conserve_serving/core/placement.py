"""Finding room: the engines in the order the policy ranks them, and what fits where."""

from __future__ import annotations

from itertools import islice
from typing import Final

from conserve_serving.core.growth import GrowthModel
from conserve_serving.core.ranking import Ranking
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.state import EngineState, TurnState
from conserve_serving.core.types import EngineId, Tier
from conserve_serving.core.views import Policy

# Engines looked at for one decision, best rank first: bounds its cost on a full cluster.
_SCAN_DECODERS: Final = 64
_SCAN_PREFILLERS: Final = 16


class Placer:
    """The engines, ranked, and the arithmetic of room. Changes nothing but its rankings."""

    def __init__(self, settings: SchedulerSettings, policy: Policy, growth: GrowthModel) -> None:
        self.engines: dict[EngineId, EngineState] = {}
        self._settings = settings
        self._policy = policy
        self._growth = growth
        self._hosts: Ranking[EngineState] = Ranking()
        self._prefillers: Ranking[EngineState] = Ranking()
        self._longest: int | None = None

    # --- membership --------------------------------------------------------------------------
    def add(self, engine: EngineState) -> None:
        self.engines[engine.id] = engine
        self._measure_longest()
        if self._policy.hosts(engine):
            self._hosts.put(engine.id, engine, self._policy.rank(engine))
        if engine.tier is Tier.PREFILL:
            self._prefillers.put(engine.id, engine, engine.prefill_backlog_s)

    def remove(self, engine: EngineState) -> None:
        del self.engines[engine.id]
        self._measure_longest()
        self.retire(engine)

    def retire(self, engine: EngineState) -> None:
        """Offer the engine nothing new."""
        self._hosts.drop(engine.id)
        self._prefillers.drop(engine.id)

    def touch(self, engine: EngineState) -> None:
        """The engine's books changed: rank it anew, if it is offered anything at all."""
        if engine.lost:
            return
        if engine.id in self._hosts:
            self._hosts.put(engine.id, engine, self._policy.rank(engine))
        if engine.id in self._prefillers:
            self._prefillers.put(engine.id, engine, engine.prefill_backlog_s)

    @property
    def has_hosts(self) -> bool:
        return len(self._hosts) > 0

    def longest_context_tokens(self) -> int | None:
        """Longest context any engine that hosts could hold; None when there is no such engine."""
        return self._longest

    def _measure_longest(self) -> None:
        hosting = [e for e in self.engines.values() if self._policy.hosts(e)]
        self._longest = max(
            (min(e.capacity_tokens, e.max_context_tokens) for e in hosting), default=None
        )

    # --- room --------------------------------------------------------------------------------
    def need(self, turn: TurnState, engine: EngineState) -> int:
        """Tokens to be free on the engine for the turn: its prompt, and the output to be expected
        from what turns of its age put out, less what its conversation has resident there."""
        conversation = turn.conversation
        output = self._growth.output_tokens(conversation.turns)
        if turn.max_output_tokens is not None:
            output = min(output, turn.max_output_tokens)
        target = engine.pages(min(turn.prompt_tokens + output, engine.capacity_tokens))
        if conversation.home is not engine:
            return target
        return max(target - conversation.resident, conversation.parked, 0)

    def find_decoder(
        self, turn: TurnState, *, exclude: EngineState | None, with_headroom: bool
    ) -> tuple[EngineState, int] | None:
        """First engine in rank order with room, rather without parking than with it.

        Args:
            turn: the turn to be placed.
            exclude: an engine that is no answer (the home that is being left).
            with_headroom: leave room for the growth of the conversations that live there too.

        Returns:
            The engine and the tokens to be free on it, or None.
        """
        after_parking: tuple[EngineState, int] | None = None
        last_resort: tuple[EngineState, int] | None = None
        for engine in islice(self._hosts, _SCAN_DECODERS):
            if engine is exclude or turn.prompt_tokens >= engine.max_context_tokens:
                continue
            need = self.need(turn, engine)
            reserve = self._headroom_tokens(engine) if with_headroom else 0.0
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
        return self._settings.headroom * self._growth.headroom_tokens(engine.ages)

    def best_prefiller(self, turn: TurnState, decoder: EngineState) -> EngineState | None:
        """The prefiller that would be done with its backlog first, rather one with room now."""
        full: EngineState | None = None
        for engine in islice(self._prefillers, _SCAN_PREFILLERS):
            pages = engine.pages(turn.prompt_tokens)
            if engine is decoder or engine.id == turn.avoid or engine.capacity_tokens < pages:
                continue
            if engine.free_tokens >= pages:
                return engine
            full = full or engine
        return full
