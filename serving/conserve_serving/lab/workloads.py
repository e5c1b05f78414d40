"""What arrives: conversations of a trace or a generator, drawn by seed, with arrival times.

A *pool* is a trace after its caps, read once in a process. A *stream* draws conversations from it
with replacement and gives them arrival times. Both draws depend on the seed alone: the same seed
gives the same conversations in the same order to every policy, at every rate, whose arrivals
differ only by how far they are stretched. ``docs/workloads.md`` is for people.
"""

from __future__ import annotations

import enum
import hashlib
import heapq
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final

from conserve_serving.core.types import ConversationId
from conserve_serving.lab import arrivals
from conserve_serving.lab.arrivals import Bursts
from conserve_serving.lab.errors import WorkloadError
from conserve_serving.replay import generator
from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.replay.errors import TraceError
from conserve_serving.replay.session import GENERATED
from conserve_serving.replay.traces import TraceFormat, load_trace
from conserve_serving.replay.workload import Caps, Workload, select
from conserve_serving.simulator.conversation import SimulatedConversation, SimulatedTurn

#: Conversations in the pool of a generated workload, where the spec does not say.
GENERATED_POOL: Final = 1000
#: The seed of generated pools. A run's own seed draws from the pool, as it does from a trace.
_POOL_SEED: Final = 0
#: Stands between a conversation's id in the pool and the number of its draw.
_DRAW: Final = "~"
#: A turn that keeps less than this share of the context before it is a reset.
RESET_SHARE: Final = 0.5
#: Traces that name prompts by blocks of tokens lose up to a block of what is kept.
_BLOCK_TOKENS: Final = 64


class Arrivals(enum.StrEnum):
    """When conversations arrive; see :mod:`conserve_serving.lab.arrivals`."""

    POISSON = "poisson"
    BURSTY = "bursty"
    RECORDED = "recorded"


class Split(enum.StrEnum):
    """Which conversations of a trace: all, or one of two halves told by a hash of their names."""

    ALL = "all"
    TUNE = "tune"
    TEST = "test"


class SharedPrefix(enum.StrEnum):
    """``cold``: conversations share nothing; ``warm``: they begin with the trace's prefixes."""

    COLD = "cold"
    WARM = "warm"


class Answers(enum.StrEnum):
    """Whether an answer is part of the next prompt's history.

    ``recorded``: what the trace counts as new is new. ``returned``: a turn that keeps the whole
    previous prompt (but for part of a block), and whose own prompt has room for the answer, kept
    the answer, too. Some traces compare prompts with prompts and therefore count every answer as
    new input, although its KV is where it was generated.
    """

    RECORDED = "recorded"
    RETURNED = "returned"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """A workload, as plain values (JSON-able; equal specs give equal workloads).

    Attributes:
        source: ``generated:NAME``, or the path of a trace.
        trace_format: how the trace is written; None: told by its content.
        pool_size: the trace's first conversations only, sub-agents included; how many a generator
            makes. None: the whole trace, ``GENERATED_POOL``.
        split: which half of the pool.
        max_turns, max_context_tokens, max_gap_s, scale: caps as those of ``conserve replay``
            (:class:`conserve_serving.replay.workload.Caps`); None: none.
        until_reset: conversations end before the first turn that keeps less than ``RESET_SHARE``
            of the context before it.
        answers: see :class:`Answers`.
        conversations: how many arrive; the sub-agents of those that have some come on top. None:
            as many as the pool has.
        arrivals: see :class:`Arrivals`.
        rate_per_s: mean arrivals per second; None: as recorded.
        burst_factor, burst_share, burst_conversations: of ``bursty`` arrivals; see
            :class:`~conserve_serving.lab.arrivals.Bursts`.
        seed: names the draw and the pattern of arrivals.
        shared_prefix: see :class:`SharedPrefix`.

    Raises:
        WorkloadError: a value is out of range, or two contradict each other.
    """

    source: str
    trace_format: TraceFormat | None = None
    pool_size: int | None = None
    split: Split = Split.ALL
    max_turns: int | None = None
    max_context_tokens: int | None = None
    max_gap_s: float | None = None
    scale: float | None = None
    until_reset: bool = False
    answers: Answers = Answers.RETURNED
    conversations: int | None = None
    arrivals: Arrivals = Arrivals.POISSON
    rate_per_s: float | None = 1.0
    burst_factor: float = 4.0
    burst_share: float = 0.1
    burst_conversations: float = 50.0
    seed: int = 0
    shared_prefix: SharedPrefix = SharedPrefix.COLD

    def __post_init__(self) -> None:
        for name, kind in _ENUMS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _member(name, kind, value))
        for name in ("pool_size", "max_turns", "max_context_tokens", "conversations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise WorkloadError(f"{name} is {value}: give 1 or more, or leave it out.")
        for name in ("scale", "rate_per_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise WorkloadError(f"{name} is {value}: give a number above 0, or leave it out.")
        if self.max_gap_s is not None and not self.max_gap_s >= 0:
            raise WorkloadError(
                f"max_gap_s is {self.max_gap_s}: give 0 or more seconds, or leave it out."
            )
        if self.rate_per_s is None and self.arrivals is not Arrivals.RECORDED:
            raise WorkloadError(
                f"rate_per_s is not given, and arrivals are {self.arrivals.value!r}. Give "
                "conversations per second, or use arrivals 'recorded'."
            )
        if self.arrivals is Arrivals.BURSTY:
            self.bursts  # noqa: B018 - raises what is wrong with them

    @property
    def bursts(self) -> Bursts:
        """The shape of bursty arrivals."""
        return Bursts(
            factor=self.burst_factor,
            share=self.burst_share,
            conversations=self.burst_conversations,
        )

    @property
    def pool_key(self) -> WorkloadSpec:
        """What the pool depends on, the rest at its defaults: equal keys share a pool."""
        return WorkloadSpec(
            source=self.source,
            trace_format=self.trace_format,
            pool_size=self.pool_size,
            split=self.split,
            max_turns=self.max_turns,
            max_context_tokens=self.max_context_tokens,
            max_gap_s=self.max_gap_s,
            scale=self.scale,
            until_reset=self.until_reset,
            answers=self.answers,
        )


_ENUMS: Final[dict[str, type[enum.StrEnum]]] = {
    "trace_format": TraceFormat,
    "split": Split,
    "answers": Answers,
    "arrivals": Arrivals,
    "shared_prefix": SharedPrefix,
}


def _member(name: str, kind: type[enum.StrEnum], value: str) -> enum.StrEnum:
    try:
        return kind(value)
    except ValueError:
        raise WorkloadError(f"{name} is {value!r}: give one of {', '.join(kind)}.") from None


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A trace after its caps: what streams draw from.

    Attributes:
        workload: the conversations, sub-agents among them, and what the caps cost.
        resets_cut: turns that ``until_reset`` left out.
        answers_returned: turns whose previous answer was taken as kept (see :class:`Answers`).
        orphans: sub-agents left out because their parents are, or end before them.
    """

    workload: Workload
    resets_cut: int = 0
    answers_returned: int = 0
    orphans: int = 0
    _children: dict[str, list[int]] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """Of the trace or generator, for reports."""
        return self.workload.name

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """Every conversation of the pool, once, sub-agents included."""
        return self.workload.conversations

    @staticmethod
    def load(spec: WorkloadSpec) -> Pool:
        """The pool of a workload; read once in a process, and kept for the next call.

        Raises:
            WorkloadError: the trace cannot be read, there is no such generator, or the caps leave
                nothing.
        """
        return _load(spec.pool_key)

    def conversation(self, drawn: str) -> Conversation:
        """The conversation of the pool that was drawn under this id.

        Raises:
            KeyError: the id is none of a stream of this pool.
        """
        return self._by_id[drawn.rpartition(_DRAW)[0]]

    def stream(self, spec: WorkloadSpec) -> Iterator[SimulatedConversation]:
        """Conversations with arrival times, in their order, made as they are asked for.

        Ids are the pool's, ``~`` and the number of the draw. A sub-agent comes with its parent's
        draw, as long after it as recorded, less what a cap on gaps took out before.

        Args:
            spec: whose pool this is.

        Raises:
            WorkloadError: arrivals are to be as recorded, but the trace has none, or fewer.
        """
        waiting: list[tuple[float, int, SimulatedConversation]] = []  # sub-agents, not yet due
        serial = itertools.count()
        for number, (index, arrival_s) in enumerate(self._draws(spec)):
            while waiting and waiting[0][0] <= arrival_s:
                yield heapq.heappop(waiting)[2]
            for one, begins_s in self._family(index, arrival_s):
                made = self._simulated(one, number, begins_s, spec)
                if one == index:
                    yield made
                else:
                    heapq.heappush(waiting, (begins_s, next(serial), made))
        while waiting:
            yield heapq.heappop(waiting)[2]

    def _draws(self, spec: WorkloadSpec) -> Iterator[tuple[int, float]]:
        """Which conversation arrives when; sub-agents are never drawn by themselves."""
        if spec.arrivals is Arrivals.RECORDED:
            return iter(self._recorded(spec))
        times = (
            arrivals.poisson(rate_per_s=spec.rate_per_s or 1.0, seed=spec.seed)
            if spec.arrivals is Arrivals.POISSON
            else arrivals.bursty(
                rate_per_s=spec.rate_per_s or 1.0, seed=spec.seed, bursts=spec.bursts
            )
        )
        rng = random.Random(f"{spec.seed}/draws")  # noqa: S311 - a workload, not a secret
        roots = self._roots
        drawn = (roots[rng.randrange(len(roots))] for _ in itertools.count())
        return itertools.islice(zip(drawn, times, strict=False), spec.conversations or len(roots))

    def _recorded(self, spec: WorkloadSpec) -> list[tuple[int, float]]:
        known = sorted(
            (at, index)
            for index in self._roots
            if (at := self.conversations[index].arrival_s) is not None
        )
        if len(known) < len(self._roots):
            raise WorkloadError(
                f"arrivals are 'recorded', but {len(self._roots) - len(known)} of "
                f"{len(self._roots)} conversations of {self.name} have no arrival_s. Use arrivals "
                "'poisson' or 'bursty', or give the trace arrival_s on first turns."
            )
        count = spec.conversations or len(known)
        if count > len(known):
            raise WorkloadError(
                f"conversations is {count}, but {self.name} recorded the arrivals of {len(known)}. "
                f"Ask for {len(known)} at most, or use arrivals 'poisson' or 'bursty', which draw "
                "with replacement."
            )
        times = arrivals.recorded([at for at, _ in known[:count]], rate_per_s=spec.rate_per_s)
        return [(index, at) for at, (_, index) in zip(times, known, strict=False)]

    def _family(self, index: int, arrival_s: float) -> Iterator[tuple[int, float]]:
        """A conversation and its sub-agents, theirs too, and when each begins."""
        yield index, arrival_s
        for child in self._children.get(self.conversations[index].id, ()):
            yield from self._family(child, arrival_s + self.conversations[child].offset_s)

    def _simulated(
        self, index: int, number: int, arrival_s: float, spec: WorkloadSpec
    ) -> SimulatedConversation:
        made = self.conversations[index]
        shared = None
        if spec.shared_prefix is SharedPrefix.WARM and made.shared_prefix_tokens:
            shared = (made.shared_prefix_name, made.shared_prefix_tokens)
        return SimulatedConversation(
            id=ConversationId(f"{made.id}{_DRAW}{number}"),
            arrival_s=arrival_s,
            turns=self._turns[index],
            shared_prefix=shared,
            parent=(
                None if made.parent is None else ConversationId(f"{made.parent}{_DRAW}{number}")
            ),
        )

    @cached_property
    def _roots(self) -> tuple[int, ...]:
        return tuple(i for i, c in enumerate(self.conversations) if c.parent is None)

    @cached_property
    def _by_id(self) -> dict[str, Conversation]:
        return {c.id: c for c in self.conversations}

    @cached_property
    def _turns(self) -> tuple[tuple[SimulatedTurn, ...], ...]:
        """What is drawn often is made once: turns are immutable."""
        return tuple(
            tuple(
                SimulatedTurn(
                    prompt_tokens=turn.input_tokens,
                    new_tokens=turn.new_input_tokens,
                    output_tokens=turn.output_tokens,
                    gap_s=turn.gap_s,
                )
                for turn in c.turns
            )
            for c in self.conversations
        )


@lru_cache(maxsize=16)
def _load(spec: WorkloadSpec) -> Pool:
    caps = Caps(
        max_turns=spec.max_turns,
        max_context_tokens=spec.max_context_tokens,
        max_gap_s=spec.max_gap_s,
        scale=spec.scale,
    )
    cutter = _Cutter(spec)
    try:
        name, whole = _source(spec)
        workload = select(cutter.cut(whole), caps, name=name)
    except TraceError as error:
        raise WorkloadError(str(error)) from error
    return cutter.pool(workload)


def _source(spec: WorkloadSpec) -> tuple[str, Iterable[Conversation]]:
    if spec.source.startswith(GENERATED):
        made = generator.generate(
            spec.source.removeprefix(GENERATED),
            conversations=spec.pool_size or GENERATED_POOL,
            seed=_POOL_SEED,
        )
        return spec.source, made
    path = Path(spec.source)
    return path.name, itertools.islice(load_trace(path, spec.trace_format), spec.pool_size)


def root(conversation: Conversation) -> str:
    """The name that decides a conversation's half: a sub-agent goes with its ancestor."""
    return conversation.id if conversation.parent is None else conversation.id.partition("/")[0]


def in_split(name: str, split: Split) -> bool:
    """Whether the conversation of that name is in that half; told by the name alone."""
    if split is Split.ALL:
        return True
    even = hashlib.sha256(name.encode()).digest()[0] % 2 == 0
    return even is (split is Split.TUNE)


def is_reset(turn: Turn, before: Turn) -> bool:
    """Whether a turn dropped most of the context before it (a compaction, a cleared history)."""
    return turn.kept_tokens < RESET_SHARE * before.context_tokens


def returned(turn: Turn, before: Turn) -> Turn:
    """The turn with the answer before it as part of what it keeps, where that can be.

    See :class:`Answers`; the same turn where the answer is kept already, or cannot be.
    """
    kept = turn.kept_tokens
    if kept >= before.context_tokens or turn.input_tokens < before.context_tokens:
        return turn
    if kept <= before.input_tokens - _BLOCK_TOKENS:  # something before the answer was changed
        return turn
    return replace(turn, new_input_tokens=turn.input_tokens - before.context_tokens)


class _Cutter:
    """What the laboratory does to a trace before the replayer's caps do theirs."""

    def __init__(self, spec: WorkloadSpec) -> None:
        self._spec = spec
        self._resets_cut = 0
        self._answers_returned = 0
        self._recorded: dict[str, Conversation] = {}

    def cut(self, whole: Iterable[Conversation]) -> Iterator[Conversation]:
        for conversation in whole:
            if in_split(root(conversation), self._spec.split):
                self._recorded[conversation.id] = conversation
                yield replace(conversation, turns=tuple(self._turns(conversation.turns)))

    def _turns(self, turns: tuple[Turn, ...]) -> Iterator[Turn]:
        before: Turn | None = None
        for number, recorded in enumerate(turns):
            turn = recorded
            if before is not None:
                if self._spec.answers is Answers.RETURNED:
                    turn = returned(recorded, before)
                    self._answers_returned += turn is not recorded
                if self._spec.until_reset and is_reset(turn, before):
                    self._resets_cut += len(turns) - number
                    return
            yield turn
            before = recorded

    def pool(self, workload: Workload) -> Pool:
        """The pool of what the caps left, without sub-agents that nobody calls any more."""
        kept: dict[str, Conversation] = {}
        children: dict[str, list[int]] = {}
        for c in workload.conversations:
            if c.parent is None:
                kept[c.id] = c
            elif c.parent in kept and c.parent_turns <= len(kept[c.parent].turns):
                children.setdefault(c.parent, []).append(len(kept))
                kept[c.id] = replace(c, offset_s=max(0.0, c.offset_s - self._shortened_s(c)))
        return Pool(
            workload=replace(workload, conversations=tuple(kept.values())),
            resets_cut=self._resets_cut,
            answers_returned=self._answers_returned,
            orphans=len(workload.conversations) - len(kept),
            _children=children,
        )

    def _shortened_s(self, child: Conversation) -> float:
        """How much of the parent's gaps before its sub-agent the cap on gaps takes out."""
        limit = self._spec.max_gap_s
        if limit is None or child.parent is None:
            return 0.0
        before = self._recorded[child.parent].turns[: child.parent_turns]
        return sum(max(0.0, turn.gap_s - limit) for turn in before)
