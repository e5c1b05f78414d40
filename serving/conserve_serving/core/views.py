"""What a policy may see, and the protocol it implements.

Views are read-only protocols over the scheduler's own state: a policy that tried to write would
not type-check, and building no copies keeps a decision cheap at a thousand engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from conserve_serving.core.types import EngineId, Reason, Tier


class EngineView(Protocol):
    """One engine as the ledger and its reports show it now."""

    @property
    def id(self) -> EngineId: ...
    @property
    def tier(self) -> Tier: ...
    @property
    def capacity_tokens(self) -> int: ...
    @property
    def held_tokens(self) -> int:
        """KV resident or reserved on the device."""

    @property
    def free_tokens(self) -> int: ...
    @property
    def parked_tokens(self) -> int: ...
    @property
    def active_tokens(self) -> int:
        """Context of the turns running here now: what a decode step reads."""

    @property
    def active_turns(self) -> int: ...
    @property
    def placed_turns(self) -> int:
        """Turns ever placed here."""

    @property
    def prefill_backlog_tokens(self) -> int:
        """Uncached tokens placed here and not yet known to be prefilled."""

    @property
    def prefill_backlog_s(self) -> float: ...
    @property
    def prefill_tokens_per_s(self) -> float: ...
    @property
    def mixed_slowdown(self) -> float: ...
    def prefill_s(self, tokens: float) -> float: ...
    def decode_step_s(self, kv_tokens: float) -> float: ...
    def handoff_s(self, tokens: float) -> float: ...


class TurnView(Protocol):
    """One turn as it arrived."""

    @property
    def index(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlace:
    """Where a conversation that has no KV anywhere is prefilled."""

    remote: bool
    reason: Reason


class Policy(Protocol):
    """Chooses; never acts. Side-effect free: the same views give the same choice.

    Attributes:
        name: as in the configuration file.
        sticky: whether a conversation stays where it lives.
    """

    @property
    def name(self) -> str: ...
    @property
    def sticky(self) -> bool: ...
    def hosts(self, engine: EngineView) -> bool:
        """Whether this engine may hold conversations. Depends on the engine's tier alone."""
        ...

    def rank(self, engine: EngineView) -> float:
        """Order in which engines are offered a conversation, smallest first.

        The scheduler takes the first that has room; equal ranks go by engine id, so the order is
        total.
        """
        ...

    def prefill_place(
        self, turn: TurnView, decoder: EngineView, prefiller: EngineView | None
    ) -> PrefillPlace:
        """Whether ``prefiller`` (the one that would be done with this turn first, after what waits
        on it; None if there is none) prefills this turn for ``decoder``."""
        ...
