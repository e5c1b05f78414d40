"""What arrives: conversations of a trace or a generator, drawn by seed, with arrival times.

A *pool* is a trace after its caps, read once in a process. A *stream* draws conversations from it
with replacement and gives them arrival times. Both draws depend on the seed alone: the same seed
gives the same conversations in the same order to every policy, at every rate, whose arrivals
differ only by how far they are stretched.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final

from conserve_serving.core.types import ConversationId
from conserve_serving.lab import arrivals
from conserve_serving.lab.cuts import Cuts, Cutter
from conserve_serving.lab.errors import WorkloadError
from conserve_serving.lab.workloads import Arrivals, SharedPrefix, WorkloadSpec
from conserve_serving.replay import generator
from conserve_serving.replay.conversations import Conversation
from conserve_serving.replay.errors import TraceError
from conserve_serving.replay.session import GENERATED
from conserve_serving.replay.traces import load_trace
from conserve_serving.replay.workload import Caps, Workload, select
from conserve_serving.simulator.conversation import SimulatedConversation, SimulatedTurn

#: Conversations in the pool of a generated workload, where the spec does not say.
GENERATED_POOL: Final = 1000
#: The seed of generated pools. A run's own seed draws from the pool, as it does from a trace.
_POOL_SEED: Final = 0
#: Stands between a conversation's id in the pool and the number of its draw.
_DRAW: Final = "~"


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A trace after its caps: what streams draw from.

    Attributes:
        workload: the conversations, sub-agents among them, and what the caps cost.
        resets_cut: turns that ``until_reset`` left out.
        answers_returned: turns whose previous answer was taken as kept; see
            ``WorkloadSpec.answers``.
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

    @cached_property
    def shared_prefix_names(self) -> frozenset[str]:
        """Prefixes that several conversations of the pool begin with.

        One that a single conversation has is nobody else's, however often that one is drawn.
        """
        names = Counter(c.shared_prefix_name for c in self.conversations if c.shared_prefix_tokens)
        return frozenset(name for name, count in names.items() if count > 1)

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
        warm = spec.shared_prefix is SharedPrefix.WARM
        if warm and made.shared_prefix_name in self.shared_prefix_names:
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
    cutter = Cutter(
        Cuts(
            split=spec.split,
            answers=spec.answers,
            until_reset=spec.until_reset,
            max_gap_s=spec.max_gap_s,
        )
    )
    try:
        name, whole = _source(spec)
        workload = select(cutter.cut(whole), caps, name=name)
    except TraceError as error:
        raise WorkloadError(str(error)) from error
    conversations, children = cutter.families(workload.conversations)
    return Pool(
        workload=replace(workload, conversations=conversations),
        resets_cut=cutter.resets_cut,
        answers_returned=cutter.answers_returned,
        orphans=cutter.orphans,
        _children=children,
    )


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
