"""The journal's errors, and what every policy must keep to."""

from __future__ import annotations

import pytest
from chaos import LINK, SPEEDS, joined

from conserve_serving.core import SchedulerSettings, make_policy
from conserve_serving.core.errors import JournalError, UnknownPolicyError
from conserve_serving.core.journal import from_record, to_record
from conserve_serving.core.load import ObservedLoad
from conserve_serving.core.policies import POLICIES
from conserve_serving.core.state import ConversationState, EngineState, TurnState
from conserve_serving.core.types import ConversationId, Tier, TurnId


def test_a_nested_event_comes_back_equal() -> None:
    event = joined("d0", Tier.DECODE)
    assert event.speeds is SPEEDS
    assert event.link is LINK
    assert from_record(to_record(1.5, event, [])) == (1.5, event, [])


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"now_s": 1.0}, "is this a decision journal"),
        ({"now_s": 1.0, "event": {"kind": "Nonsense"}, "decisions": []}, "unknown kind 'Nonsense'"),
        ({"now_s": 1.0, "event": {"kind": "TimerFired", "x": 1}, "decisions": []}, "no field x"),
        ({"now_s": 1.0, "event": {"kind": "EngineLost", "epoch": 1}, "decisions": []}, "engine"),
    ],
)
def test_a_broken_record_says_what_is_wrong(record: dict[str, object], says: str) -> None:
    with pytest.raises(JournalError, match=says):
        from_record(record)


def test_an_unknown_policy_names_those_there_are() -> None:
    with pytest.raises(UnknownPolicyError, match=r"collocated, .*conserve, .*round_robin"):
        make_policy("best", SchedulerSettings())


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_policy_changes_nothing_and_repeats_itself(name: str) -> None:
    policy = make_policy(name, SchedulerSettings())
    decoder = EngineState(joined("d0"))
    prefiller = EngineState(joined("p0", Tier.PREFILL))
    conversation = ConversationState(ConversationId("c"), 0.0)
    turn = TurnState(
        TurnId("t"), conversation, prompt_tokens=5_000, reusable_tokens=None, max_output_tokens=None
    )

    def books(state: EngineState | TurnState) -> list[object]:
        return [getattr(state, slot) for slot in state.__slots__]

    load = ObservedLoad(256)
    before = books(decoder), books(prefiller), books(turn)
    choices = [
        (
            policy.hosts(decoder),
            policy.rank(decoder, load),
            policy.prefill_place(turn, decoder, prefiller, load),
            policy.tail_place(turn, decoder, prefiller, prefiller, load),
            policy.prefill_tier_hosts([decoder, prefiller], load, hosting=False),
        )
        for _ in range(3)
    ]
    assert choices[0] == choices[1] == choices[2]
    assert (books(decoder), books(prefiller), books(turn)) == before
    assert policy.prefill_place(turn, decoder, None, load).remote is False
