"""Sample workloads: conversations drawn from statistics of real traces.

What is reproduced and what is not: ``docs/workloads.md``. Where the statistics come from and how
they hang together: :mod:`conserve_serving.replay.recipes`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.replay.errors import TraceError
from conserve_serving.replay.recipes import (
    Quantiles,
    Recipe,
    Resets,
    correlated,
    normal_cdf,
    recipes,
)

__all__ = ["Quantiles", "Recipe", "generate", "recipes"]


def generate(workload: str, *, conversations: int, seed: int) -> tuple[Conversation, ...]:
    """Sample conversations of a named workload.

    Args:
        workload: a name of :func:`~conserve_serving.replay.recipes.recipes`.
        conversations: how many.
        seed: equal seeds give equal conversations; the first n of a larger sample are the sample
            of n.

    Raises:
        TraceError: there is no such workload.
    """
    recipe = recipes().get(workload)
    if recipe is None:
        raise TraceError(
            f"no workload {workload!r} to generate. There are: {', '.join(sorted(recipes()))}."
        )
    return tuple(_conversation(recipe, index, seed) for index in range(conversations))


def _conversation(recipe: Recipe, index: int, seed: int) -> Conversation:
    rng = random.Random(f"{seed}/{recipe.name}/{index}")  # noqa: S311 - a workload, not a secret
    length, first, *factors = correlated(rng, recipe.factors)
    turns: list[Turn] = []
    first_input = max(1, round(recipe.first_input.at(normal_cdf(first))))
    prefix_tokens, prefix_name = _prefix(recipe, first_input, index, rng)
    histories = None if recipe.resets is None else _Histories(recipe.resets, prefix_tokens, rng)
    for number in range(1, max(1, round(recipe.turns.at(normal_cdf(length)))) + 1):
        new, output, gap_s = _draw(recipe, number, factors, rng)
        context = turns[-1].context_tokens if turns else 0
        kept, new = (context, new) if turns else (0, first_input)
        if turns and histories is not None:
            kept, new = histories.next(context, new, gap_s)
        turn = Turn(
            input_tokens=kept + new, new_input_tokens=new, output_tokens=output, gap_s=gap_s
        )
        limit = recipe.max_context_tokens
        if turns and limit is not None and turn.context_tokens > limit:
            break
        turns.append(turn)
    return Conversation(
        id=f"{recipe.name}-{index}",
        turns=tuple(turns),
        shared_prefix_tokens=prefix_tokens,
        shared_prefix_name=prefix_name,
    )


def _prefix(recipe: Recipe, first_input: int, index: int, rng: random.Random) -> tuple[int, str]:
    """One of the prefixes that the first prompt has room for.

    What a single conversation of the trace began with stays a single one's, as often as it is
    drawn: samples of any size share as much as the trace.
    """
    fitting = [(which, p) for which, p in enumerate(recipe.prefixes) if p[0] < first_input]
    if not fitting:
        return 0, ""
    ((which, (tokens, count)),) = rng.choices(fitting, [count for _, (_, count) in fitting])
    owner = f"own-{index}" if count == 1 else f"{which}"
    return tokens, f"{recipe.name}/{owner}/{tokens} tokens"


def _draw(
    recipe: Recipe, number: int, factors: Sequence[float], rng: random.Random
) -> tuple[int, int, float]:
    """Appended tokens, answer and gap of a turn; the first appends nothing and has no gap."""
    mine = correlated(rng, recipe.within)
    appended, output, gap = zip(factors, mine, strict=True)
    new, gap_s = 1.0, 0.0
    if number > 1:
        new = recipe.appended.at(number, recipe.appended.alikeness.score(*appended))
        if recipe.gap_s is not None:
            gap_s = recipe.gap_s.at(number, recipe.gap_s.alikeness.score(*gap))
    if recipe.max_gap_s is not None:
        gap_s = min(gap_s, recipe.max_gap_s)
    answer = recipe.output.at(number, recipe.output.alikeness.score(*output))
    return max(1, round(new)), max(1, round(answer)), gap_s


class _Histories:
    """What a conversation that is reset at times keeps of its history."""

    def __init__(self, resets: Resets, prefix_tokens: int, rng: random.Random) -> None:
        self._resets = resets
        self._prefix_tokens = prefix_tokens
        self._rng = rng
        self._compact_at = resets.compact_at.draw(rng)

    def next(self, context: int, new: int, gap_s: float) -> tuple[int, int]:
        """Kept and new tokens of the next prompt.

        Args:
            context: tokens of the conversation so far.
            new: tokens that the prompt appends to them.
            gap_s: delay before it.
        """
        rewritten = self._rng.random() < self._resets.rewrite_probability(gap_s)
        tokens = context + new
        if tokens > self._compact_at:
            self._compact_at = self._resets.compact_at.draw(self._rng)
            left = round(context * self._resets.compacted_share.draw(self._rng))
            tokens = min(tokens, max(self._prefix_tokens, left) + new)
        elif not rewritten:
            return context, new
        kept = min(self._prefix_tokens, tokens - 1)
        return kept, tokens - kept
