"""What the laboratory makes of a recorded conversation before the replayer's caps do their part.

Which half of a trace it belongs to; whether answers are part of the history; where it ends, if it
is to end at its first reset; when its sub-agents begin.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from conserve_serving.replay.conversations import Conversation, Turn

#: A turn that keeps less than this share of the context before it is a reset.
RESET_SHARE: Final = 0.5
#: Traces that name prompts by blocks of tokens lose up to a block of what is kept.
_BLOCK_TOKENS: Final = 64


class Split(enum.StrEnum):
    """Which conversations of a trace: all, or one of two halves told by a hash of their names."""

    ALL = "all"
    TUNE = "tune"
    TEST = "test"


class Answers(enum.StrEnum):
    """Whether an answer is part of the next prompt's history.

    ``recorded``: what the trace counts as new is new. ``returned``: a turn that keeps the whole
    previous prompt (but for part of a block), and whose own prompt has room for the answer, kept
    the answer, too. Some traces compare prompts with prompts and therefore count every answer as
    new input, although its KV is where it was generated.
    """

    RECORDED = "recorded"
    RETURNED = "returned"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """What is to be done; see :class:`conserve_serving.lab.workloads.WorkloadSpec`."""

    split: Split
    answers: Answers
    until_reset: bool
    max_gap_s: float | None


@dataclass(slots=True)
class Cutter:
    """Does it, and counts what it did.

    Attributes:
        cuts: what is to be done.
        resets_cut: turns left out because a reset came before them.
        answers_returned: turns whose previous answer was taken as kept.
        orphans: sub-agents left out because their parents are, or end before they call them.
    """

    cuts: Cuts
    resets_cut: int = 0
    answers_returned: int = 0
    orphans: int = 0
    _roots: dict[str, str] = field(default_factory=dict)
    _recorded: dict[str, Conversation] = field(default_factory=dict)

    def cut(self, whole: Iterable[Conversation]) -> Iterator[Conversation]:
        """Conversations as they are to be used, but for the replayer's caps."""
        for conversation in whole:
            root = conversation.id
            if conversation.parent is not None:  # a sub-agent goes with its ancestor
                root = self._roots.get(conversation.parent, conversation.parent)
            self._roots[conversation.id] = root
            if in_split(root, self.cuts.split):
                self._recorded[conversation.id] = conversation
                yield replace(conversation, turns=tuple(self._turns(conversation.turns)))

    def _turns(self, turns: tuple[Turn, ...]) -> Iterator[Turn]:
        before: Turn | None = None
        for number, recorded in enumerate(turns):
            turn = recorded
            if before is not None:
                if recorded.at_s is not None:
                    # The distance of the requests: what the answer took is not known.
                    gap_s = max(recorded.gap_s, recorded.at_s - (before.at_s or 0.0))
                    turn = replace(turn, at_s=None, gap_s=gap_s)
                if self.cuts.answers is Answers.RETURNED:
                    same, turn = turn, returned(turn, before)
                    self.answers_returned += turn is not same
                if self.cuts.until_reset and is_reset(turn, before):
                    self.resets_cut += len(turns) - number
                    return
            yield turn
            before = recorded

    def families(
        self, conversations: Iterable[Conversation]
    ) -> tuple[tuple[Conversation, ...], dict[str, list[int]]]:
        """What is left once every cap has been applied.

        Args:
            conversations: parents before their sub-agents.

        Returns:
            The conversations without sub-agents that nobody calls any more; and by parent, the
            places of its sub-agents among them.
        """
        kept: dict[str, Conversation] = {}
        children: dict[str, list[int]] = {}
        for c in conversations:
            if c.parent is None:
                kept[c.id] = c
            elif c.parent in kept and c.parent_turns <= len(kept[c.parent].turns):
                children.setdefault(c.parent, []).append(len(kept))
                kept[c.id] = replace(c, offset_s=max(0.0, c.offset_s - self._shortened_s(c)))
            else:
                self.orphans += 1
        return tuple(kept.values()), children

    def _shortened_s(self, child: Conversation) -> float:
        """How much of the parent's gaps before its sub-agent the cap on gaps takes out."""
        limit = self.cuts.max_gap_s
        if limit is None or child.parent is None:
            return 0.0
        before = self._recorded[child.parent].turns[: child.parent_turns]
        return sum(max(0.0, turn.gap_s - limit) for turn in before)
