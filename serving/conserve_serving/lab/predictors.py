"""Predictors: what a policy is told of a turn's output before it runs.

They write ``SimulatedTurn.predicted_output_tokens``; engines never read it. Equal seeds give equal
predictions, conversation by conversation, whatever the policy or the rate.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from conserve_serving.replay.conversations import Conversation
from conserve_serving.simulator.conversation import SimulatedConversation, SimulatedTurn

#: Spread σ of the realistic predictor's log-normal noise. The noise alone gives a mean absolute
#: error of 2·(2·Φ(σ/2) − 1) = 43 % of the mean, which is what a learned predictor shows on
#: LMSYS-Chat-1M: MAE 93.4 tokens (arXiv 2604.07931) of a mean answer of 214.5 (arXiv 2309.11998).
NOISE_SIGMA: Final = 0.55

#: What the biased predictor makes of the truth.
BIAS: Final = 0.5


class MeanByTurn:
    """Mean output length by turn index.

    Args:
        training: conversations to learn from, at least one.
    """

    def __init__(self, training: Sequence[Conversation]) -> None:
        totals: list[int] = []
        counts: list[int] = []
        for conversation in training:
            for index, turn in enumerate(conversation.turns):
                if index == len(totals):
                    totals.append(0)
                    counts.append(0)
                totals[index] += turn.output_tokens
                counts[index] += 1
        self._means = [total / count for total, count in zip(totals, counts, strict=True)]

    def __getitem__(self, index: int) -> float:
        """Mean at a turn index (0 is the first); beyond the longest, that of the last."""
        return self._means[min(index, len(self._means) - 1)]


def foretell(
    conversations: Iterable[SimulatedConversation],
    predictor: str,
    *,
    training: Sequence[Conversation],
    seed: int,
) -> Iterator[SimulatedConversation]:
    """The same conversations with what ``predictor`` says of them; lazily.

    Args:
        conversations: as drawn from a workload.
        predictor: one of ``contenders.PREDICTORS``.
        training: what the realistic predictor has seen: the workload's ``tune`` half.
        seed: of its noise.
    """
    if predictor == "none":
        yield from conversations
        return
    means = MeanByTurn(training) if predictor == "realistic" else None
    for conversation in conversations:
        turns = conversation.turns
        if means is not None:
            told = _noisy(means, conversation, seed)
        elif predictor == "biased":
            told = [max(1, round(BIAS * turn.output_tokens)) for turn in turns]
        else:
            told = [turn.output_tokens for turn in turns]
        yield replace(
            conversation,
            turns=tuple(_told(turn, tokens) for turn, tokens in zip(turns, told, strict=True)),
            foreseen_tokens=_all_kv(turns) if predictor == "oracle" else None,
        )


def _noisy(means: MeanByTurn, conversation: SimulatedConversation, seed: int) -> list[int]:
    # A workload's noise, not a secret; by the name of the conversation, so by nothing else.
    rng = random.Random(f"{seed}/predictor/{conversation.id}")  # noqa: S311
    shift = -(NOISE_SIGMA**2) / 2  # the noise has mean 1
    return [
        max(1, round(means[index] * rng.lognormvariate(shift, NOISE_SIGMA)))
        for index in range(len(conversation.turns))
    ]


def _told(turn: SimulatedTurn, tokens: int) -> SimulatedTurn:
    return replace(turn, predicted_output_tokens=tokens)


def _all_kv(turns: Sequence[SimulatedTurn]) -> int:
    return max(turn.prompt_tokens + turn.output_tokens for turn in turns)
