"""Which incarnation of an engine is the current one, and whose speeds are still a guess."""

from __future__ import annotations

from conserve_serving.core.events import EngineJoined, StepTimes
from conserve_serving.core.placement import Placer
from conserve_serving.core.state import EngineState
from conserve_serving.core.types import EngineId, Tier


class Roster:
    """Engines as they come and go. What it admits and strikes off, the placer ranks and drops.

    Args:
        placer: where engines are kept.
    """

    __slots__ = ("_newest", "_placer", "_unseen")

    def __init__(self, placer: Placer) -> None:
        self._placer = placer
        self._newest: dict[EngineId, int] = {}
        self._unseen: dict[EngineId, EngineState] = {}  # nobody has said how fast they are

    def is_newer(self, engine: EngineId, epoch: int) -> bool:
        """Whether this incarnation is later than any heard of."""
        return epoch > self._newest.get(engine, -1)

    def heard_of(self, engine: EngineId, epoch: int) -> None:
        """Remember an incarnation, which may be lost before it is known to have joined."""
        if self.is_newer(engine, epoch):
            self._newest[engine] = epoch

    def current(self, engine: EngineId, epoch: int) -> EngineState | None:
        """The engine, if it runs and this is its incarnation."""
        state = self._placer.engines.get(engine)
        return state if state is not None and state.epoch == epoch else None

    def admit(self, event: EngineJoined) -> EngineState:
        """Take a newer incarnation in; the former must have been struck off."""
        self.heard_of(event.engine, event.epoch)
        engine = EngineState(event)
        if event.speeds_guessed:
            self._unseen[event.engine] = engine
        self._placer.add(engine)
        return engine

    def strike(self, engine: EngineState) -> None:
        """The engine is lost."""
        engine.lost = True
        self._unseen.pop(engine.id, None)
        self._placer.remove(engine)

    def learn(self, engine: EngineState, steps: StepTimes) -> None:
        """Learn from an engine's step times how fast it is, and how fast its unseen peers may be.

        Unseen engines of the same tier are taken to be as fast as one that has been seen at work.
        Otherwise a guess that is too low keeps every conversation away from them, and they would
        never be seen: new conversations would pile up on the engine that happened to be first.
        """
        engine.speeds.observe(steps, prefilled_turns=engine.prefilled_turns)
        engine.prefilled_turns = 0
        self._placer.touch(engine)
        if not self._unseen:
            return
        seen = steps.prefill_tokens if engine.tier is Tier.PREFILL else steps.decode_steps
        if not seen:
            return
        self._unseen.pop(engine.id, None)
        for other in self._unseen.values():
            if other.tier is engine.tier:
                other.speeds = other.speeds.liken(engine.speeds)
                self._placer.touch(other)
