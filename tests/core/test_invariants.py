"""Whatever happens, in whatever order: the books add up and every turn ends exactly once."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from chaos import Chaos
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conserve_serving.core import Scheduler, make_policy
from conserve_serving.core.journal import from_record, to_record
from conserve_serving.core.types import Reason, TierMode, TransferReason

OPERATIONS = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 31), st.integers(0, 40)), max_size=70
)
THOROUGH = settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def run(
    policy: str,
    operations: list[tuple[int, int, int]],
    mode: TierMode,
    *,
    tight: bool = False,
    copies: bool = True,
) -> Chaos:
    chaos = Chaos(policy, tier_mode=mode, tight=tight, copies=copies)
    for index in range(3):
        chaos.join(f"{'pdd'[index]}{index}", 20 + index)
    for operation in operations:
        chaos.step(*operation)
    chaos.settle()
    return chaos


@pytest.mark.parametrize(
    ("policy", "mode", "tight"),
    [
        ("conserve", TierMode.DEDICATED, False),
        ("conserve", TierMode.DEDICATED, True),
        ("conserve", TierMode.HOSTING, False),
        ("conserve", TierMode.HOSTING, True),
        ("collocated", TierMode.DEDICATED, True),
        ("round_robin", TierMode.DEDICATED, True),
        ("collocated_speed_override", TierMode.DEDICATED, True),
        ("full_disaggregation", TierMode.DEDICATED, True),
        ("per_turn_50_wrong", TierMode.DEDICATED, False),
        ("conserve_plus", TierMode.AUTO, False),
        ("conserve_plus", TierMode.AUTO, True),
        ("oracle", TierMode.DEDICATED, True),
    ],
)
@THOROUGH
@given(operations=OPERATIONS, copies=st.booleans())
def test_every_turn_ends_once_and_nothing_leaks(
    policy: str, mode: TierMode, tight: bool, operations: list[tuple[int, int, int]], copies: bool
) -> None:
    chaos = run(policy, operations, mode, tight=tight, copies=copies)
    assert chaos.outcomes.keys() == chaos.arrived.keys()
    scheduler = chaos.scheduler
    assert scheduler.live_turns == scheduler.waiting_turns == 0
    assert scheduler.open_conversations == 0
    assert not chaos.kv
    for engine in scheduler.engines.values():
        assert engine.held_tokens == engine.parked_tokens == engine.active_tokens == 0
        assert engine.prefill_backlog_tokens == engine.conversations == 0
        assert not engine.idle
        assert not engine.waiting
        assert not engine.turns


def test_a_tight_cluster_goes_through_everything_that_shortage_brings() -> None:
    """Long runs from fixed seeds: what the short ones above may miss must have happened here."""
    totals: Counter[str] = Counter()
    for seed in range(60):
        draw = random.Random(seed)
        operations = [
            # Few engines lost and few conversations ended: shortage needs time to build up.
            (draw.choices(range(21), [1, 1, 1, 2, 3, 6, 2, 4] + [9] * 4 + [5] * 9)[0],
             draw.randrange(32), draw.randrange(41))
            for _ in range(220)
        ]  # fmt: skip
        mode = (TierMode.DEDICATED, TierMode.HOSTING)[seed % 2]
        counters = run("conserve", operations, mode, tight=True).scheduler.counters
        totals["parks"] += counters.parks
        totals.update({f"moved {reason}": n for reason, n in counters.moves.items()})
        totals.update({f"{reason}": n for reason, n in counters.holds.items()})
        totals.update({f"{reason}": n for reason, n in counters.rejections.items()})
        totals.update({f"{reason}": n for reason, n in counters.releases.items()})
    for what in (
        "parks",
        *(
            f"moved {reason}"
            for reason in TransferReason
            if reason not in (TransferReason.FIRST_TURN, TransferReason.APPEND, TransferReason.LOAD)
        ),
        Reason.HELD_NO_ROOM,
        Reason.HELD_BEHIND_FIRST_TURN,
        Reason.HELD_NO_ENGINE,
        Reason.HELD_TOO_LONG,
        Reason.QUEUE_FULL,
        Reason.PROMPT_TOO_LONG,
        Reason.CONVERSATION_MOVED,
        Reason.CONVERSATION_ENDED,
    ):
        assert totals[what], (what, totals)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(operations=OPERATIONS)
def test_a_journal_replays_to_the_same_decisions(operations: list[tuple[int, int, int]]) -> None:
    chaos = run("conserve", operations, TierMode.DEDICATED)
    fresh = Scheduler(chaos.scheduler.settings, make_policy("conserve", chaos.scheduler.settings))
    for now_s, event, decisions in chaos.log:
        record = to_record(now_s, event, decisions)
        assert from_record(record) == (now_s, event, decisions)
        assert fresh.handle(event, now_s=now_s) == decisions


@pytest.mark.parametrize("mode", list(TierMode))
def test_long_random_walks_in_a_tight_cluster(mode: TierMode) -> None:
    """Longer than what hypothesis draws: finds what needs many things to happen at once."""
    displaced = 0
    for seed in range(400):
        draw = random.Random(seed)
        chaos = Chaos("conserve", tier_mode=mode, tight=True)
        for index in range(3):
            chaos.join(f"{'pdd'[index]}{index}", 20 + index)
        for _ in range(60):
            chaos.step(draw.randint(0, 20), draw.randint(0, 31), draw.randint(0, 40))
        chaos.settle()
        assert chaos.outcomes.keys() == chaos.arrived.keys()
        displaced += chaos.scheduler.counters.releases[Reason.IDLE_DISPLACED]
    assert displaced > 0
