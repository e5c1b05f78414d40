"""What the gateway knows of each conversation: for identity, for estimates, for people to look at.

The scheduler decides; this is memory. It is bounded: beyond ``max_conversations`` the one idle for
longest is forgotten, running ones never.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from conserve_serving.core.types import ConversationId
from conserve_serving.energy.work import Tally
from conserve_serving.gateway.identity import Tags, scoped
from conserve_serving.gateway.lineage import PrefixMark, Relation
from conserve_serving.gateway.request import DEFAULT_BYTES_PER_TOKEN, TurnRequest

#: Turn ids remembered of each conversation, to recognise a client's retries; and how many where
#: none of them was answered, for those are sent again: as many as may fail at once.
_TURN_IDS: Final = 8
_UNANSWERED_TURN_IDS: Final = 64


class TurnSummary(NamedTuple):
    """One turn that has ended, as people see it."""

    number: int
    outcome: str
    reason: str | None
    prefill_engine: str | None
    decode_engine: str | None
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    ttft_s: float | None
    duration_s: float
    energy: Tally

    def describe(self) -> dict[str, Any]:
        """The turn as JSON."""
        fields = self._asdict()
        return {"index": fields.pop("number"), **fields, "energy": self.energy.describe()}


class Usage(NamedTuple):
    """The engine's own counts of one turn; ``cached_tokens`` is None where it does not tell."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None


class Conversation:
    """One conversation. Times are wall seconds of the registry's clock."""

    __slots__ = (
        "begun",
        "bytes_per_token",
        "cached_tokens",
        "content_bytes",
        "context_tokens",
        "created_s",
        "decoder",
        "ended",
        "energy",
        "first_turn_tokens",
        "id",
        "in_store",
        "key",
        "last_active_s",
        "last_prompt_tokens",
        "mark",
        "model",
        "output_tokens",
        "parent",
        "parked",
        "phase",
        "prefiller",
        "prompt_tokens",
        "recent",
        "running",
        "session",
        "shortfall_tokens",
        "source",
        "tenant",
        "token_counter",
        "transfers",
        "transfers_by_reason",
        "turn_ids",
        "turns",
    )

    def __init__(
        self, key: ConversationId, *, id: str, tenant: str, model: str, source: str, now_s: float
    ) -> None:
        self.key = key
        self.id = id
        self.tenant = tenant
        self.model = model
        self.source = source
        self.parent: str | None = None
        self.created_s = now_s
        self.last_active_s = now_s
        self.ended = False
        self.phase = "idle"
        self.parked = False
        self.in_store = False
        self.running = 0
        self.turns = 0  # highest turn index that finished
        self.begun = 0  # highest turn index given to a call without an id, while any runs
        #: Indexes by the client's ids, negative once the turn was answered.
        self.turn_ids: dict[str, int] | None = None
        self.first_turn_tokens: int | None = None
        self.token_counter: str | None = None
        self.decoder: str | None = None
        self.prefiller: str | None = None
        #: Engine and epoch where a session is open for it.
        self.session: tuple[str, int] | None = None
        self.transfers = 0
        self.transfers_by_reason: dict[str, int] | None = None
        self.mark: PrefixMark | None = None
        self.content_bytes = 0
        self.last_prompt_tokens = 0
        self.context_tokens = 0
        self.bytes_per_token = DEFAULT_BYTES_PER_TOKEN
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.shortfall_tokens = 0
        self.energy = Tally()
        self.recent: deque[TurnSummary] | None = None

    # --- turns -------------------------------------------------------------------------------
    @property
    def is_new(self) -> bool:
        """Whether no turn of it has been seen yet."""
        return self.turns == 0 and self.running == 0 and self.turn_ids is None

    def turn_index(
        self, turn_id: str | None, relation: Relation, claimed: int | None = None
    ) -> int:
        """The index of a turn that arrives now: a client's retry gets the one it had.

        Args:
            turn_id: the client's own id of the call; the same on every retry of it.
            relation: how its prompt stands to the previous one; without a turn id, the same
                prompt sent again is a retry.
            claimed: the client's own number, believed as long as nothing was answered here: the
                conversation lived before this gateway did, or parallel calls open it.
        """
        if turn_id is None:
            if relation is Relation.REPLAY and self.turns:
                return self.turns
            # What failed was no turn; what still runs is one.
            self.begun = (max(self.turns, self.begun) if self.running else self.turns) + 1
            return self.begun
        if self.turn_ids is None:
            self.turn_ids = {}
        index = abs(self.turn_ids.get(turn_id, 0))
        if not index:
            known = [abs(other) for other in self.turn_ids.values()]
            believed = claimed is not None and self.turns == 0 and claimed not in known
            index = claimed if claimed and believed else max([self.turns, *known]) + 1
            self.turn_ids[turn_id] = index
            self._forget_turn_ids(self.turn_ids)
        return index

    def _forget_turn_ids(self, known: dict[str, int]) -> None:
        if len(known) > _TURN_IDS:
            answered = [turn_id for turn_id, index in known.items() if index < 0]
            if len(answered) >= _TURN_IDS:
                del known[answered[0]]
            elif len(known) - len(answered) > _UNANSWERED_TURN_IDS:
                del known[next(turn_id for turn_id, index in known.items() if index > 0)]

    def note_answered(self, turn_id: str | None) -> None:
        """The turn of this id finished: hardly any client sends it again."""
        if turn_id is not None and self.turn_ids and turn_id in self.turn_ids:
            self.turn_ids[turn_id] = -abs(self.turn_ids[turn_id])

    def estimate_prompt_tokens(self, content_bytes: int) -> int:
        """Length of a prompt of ``content_bytes``, from what this conversation's last one was."""
        grown = content_bytes - self.content_bytes
        if self.last_prompt_tokens and grown >= 0:
            return self.last_prompt_tokens + int(grown / self.bytes_per_token)
        return max(1, int(content_bytes / self.bytes_per_token))

    def note_usage(self, request: TurnRequest, index: int, usage: Usage) -> None:
        """A turn finished with these counts."""
        content_bytes = len(request.content)
        if index >= self.turns:  # an older turn's late end says nothing about the latest prompt
            self.turns = index
            self.content_bytes = content_bytes
            self.last_prompt_tokens = usage.prompt_tokens
            self.context_tokens = usage.prompt_tokens + usage.output_tokens
            if usage.prompt_tokens > 0:
                self.bytes_per_token = max(0.5, content_bytes / usage.prompt_tokens)
        if self.first_turn_tokens is None or index == 1:
            self.first_turn_tokens = usage.prompt_tokens  # the engine's count corrects the client's
        self.prompt_tokens += usage.prompt_tokens
        self.output_tokens += usage.output_tokens
        self.cached_tokens += usage.cached_tokens or 0

    def note_transfer(self, reason: str) -> None:
        """The conversation's KV crossed a link."""
        self.transfers += 1
        if self.transfers_by_reason is None:
            self.transfers_by_reason = {}
        self.transfers_by_reason[reason] = self.transfers_by_reason.get(reason, 0) + 1

    def describe(self, now_s: float) -> dict[str, Any]:
        """The conversation as JSON for ``/conserve/v1/conversations``."""
        return {
            "id": self.id,
            "model": self.model,
            "source": self.source,
            "parent": self.parent,
            "state": "ended" if self.ended else "open",
            "phase": "parked" if self.parked and not self.running else self.phase,
            "turns": self.turns,
            "running_turns": self.running,
            "first_turn_tokens": self.first_turn_tokens,
            "context_tokens": self.context_tokens,
            "decode_engine": self.decoder,
            "prefill_engine": self.prefiller,
            "transfers": self.transfers,
            "transfers_by_reason": self.transfers_by_reason or {},
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "cached_tokens": self.cached_tokens,
            "cached_token_shortfall_tokens": self.shortfall_tokens,
            "energy": self.energy.describe(),
            "age_s": round(now_s - self.created_s, 3),
            "idle_s": 0.0 if self.running else round(now_s - self.last_active_s, 3),
            "recent_turns": [turn.describe() for turn in self.recent or ()],
        }


class Conversations:
    """All conversations the gateway remembers.

    Args:
        clock: wall seconds, monotonic.
        new_id: makes an id nobody else has.
        max_conversations: remembered at most; running ones do not count as forgettable.
        remember_turns: latest turns kept of each.
        on_forget: told of each conversation that is dropped from memory while still open.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        max_conversations: int,
        remember_turns: int,
        on_forget: Callable[[Conversation], None],
    ) -> None:
        self._clock = clock
        self._new_id = new_id
        self._max = max_conversations
        self._remember_turns = remember_turns
        self._on_forget = on_forget
        self._all: OrderedDict[ConversationId, Conversation] = OrderedDict()
        self._models: set[str] = set()  # few: one gateway serves one model at a time
        self.open_count = 0

    def __len__(self) -> int:
        return len(self._all)

    def get(self, key: ConversationId) -> Conversation | None:
        """The conversation of that scoped id, ended or not."""
        return self._all.get(key)

    def is_running(self, key: ConversationId) -> bool:
        """Whether a turn of that conversation is running."""
        conversation = self._all.get(key)
        return conversation is not None and conversation.running > 0

    def find(self, tenant: str, id: str) -> Conversation | None:
        """A tenant's conversation by its own id; of several models', the latest active."""
        keys = (scoped(tenant, model, id) for model in self._models)
        found = [self._all[key] for key in keys if key in self._all]
        return max(found, key=lambda conversation: conversation.last_active_s, default=None)

    def new_id(self) -> str:
        """An id nobody else has."""
        return self._new_id()

    def open(self, id: str, tags: Tags, *, model: str, source: str) -> Conversation:
        """The open conversation of that id; a new one if there is none, or the old one ended."""
        key = scoped(tags.tenant, model, id)
        conversation = self._all.get(key)
        if conversation is None or (conversation.ended and not conversation.running):
            conversation = Conversation(
                key, id=id, tenant=tags.tenant, model=model, source=source, now_s=self._clock()
            )
            conversation.first_turn_tokens = tags.first_turn_tokens
            conversation.token_counter = tags.token_counter
            self._all[key] = conversation
            self._models.add(model)
            self.open_count += 1
            self._shrink()
        elif conversation.ended:
            conversation.ended = False
            self.open_count += 1
        if tags.parent is not None:
            conversation.parent = tags.parent
        return conversation

    def touch(self, conversation: Conversation) -> None:
        """It was active now."""
        conversation.last_active_s = self._clock()
        if conversation.key in self._all:
            self._all.move_to_end(conversation.key)

    def end(self, conversation: Conversation) -> None:
        """It is over; remembered for people to look at until it is the longest idle."""
        if not conversation.ended:
            conversation.ended = True
            conversation.mark = None
            conversation.parked = False
            self.open_count -= 1

    def note_turn(self, conversation: Conversation, summary: TurnSummary) -> None:
        """A turn has ended, however."""
        if self._remember_turns:
            if conversation.recent is None:
                conversation.recent = deque(maxlen=self._remember_turns)
            conversation.recent.append(summary)

    def of_tenant(self, tenant: str | None, *, limit: int) -> Iterator[Conversation]:
        """A tenant's conversations (None: everybody's), the latest active first."""
        for conversation in reversed(self._all.values()):
            if limit <= 0:
                return
            if tenant is None or conversation.tenant == tenant:
                limit -= 1
                yield conversation

    def _shrink(self) -> None:
        """Forget the longest idle. Running ones are moved to the young end when met."""
        for _ in range(len(self._all) - self._max):
            key, conversation = next(iter(self._all.items()))
            if conversation.running:
                self._all.move_to_end(key)
                continue
            del self._all[key]
            if not conversation.ended:
                self.open_count -= 1
                self._on_forget(conversation)
