"""What the scheduler remembers of engines, conversations and turns.

Plain slotted records; `core.ledger` is what changes their amounts. Policies see an `EngineState`
as a read-only ``EngineView``.
"""

from __future__ import annotations

import enum
from collections import OrderedDict

from conserve_serving.core.events import EngineJoined
from conserve_serving.core.growth import AGES
from conserve_serving.core.speeds import LearnedLink, LearnedSpeeds
from conserve_serving.core.types import ConversationId, EngineId, Tier, TransferReason, TurnId


class Phase(enum.Enum):
    """Where a live turn is."""

    WAITING = "waiting"
    PREFILL = "prefill"
    HANDOFF = "handoff"
    DECODE = "decode"
    CLOSED = "closed"


class ConversationState:
    """One open conversation. Kept small: a million of these may be open."""

    __slots__ = (
        "active",
        "behind",
        "ended",
        "foreseen",
        "home",
        "id",
        "last_active_s",
        "live",
        "moved_because",
        "opening",
        "parked",
        "resident",
        "transfers",
        "turns",
        "went_on",
    )

    def __init__(self, conversation: ConversationId, now_s: float) -> None:
        self.id = conversation
        self.home: EngineState | None = None
        self.resident = 0
        self.parked = 0
        self.turns = 0  # turns finished
        self.went_on = 0  # of how many turns finished it is known that another came
        self.live = 0  # turns that have arrived and not yet ended
        self.active = 0  # those of them that are placed
        self.transfers = 0
        self.ended = False
        self.last_active_s = now_s
        self.opening: TurnState | None = None  # the turn that is bringing the KV into being
        self.behind: dict[TurnId, TurnState] | None = None  # turns of it that wait
        self.foreseen = 0  # all the KV it will ever hold, where an oracle says so
        self.moved_because: TransferReason | None = None  # set when KV was had and lost

    def waits(self, turn: TurnState) -> None:
        """One of its turns waits, for the KV or for room."""
        if self.behind is None:
            self.behind = {}
        self.behind[turn.id] = turn

    @property
    def context_tokens(self) -> int:
        """KV the conversation has at its home, wherever there."""
        return self.resident + self.parked


class TurnState:
    """One live turn."""

    __slots__ = (
        "attempts",
        "avoid",
        "backlog",
        "context",
        "conversation",
        "decoder",
        "expected_cached_tokens",
        "id",
        "index",
        "leaving",
        "max_output_tokens",
        "patient_until_s",
        "phase",
        "plan",
        "predicted_output_tokens",
        "prefill_reserved",
        "prefilled",
        "prefiller",
        "prompt_tokens",
        "recheck_s",
        "reserved",
        "reusable_tokens",
        "source",
        "source_parked",
        "source_reserved",
        "transfer",
        "until_s",
        "waits_at",
    )

    def __init__(
        self,
        turn: TurnId,
        conversation: ConversationState,
        *,
        prompt_tokens: int,
        reusable_tokens: int | None,
        max_output_tokens: int | None,
        predicted_output_tokens: int | None = None,
    ) -> None:
        self.id = turn
        self.conversation = conversation
        self.prompt_tokens = prompt_tokens
        self.reusable_tokens = reusable_tokens
        self.max_output_tokens = max_output_tokens
        self.predicted_output_tokens = predicted_output_tokens
        self.index = conversation.turns + conversation.live + 1
        self.phase = Phase.WAITING
        self.plan = 0
        self.attempts = 0
        self.avoid: EngineId | None = None
        self.decoder: EngineState | None = None
        self.prefiller: EngineState | None = None
        self.transfer: TransferReason | None = None
        self.reserved = 0  # on the decoder
        self.prefill_reserved = 0  # on the prefiller
        self.leaving = 0  # KV of it on the prefiller's link
        self.source: EngineState | None = None  # former home, while its KV is copied from there
        self.source_reserved = 0  # on the source's device
        self.source_parked = 0  # in the source's host memory
        self.expected_cached_tokens = 0  # by the current plan
        self.backlog = 0  # uncached tokens not yet prefilled, wherever that happens
        self.context = 0  # what a decode step reads for this turn
        self.prefilled = False  # its prompt's KV is known to be on the decoder
        self.recheck_s: float | None = None  # when it asked to be tried again
        self.patient_until_s: float | None = None  # until when it waits for room at its home
        self.until_s: float | None = None  # when a waiting turn is refused
        self.waits_at: EngineState | None = None  # the engine whose room it waits for, if any

    @property
    def context_tokens(self) -> int:
        """KV its conversation has at its home."""
        return self.conversation.context_tokens

    @property
    def cached_tokens(self) -> int:
        """What of the prompt is in that KV."""
        # At least one token is always computed again, and the books count whole pages.
        cached = min(self.conversation.context_tokens, self.prompt_tokens - 1)
        return cached if self.reusable_tokens is None else min(cached, self.reusable_tokens)

    @property
    def new_tokens(self) -> int:
        """What is to be computed where the conversation lives."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def moving_tokens(self) -> int:
        """KV that crosses the link once the prompt is computed on a prefiller."""
        return self.prompt_tokens if self.transfer is not TransferReason.APPEND else self.new_tokens


class EngineState:
    """One engine's books and what has been learned of it. Read by policies as an ``EngineView``."""

    __slots__ = (
        "active_tokens",
        "active_turns",
        "ages",
        "capacity_tokens",
        "draining",
        "egress_tokens",
        "epoch",
        "foreseen_tokens",
        "handing_over_tokens",
        "host_capacity_tokens",
        "hosts",
        "id",
        "idle",
        "idle_tokens",
        "link",
        "lost",
        "max_context_tokens",
        "page_tokens",
        "parked_conversations",
        "parked_tokens",
        "placed_turns",
        "prefill_backlog_tokens",
        "prefilled_turns",
        "queued_requests",
        "reported_held_tokens",
        "reserved_tokens",
        "resident_tokens",
        "running_requests",
        "speeds",
        "tail_backlog_tokens",
        "tier",
        "turns",
        "waiting",
    )

    def __init__(self, joined: EngineJoined) -> None:
        self.id: EngineId = joined.engine
        self.epoch = joined.epoch
        self.tier: Tier = joined.tier
        self.page_tokens = max(1, joined.page_tokens)
        self.capacity_tokens = joined.kv_capacity_tokens // self.page_tokens * self.page_tokens
        self.host_capacity_tokens = joined.host_capacity_tokens
        self.max_context_tokens = joined.max_context_tokens
        self.speeds = LearnedSpeeds(joined.speeds, guessed=joined.speeds_guessed)
        self.link = LearnedLink(joined.link)
        self.resident_tokens = 0
        self.reserved_tokens = 0
        self.handing_over_tokens = 0  # those of them that leave when a prompt is handed over
        self.egress_tokens = 0  # KV of computed prompts that is on its link
        self.foreseen_tokens = 0  # all that its conversations will ever hold, where that is known
        self.parked_tokens = 0
        self.parked_conversations = 0
        self.idle: OrderedDict[ConversationId, ConversationState] = OrderedDict()
        self.idle_tokens = 0
        self.ages = [0] * AGES  # conversations that live here, by age
        self.active_tokens = 0
        self.active_turns = 0
        self.placed_turns = 0
        self.prefilled_turns = 0  # since the last report
        self.prefill_backlog_tokens = 0
        self.tail_backlog_tokens = 0  # of that, what later turns append
        self.turns: dict[TurnId, TurnState] = {}
        self.waiting: OrderedDict[TurnId, TurnState] = OrderedDict()
        self.draining = False
        self.hosts = False  # it is offered new conversations
        self.lost = False
        self.reported_held_tokens: int | None = None
        self.running_requests = 0
        self.queued_requests = 0

    @property
    def held_tokens(self) -> int:
        return self.resident_tokens + self.reserved_tokens

    @property
    def free_tokens(self) -> int:
        return self.capacity_tokens - self.resident_tokens - self.reserved_tokens

    def reachable_tokens(self, keep: ConversationState | None = None) -> int:
        """Most that could be free now by parking every idle conversation but ``keep``."""
        idle = self.idle_tokens
        if keep is not None and keep.id in self.idle:
            idle -= keep.resident
        return self.free_tokens + min(idle, self.host_capacity_tokens - self.parked_tokens)

    @property
    def longest_context_tokens(self) -> int:
        """A prompt has to be shorter than this to run here at all."""
        return min(self.capacity_tokens, self.max_context_tokens)

    @property
    def conversations(self) -> int:
        return sum(self.ages)

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.speeds.prefill_tokens_per_s

    @property
    def prefill_backlog_s(self) -> float:
        return self.speeds.prefill_s(self.prefill_backlog_tokens)

    @property
    def mixed_slowdown(self) -> float:
        return self.speeds.mixed_slowdown

    def prefill_s(self, tokens: float) -> float:
        return self.speeds.prefill_s(tokens)

    def decode_step_s(self, kv_tokens: float) -> float:
        return self.speeds.decode_step_s(kv_tokens)

    def decode_bias(self, kv_tokens: float) -> float | None:
        return self.speeds.decode_bias(kv_tokens)

    def handoff_s(self, tokens: float) -> float:
        return self.link.handoff_s(tokens)

    def pages(self, tokens: float) -> int:
        """``tokens`` rounded up to whole pages."""
        return -(-int(tokens) // self.page_tokens) * self.page_tokens
