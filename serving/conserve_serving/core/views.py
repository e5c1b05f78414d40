"""What a policy may see, and the protocol it implements.

Views are read-only protocols over the scheduler's own state: a policy that tried to write would
not type-check, and building no copies keeps a decision cheap at a thousand engines.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from conserve_serving.core.types import EngineId, Reason, Tier, TurnId


class EngineView(Protocol):
    """One engine as the ledger and its reports show it now."""

    @property
    def id(self) -> EngineId: ...
    @property
    def tier(self) -> Tier: ...
    @property
    def hosts(self) -> bool:
        """Whether it is offered new conversations."""

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
    def tail_backlog_tokens(self) -> int:
        """That part of the backlog which later turns append: it is computed first."""

    @property
    def prefill_backlog_s(self) -> float: ...
    @property
    def egress_tokens(self) -> int:
        """KV of computed prompts that is on this engine's link now."""

    @property
    def foreseen_tokens(self) -> int:
        """All the KV its conversations will ever hold: an oracle's, else 0."""

    @property
    def prefill_tokens_per_s(self) -> float: ...
    @property
    def mixed_slowdown(self) -> float: ...
    def prefill_s(self, tokens: float) -> float: ...
    def decode_step_s(self, kv_tokens: float) -> float: ...
    def decode_bias(self, kv_tokens: float) -> float | None:
        """Step time as observed over what was believed at first; None where none was observed."""

    def handoff_s(self, tokens: float) -> float: ...


class TurnView(Protocol):
    """One turn as it arrived."""

    @property
    def id(self) -> TurnId: ...
    @property
    def index(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def context_tokens(self) -> int:
        """KV its conversation has at its home; 0 without one."""

    @property
    def new_tokens(self) -> int:
        """Prompt tokens that are not in that KV."""

    @property
    def predicted_output_tokens(self) -> int | None:
        """Somebody's guess; observation-only policies do not look at it."""


class LoadView(Protocol):
    """What conversations have been observed to need of late: means, see `core.load`."""

    @property
    def conversations_per_s(self) -> float:
        """How often conversations begin."""

    @property
    def first_prompt_tokens(self) -> float: ...
    @property
    def tail_turns(self) -> float: ...
    @property
    def tail_new_tokens(self) -> float:
        """Uncached tokens of all tail turns of a conversation together."""

    @property
    def output_tokens(self) -> float:
        """Output of all turns of a conversation together."""

    @property
    def turn_output_tokens(self) -> float:
        """Output of one turn."""

    @property
    def context_tokens(self) -> float:
        """Context that an output token reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlace:
    """Where a conversation that has no KV anywhere is prefilled."""

    remote: bool
    reason: Reason


class Tail(enum.Enum):
    """How a policy treats later turns.

    ``PINNED``: they run where the conversation lives. ``ASKED``: `Policy.tail_place` says where.
    ``ANYWHERE``: each is placed like a first one, wherever the KV is.
    """

    PINNED = "pinned"
    ASKED = "asked"
    ANYWHERE = "anywhere"


class TailAction(enum.Enum):
    """Where a later turn's new tokens are computed: at home; on the prefiller, whence what is new
    is handed to the home; or on another engine, to which the conversation's KV is copied and where
    it lives from then on."""

    STAY = "stay"
    REMOTE = "remote"
    MOVE = "move"


class Policy(Protocol):
    """Chooses; never acts. Side-effect free: the same views give the same choice.

    Attributes:
        name: as in the configuration file.
        tail: how later turns are treated.
        hands_over: whether it ever has a prompt prefilled elsewhere than where it is decoded.
    """

    @property
    def name(self) -> str: ...
    @property
    def tail(self) -> Tail: ...
    @property
    def hands_over(self) -> bool: ...
    def hosts(self, engine: EngineView) -> bool:
        """Whether this engine may hold conversations, the prefill tier's mode apart. Depends on
        the engine's tier alone."""
        ...

    def rank(self, engine: EngineView, load: LoadView) -> float:
        """Order in which engines are offered a conversation, smallest first.

        The scheduler takes the first that has room; equal ranks go by engine id, so the order is
        total. An engine is ranked anew when its own books change.
        """
        ...

    def prefill_place(
        self,
        turn: TurnView,
        decoder: EngineView,
        prefiller: EngineView | None,
        load: LoadView,
    ) -> PrefillPlace:
        """Whether ``prefiller`` (the one that would be done with this turn first, after what waits
        on it; None if there is none) prefills this turn for ``decoder``."""
        ...

    def tail_place(
        self,
        turn: TurnView,
        home: EngineView,
        prefiller: EngineView | None,
        other: EngineView | None,
        load: LoadView,
    ) -> TailAction:
        """Where a later turn runs. Asked only where ``tail`` is ``ASKED``.

        Args:
            turn: the turn.
            home: where the conversation lives.
            prefiller: the one that would be done with the turn first; None if there is none.
            other: the best-ranked other engine with room for the conversation, when it may move.
            load: what conversations have been observed to need.
        """
        ...

    def prefill_tier_hosts(
        self, engines: Sequence[EngineView], load: LoadView, *, hosting: bool
    ) -> bool:
        """Whether the prefill tier holds conversations from now on; asked now and then.

        Args:
            engines: all of them.
            load: what conversations have been observed to need.
            hosting: whether it does so now.
        """
        ...
