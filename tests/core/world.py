"""A small scripted world for scenario tests: engines by name, turns by name, decisions by type."""

from __future__ import annotations

from typing import TypeVar

from chaos import joined

from conserve_serving.core import Scheduler, SchedulerSettings, make_policy
from conserve_serving.core.decisions import Decision, Place
from conserve_serving.core.events import (
    ConversationEnded,
    ConversationIdled,
    Event,
    HandoffFinished,
    TurnArrived,
    TurnFinished,
)
from conserve_serving.core.types import ConversationId, EngineSpeeds, Fallback, Tier, TurnId
from conserve_serving.core.views import Policy

D = TypeVar("D")


class World:
    """One scheduler and its clock."""

    def __init__(self, policy: str | Policy = "conserve", **settings: object) -> None:
        self.settings = SchedulerSettings(**settings)  # type: ignore[arg-type] # by keyword
        if isinstance(policy, str):
            policy = make_policy(policy, self.settings)
        self.scheduler = Scheduler(self.settings, policy)
        self.now_s = 0.0

    def send(self, event: Event) -> list[Decision]:
        decisions = self.scheduler.handle(event, now_s=self.now_s)
        self.scheduler.check_invariants(recount=True)
        return decisions

    def engine(
        self,
        name: str,
        tier: Tier = Tier.DECODE,
        *,
        epoch: int = 1,
        capacity: int = 100_000,
        host: int = 0,
        speeds: EngineSpeeds | None = None,
    ) -> list[Decision]:
        extra = {} if speeds is None else {"speeds": speeds}
        return self.send(joined(name, tier, epoch=epoch, capacity=capacity, host=host, **extra))

    def cluster(self, *decoders: str, host: int = 0, capacity: int = 100_000) -> None:
        self.engine("p0", Tier.PREFILL)
        for name in decoders:
            self.engine(name, host=host, capacity=capacity)

    def arrive(
        self, turn: str, conversation: str, prompt_tokens: int, **extra: int | None
    ) -> list[Decision]:
        return self.send(
            TurnArrived(
                turn=TurnId(turn),
                conversation=ConversationId(conversation),
                prompt_tokens=prompt_tokens,
                reusable_tokens=extra.get("reusable_tokens"),
                max_output_tokens=extra.get("max_output_tokens"),
                predicted_output_tokens=extra.get("predicted_output_tokens"),
                foreseen_tokens=extra.get("foreseen_tokens") or 0,
            )
        )

    def handed_over(
        self, place: Place, *, fallback: Fallback | None = None, duration_s: float = 0.02
    ) -> list[Decision]:
        return self.send(
            HandoffFinished(
                turn=place.turn,
                plan=place.plan,
                moved_tokens=0 if fallback else 1_000,
                duration_s=duration_s,
                fallback=fallback,
            )
        )

    def finish(
        self, place: Place, prompt_tokens: int, output_tokens: int = 100, cached_tokens: int = 0
    ) -> list[Decision]:
        return self.send(
            TurnFinished(
                turn=place.turn,
                plan=place.plan,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                cached_tokens=cached_tokens,
            )
        )

    def first_turn(self, turn: str, conversation: str, prompt_tokens: int = 10_000) -> Place:
        """A whole first turn, from arrival to end."""
        place = one(self.arrive(turn, conversation, prompt_tokens), Place)
        if place.prefiller is not None:
            self.handed_over(place)
        self.finish(place, prompt_tokens, cached_tokens=prompt_tokens - 1)
        return place

    def idle(self, conversation: str) -> list[Decision]:
        return self.send(ConversationIdled(conversation=ConversationId(conversation)))

    def end(self, conversation: str) -> list[Decision]:
        return self.send(ConversationEnded(conversation=ConversationId(conversation)))


def one(decisions: list[Decision], kind: type[D]) -> D:
    """The only decision of that kind."""
    found = [d for d in decisions if isinstance(d, kind)]
    assert len(found) == 1, decisions
    return found[0]


def none(decisions: list[Decision], kind: type[D]) -> None:
    assert not [d for d in decisions if isinstance(d, kind)], decisions
