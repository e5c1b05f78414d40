"""What a workload asks of a cluster: its mean conversation, in tokens by the work they bring.

``capacity.py`` says how many of it a cluster can carry.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from conserve_serving.lab.errors import LabError
from conserve_serving.simulator import SimulatedConversation


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A workload as its conversations' mean demands; made by :meth:`of`.

    Attributes:
        first_tokens: uncached tokens of the first prompt.
        first_pairs: (query, key) pairs of computing it.
        tail_turns: turns after the first.
        tail_tokens: uncached tokens of all their prompts.
        output_tokens: tokens generated, all turns.
        decode_tokens: of them, those that a decode step makes: each answer's first comes from its
            prompt.
        context_read_tokens: KV that a decode step reads for a conversation, mean over steps.
        context_held_tokens: KV that it holds meanwhile: prompt and the whole answer.
        first_prompts, tail_prompts: ``(uncached, cached)`` tokens of every prompt in the sample.
        conversations: in the sample.
    """

    first_tokens: float
    first_pairs: float
    tail_turns: float
    tail_tokens: float
    output_tokens: float
    decode_tokens: float
    context_read_tokens: float
    context_held_tokens: float
    first_prompts: tuple[tuple[int, int], ...]
    tail_prompts: tuple[tuple[int, int], ...]
    conversations: int

    @classmethod
    def of(cls, conversations: Iterable[SimulatedConversation]) -> Self:
        """The demand of a sample. A shared prefix is taken as cached wherever it is needed.

        Raises:
            LabError: the sample is empty.
        """
        first: list[tuple[int, int]] = []
        tail: list[tuple[int, int]] = []
        output = decoded = read = held = 0.0
        for conversation in conversations:
            for index, turn in enumerate(conversation.turns):
                kept = turn.prompt_tokens - turn.new_tokens
                if index == 0:
                    shared = conversation.shared_prefix[1] if conversation.shared_prefix else 0
                    cached = max(kept, min(shared, turn.prompt_tokens - 1))
                    first.append((turn.prompt_tokens - cached, cached))
                elif turn.new_tokens:
                    tail.append((turn.new_tokens, kept))
                else:
                    tail.append((1, kept - 1))  # an engine computes at least one token
                steps = max(turn.output_tokens - 1, 0)
                output += turn.output_tokens
                decoded += steps
                read += steps * (turn.prompt_tokens + turn.output_tokens / 2)
                held += steps * (turn.prompt_tokens + turn.output_tokens)
        if not first:
            raise LabError("the sample has no conversation: give at least one")
        count = len(first)
        return cls(
            first_tokens=sum(new for new, _ in first) / count,
            first_pairs=sum(new * (cached + new / 2) for new, cached in first) / count,
            tail_turns=len(tail) / count,
            tail_tokens=sum(new for new, _ in tail) / count,
            output_tokens=output / count,
            decode_tokens=decoded / count,
            context_read_tokens=read / decoded if decoded else 0.0,
            context_held_tokens=held / decoded if decoded else 0.0,
            first_prompts=tuple(first),
            tail_prompts=tuple(tail),
            conversations=count,
        )
