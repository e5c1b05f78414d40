"""Whatever happens, in whatever order: the books add up and every turn ends exactly once."""

from __future__ import annotations

import pytest
from chaos import Chaos
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conserve_serving.core import Scheduler, make_policy
from conserve_serving.core.journal import from_record, to_record
from conserve_serving.core.types import TierMode

OPERATIONS = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 31), st.integers(0, 40)), max_size=70
)
THOROUGH = settings(
    max_examples=700, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def run(policy: str, operations: list[tuple[int, int, int]], mode: TierMode) -> Chaos:
    chaos = Chaos(policy, tier_mode=mode)
    for index in range(3):
        chaos.join(f"{'pdd'[index]}{index}", 20 + index)
    for operation in operations:
        chaos.step(*operation)
    chaos.settle()
    return chaos


@pytest.mark.parametrize(
    ("policy", "mode"),
    [
        ("conserve", TierMode.DEDICATED),
        ("conserve", TierMode.HOSTING),
        ("collocated", TierMode.DEDICATED),
        ("round_robin", TierMode.DEDICATED),
    ],
)
@THOROUGH
@given(operations=OPERATIONS)
def test_every_turn_ends_once_and_nothing_leaks(
    policy: str, mode: TierMode, operations: list[tuple[int, int, int]]
) -> None:
    chaos = run(policy, operations, mode)
    assert chaos.outcomes.keys() == chaos.arrived.keys()
    scheduler = chaos.scheduler
    assert scheduler.live_turns == scheduler.waiting_turns == 0
    assert scheduler.open_conversations == 0
    for engine in scheduler.engines.values():
        assert engine.held_tokens == engine.parked_tokens == engine.active_tokens == 0
        assert engine.prefill_backlog_tokens == engine.conversations == 0
        assert not engine.idle
        assert not engine.waiting
        assert not engine.turns


@THOROUGH
@given(operations=OPERATIONS)
def test_a_second_transfer_always_has_its_own_reason(
    operations: list[tuple[int, int, int]],
) -> None:
    without_ends = [o for o in operations if o[0] not in (4, 5)]  # an id may be used again after
    chaos = Chaos("conserve")
    for index in range(3):
        chaos.join(f"{'pdd'[index]}{index}", 30)
    for operation in without_ends:
        chaos.step(*operation)
        for conversation, transfers in chaos.first_transfers.items():
            state = chaos.scheduler.conversation(conversation)
            assert transfers <= 1 or state is None or state.turns == 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(operations=OPERATIONS)
def test_a_journal_replays_to_the_same_decisions(operations: list[tuple[int, int, int]]) -> None:
    chaos = run("conserve", operations, TierMode.DEDICATED)
    fresh = Scheduler(chaos.scheduler.settings, make_policy("conserve", chaos.scheduler.settings))
    for now_s, event, decisions in chaos.log:
        record = to_record(now_s, event, decisions)
        assert from_record(record) == (now_s, event, decisions)
        assert fresh.handle(event, now_s=now_s) == decisions
