"""Checks that a finished run's figures add up. Every run makes them; they cost nothing.

=====================  =============================================================================
turns                  every turn that arrived was closed, exactly once; every conversation ended
prompt_tokens          on every engine: tokens of the prompts completed = cached + computed, less
                       what was computed twice or for nothing
output_tokens          outputs of the requests finished on an engine = tokens its steps generated;
                       over all engines, those of the turns that ended well = what they asked for
kv                     no engine holds KV, requests or sessions of anybody any more
books                  the scheduler's books are empty, too
time                   every engine's steps and idle time = the time it was there
energy                 every engine's joules by state = its seconds by state under its power model
=====================  =============================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from conserve_serving.core.types import EngineId
from conserve_serving.engines.power import PowerModel, reprice
from conserve_serving.simulator.errors import ConservationError
from conserve_serving.simulator.summary import EngineUse, RunSummary

#: Sums of many floats differ in their last digits by the order in which they were added.
_RELATIVE = 1e-6
_ABSOLUTE = 1e-6


def check_conservation(summary: RunSummary, powers: Mapping[EngineId, PowerModel]) -> None:
    """See the module's table.

    Args:
        summary: of a run that has ended.
        powers: the power model each engine ran with.

    Raises:
        ConservationError: a check failed; its ``check`` is the name in the table.
    """
    for check, what in _problems(summary, powers):
        raise ConservationError(check, what)


def _problems(
    summary: RunSummary, powers: Mapping[EngineId, PowerModel]
) -> Iterator[tuple[str, str]]:
    if summary.turns != summary.arrived_turns:
        yield "turns", f"{summary.arrived_turns} arrived and {summary.turns} were closed"
    if summary.conversations != summary.ended_conversations:
        yield (
            "turns",
            f"of {summary.conversations} conversations {summary.ended_conversations} ended",
        )
    whole = all(not use.lost for use in summary.engines.values())
    output = sum(use.output_tokens for use in summary.engines.values())
    if whole and output != summary.output_tokens:
        yield (
            "output_tokens",
            f"turns that ended well asked for {summary.output_tokens}, engines gave {output}",
        )
    for engine_id, use in summary.engines.items():
        for check, what in _engine_problems(use, powers[engine_id]):
            yield check, f"{engine_id}: {what}"
    for name in ("booked_tokens", "booked_turns", "booked_conversations"):
        if getattr(summary, name):
            yield "books", f"{name} is {getattr(summary, name)} at the end"


def _engine_problems(use: EngineUse, power: PowerModel) -> Iterator[tuple[str, str]]:
    priced = reprice(use.seconds, power)
    for part in ("idle_j", "prefill_j", "decode_j", "mixed_j"):
        counted, expected = getattr(use.energy, part), getattr(priced, part)
        if not _close(counted, expected):
            yield "energy", f"{part} is {counted}, its seconds say {expected}"
    if use.lost:
        return  # what was under way when it was lost was counted by nobody
    computed = use.prefill_tokens - use.recomputed_tokens - use.abandoned_tokens
    if use.asked_tokens != use.cached_tokens + computed:
        yield (
            "prompt_tokens",
            f"prompts of {use.asked_tokens}, {use.cached_tokens} cached, {computed} computed",
        )
    made = use.decode_tokens + use.first_tokens - use.abandoned_output_tokens
    if use.output_tokens != made:
        yield "output_tokens", f"finished requests had {use.output_tokens}, steps made {made}"
    for name in ("left_used_tokens", "left_requests", "left_sessions"):
        if getattr(use, name):
            yield "kv", f"{name} is {getattr(use, name)} at the end"
    if not _close(use.seconds.total_s, use.alive_s):
        yield "time", f"{use.seconds.total_s} s of steps and idle time in {use.alive_s} s"


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
