"""Who pays for which joule, on one engine. Joules of all intervals add up, always."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_serving.energy.errors import InvariantError
from conserve_serving.energy.ledger import Account
from conserve_serving.energy.work import Kind, Steps, Tally, Work

SOURCE = "measured: test"


def settle(account: Account, at_s: float, active_j: float, steps: Steps, **more: Any) -> None:
    fields: dict[str, Any] = {"idle_j": 0.0, "lost_j": 0.0, "by_the_clock": True, "source": SOURCE}
    account.settle(at_s, active_j=active_j, steps=steps, **(fields | more))
    account.check_invariants()


def work(account: Account, begin_s: float, tokens: int, **more: Any) -> Work:
    fields: dict[str, Any] = {"decodes": True, "streams": True}
    one = Work(Tally(), begin_s=begin_s, prefill_tokens=tokens, **(fields | more))
    account.begin(one)
    return one


def joules(one: Work) -> tuple[float, float]:
    return one.tally.prefill_j, one.tally.decode_j


def test_one_turn_pays_for_all_that_was_counted() -> None:
    account = Account(opened_s=0.0)
    turn = work(account, 0.1, 1000)
    turn.first_token(0.5)
    turn.facts(prefill_tokens=1000, output_tokens=61)
    turn.end(1.1)
    assert turn.tally.pending == 1
    steps = Steps(
        prefill_tokens=1000, prefill_s=0.4, decode_steps=60, decode_s=0.6, decode_batch_sum=60
    )
    settle(account, 2.0, 100.0, steps, idle_j=50.0)
    assert joules(turn) == pytest.approx((40.0, 60.0))
    assert (account.joules(Kind.IDLE), account.joules(Kind.UNATTRIBUTED)) == (50.0, 0.0)
    assert turn.tally.describe() == {
        "total_j": pytest.approx(100.0),
        "prefill_j": pytest.approx(40.0),
        "decode_j": pytest.approx(60.0),
        "source": SOURCE,
        "settled": True,
        "unknown_engines": [],
    }


def test_prompts_of_one_interval_pay_by_uncached_tokens() -> None:
    account = Account(opened_s=0.0)
    long, short = work(account, 0.1, 3000), work(account, 0.1, 1000)
    long.first_token(0.6)
    short.first_token(0.8)
    settle(account, 1.0, 80.0, Steps(prefill_tokens=4000, prefill_s=0.8))
    assert joules(long) == pytest.approx((60.0, 0.0))
    assert joules(short) == pytest.approx((20.0, 0.0))


def test_a_prompt_that_waits_behind_another_pays_nothing_yet() -> None:
    account = Account(opened_s=0.0)
    first, second = work(account, 0.0, 8000), work(account, 0.1, 8000)
    first.first_token(0.999)
    settle(account, 1.0, 110.0, Steps(prefill_tokens=8800, prefill_s=1.0))
    assert first.tally.prefill_j == pytest.approx(100.0)
    assert second.tally.prefill_j == 0.0
    assert account.pending_j == pytest.approx(10.0)  # 800 tokens of the second
    second.first_token(2.0)
    settle(account, 2.1, 100.0, Steps(prefill_tokens=7200, prefill_s=0.9))
    assert first.tally.prefill_j == pytest.approx(100.0)
    assert second.tally.prefill_j == pytest.approx(110.0)


def test_it_does_not_matter_in_which_order_an_engine_takes_prompts() -> None:
    account = Account(opened_s=0.0)
    long, short = work(account, 0.0, 8000), work(account, 0.1, 2000)
    short.first_token(0.9)  # it overtook
    settle(account, 1.0, 100.0, Steps(prefill_tokens=5000, prefill_s=1.0))
    assert short.tally.prefill_j == pytest.approx(40.0)
    long.first_token(2.0)
    settle(account, 2.0, 100.0, Steps(prefill_tokens=5000, prefill_s=1.0))
    assert long.tally.prefill_j == pytest.approx(160.0)


def test_turns_of_one_batch_pay_by_the_steps_they_took_part_in() -> None:
    account = Account(opened_s=0.0)
    there = work(account, -1.0, 10)
    there.first_token(0.0)
    joined = work(account, 0.4, 10)
    joined.first_token(0.5)
    steps = Steps(decode_steps=100, decode_s=1.0, decode_batch_sum=150)
    settle(account, 1.0, 90.0, steps)
    assert there.tally.decode_j == pytest.approx(60.0)
    assert joined.tally.decode_j == pytest.approx(30.0)


def test_decoding_in_a_part_of_the_interval_is_all_of_its_decoding() -> None:
    account = Account(opened_s=0.0)
    turn = work(account, 0.0, 10)
    turn.first_token(0.0)
    turn.facts(prefill_tokens=10, output_tokens=26)
    turn.end(0.25)
    settle(account, 1.0, 50.0, Steps(decode_steps=25, decode_s=0.25, decode_batch_sum=25))
    assert turn.tally.decode_j == pytest.approx(50.0)
    assert account.joules(Kind.UNATTRIBUTED) == pytest.approx(0.0)


def test_what_others_asked_of_the_engine_is_not_charged_to_us() -> None:
    account = Account(opened_s=0.0)
    turn = work(account, 0.0, 10)
    turn.first_token(0.1)
    settle(account, 0.1, 0.0, Steps(prefill_tokens=10, prefill_s=0.01))
    steps = Steps(
        prefill_tokens=5000,
        prefill_s=0.5,
        decode_steps=50,
        decode_s=0.5,
        decode_batch_sum=200,
    )
    settle(account, 1.0, 100.0, steps)
    assert joules(turn) == pytest.approx((0.0, 12.5))  # one of four requests in every step
    assert account.joules(Kind.UNATTRIBUTED) == pytest.approx(87.5)


def test_an_estimate_may_be_short_but_not_by_everything() -> None:
    account = Account(opened_s=0.0)
    guessed = work(account, 0.0, 1000)
    guessed.first_token(0.5)
    settle(account, 1.0, 40.0, Steps(prefill_tokens=4000, prefill_s=0.5))
    assert guessed.tally.prefill_j == pytest.approx(20.0)  # up to twice what was expected
    exact = work(account, 1.0, 1000)
    exact.first_token(1.4)
    exact.facts(prefill_tokens=1000, output_tokens=1)
    exact.end(1.5)
    settle(account, 2.0, 40.0, Steps(prefill_tokens=4000, prefill_s=0.5))
    assert exact.tally.prefill_j == pytest.approx(10.0)


def test_joules_of_a_step_under_way_wait_for_it() -> None:
    account = Account(opened_s=0.0)
    turn = work(account, 0.0, 16_000)
    settle(account, 0.5, 200.0, Steps())
    settle(account, 1.0, 200.0, Steps())
    assert turn.tally.prefill_j == 0.0
    assert account.pending_j == pytest.approx(400.0)
    turn.first_token(1.4)
    settle(account, 1.5, 200.0, Steps(prefill_tokens=16_000, prefill_s=1.4))
    assert turn.tally.prefill_j == pytest.approx(600.0)
    assert account.pending_j == 0.0


def test_neighbours_do_not_pay_for_a_prompt_under_way() -> None:
    account = Account(opened_s=0.0)
    decoding = work(account, -1.0, 10)
    decoding.first_token(0.0)
    prompt = work(account, 0.1, 16_000)
    # A tenth of the interval was decode; the rest is a step that has not ended.
    settle(account, 1.0, 100.0, Steps(decode_steps=10, decode_s=0.1, decode_batch_sum=10))
    assert decoding.tally.decode_j == pytest.approx(10.0)
    assert account.pending_j == pytest.approx(90.0)
    prompt.first_token(1.9)
    settle(account, 2.0, 100.0, Steps(prefill_tokens=16_000, prefill_s=1.8))
    assert prompt.tally.prefill_j == pytest.approx(190.0)


def test_a_step_counted_just_after_the_question_keeps_its_joules_waiting() -> None:
    account = Account(opened_s=0.0)
    decoding = work(account, -1.0, 10)
    decoding.first_token(0.0)
    prompt = work(account, 0.1, 16_000)
    prompt.first_token(1.001)  # before the answer, after the question
    settle(account, 1.0, 100.0, Steps(decode_steps=10, decode_s=0.1, decode_batch_sum=10))
    assert decoding.tally.decode_j == pytest.approx(10.0)
    settle(account, 2.0, 10.0, Steps(prefill_tokens=16_000, prefill_s=0.9))
    assert prompt.tally.prefill_j == pytest.approx(100.0)


def test_a_prompt_that_has_just_come_keeps_no_joules_waiting() -> None:
    account = Account(opened_s=0.0)
    decoding = work(account, -1.0, 10)
    decoding.first_token(0.0)
    decoding.facts(prefill_tokens=10, output_tokens=11)
    decoding.end(0.2)
    work(account, 0.999, 16_000)
    settle(account, 1.0, 30.0, Steps(decode_steps=10, decode_s=0.1, decode_batch_sum=10))
    assert decoding.tally.decode_j == pytest.approx(30.0, rel=0.02)


def test_joules_that_came_with_their_steps_wait_for_none() -> None:
    account = Account(opened_s=0.0)
    decoding = work(account, -1.0, 10)
    decoding.first_token(0.0)
    work(account, 0.1, 16_000)
    steps = Steps(decode_steps=10, decode_s=0.1, decode_batch_sum=10)
    settle(account, 1.0, 30.0, steps, by_the_clock=False)
    assert decoding.tally.decode_j == pytest.approx(30.0)
    assert account.pending_j == 0.0


def test_what_waits_for_a_turn_that_went_away_is_nobodys() -> None:
    account = Account(opened_s=0.0)
    turn = work(account, 0.0, 16_000)
    settle(account, 0.5, 200.0, Steps())
    turn.end(0.6)
    settle(account, 1.0, 10.0, Steps())
    assert (turn.tally.total_j, turn.tally.pending) == (0.0, 0)
    assert account.joules(Kind.UNATTRIBUTED) == pytest.approx(210.0)
    assert account.quiet


def test_a_lost_engine_leaves_nothing_open() -> None:
    account = Account(opened_s=0.0)
    turn = work(account, 0.0, 16_000)
    settle(account, 0.5, 200.0, Steps())
    account.abandon(0.7)
    account.check_invariants()
    assert turn.tally.pending == 0
    assert account.quiet
    turn.end(0.8)  # its request ends afterwards: nothing left to do
    settle(account, 1.0, 5.0, Steps())
    assert account.joules(Kind.UNATTRIBUTED) == pytest.approx(205.0)


def test_a_reply_in_one_piece_is_charged_for_both_phases() -> None:
    account = Account(opened_s=0.0)
    turn = work(account, 0.0, 1000, streams=False)
    steps = Steps(
        prefill_tokens=1000, prefill_s=0.2, decode_steps=80, decode_s=0.8, decode_batch_sum=80
    )
    settle(account, 1.0, 100.0, steps)
    assert joules(turn) == pytest.approx((20.0, 80.0))
    turn.facts(prefill_tokens=1000, output_tokens=131)
    turn.end(1.5)
    settle(account, 2.0, 50.0, Steps(decode_steps=50, decode_s=0.5, decode_batch_sum=50))
    assert joules(turn) == pytest.approx((20.0, 130.0))
    assert account.joules(Kind.UNATTRIBUTED) == pytest.approx(0.0)


def test_a_reply_in_one_piece_that_had_more_cached_than_thought_still_decodes() -> None:
    account = Account(opened_s=0.0)
    turn = work(account, 0.0, 5000, streams=False)
    settle(account, 1.0, 20.0, Steps(prefill_tokens=1000, prefill_s=0.2), by_the_clock=False)
    settle(account, 2.0, 100.0, Steps(decode_steps=90, decode_s=1.0, decode_batch_sum=90))
    assert joules(turn) == pytest.approx((20.0, 100.0))


def test_facts_that_come_late_change_nothing_that_was_settled() -> None:
    account = Account(opened_s=0.0)
    turn = work(account, 0.0, 1000)
    turn.first_token(0.5)
    settle(account, 1.0, 50.0, Steps(prefill_tokens=1100, prefill_s=0.5))
    before = joules(turn)
    turn.facts(prefill_tokens=1100, output_tokens=11)
    turn.end(1.5)
    settle(account, 2.0, 10.0, Steps(decode_steps=10, decode_s=0.1, decode_batch_sum=10))
    assert turn.tally.prefill_j == before[0] == pytest.approx(50.0)
    assert turn.tally.decode_j == pytest.approx(10.0)


def test_a_prefill_for_a_hand_off_is_no_decode() -> None:
    account = Account(opened_s=0.0)
    turn = work(account, 0.0, 1000, decodes=False, streams=False)
    turn.facts(prefill_tokens=1000, output_tokens=0)
    turn.end(0.5)
    steps = Steps(
        prefill_tokens=1000, prefill_s=0.5, decode_steps=10, decode_s=0.5, decode_batch_sum=10
    )
    settle(account, 1.0, 100.0, steps)
    assert joules(turn) == pytest.approx((50.0, 0.0))
    assert account.joules(Kind.UNATTRIBUTED) == pytest.approx(50.0)


def test_weights_decide_between_the_phases() -> None:
    account = Account(opened_s=0.0)
    account.weights = lambda _: (3.0, 1.0)
    turn = work(account, 0.0, 1000)
    turn.first_token(0.5)
    steps = Steps(
        prefill_tokens=1000, prefill_s=0.5, decode_steps=50, decode_s=0.5, decode_batch_sum=50
    )
    settle(account, 1.0, 100.0, steps)
    assert joules(turn) == pytest.approx((75.0, 25.0))


def test_a_conversation_is_the_sum_of_its_turns() -> None:
    account, whole = Account(opened_s=0.0), Tally()
    assert whole.describe() is None
    for at_s in (1.0, 2.0):
        turn = Work(
            Tally(whole), begin_s=at_s - 0.9, prefill_tokens=100, decodes=True, streams=True
        )
        account.begin(turn)
        turn.first_token(at_s - 0.5)
        turn.end(at_s - 0.1)
        source = f"measured: {at_s:g}"
        settle(account, at_s, 30.0, Steps(prefill_tokens=100, prefill_s=0.4), source=source)
    other = Tally(whole)
    other.miss("d7")
    described = whole.describe()
    assert described is not None
    assert described["total_j"] == pytest.approx(60.0)
    assert described["source"] == "measured: 1; measured: 2"
    assert described["unknown_engines"] == ["d7"]
    assert other.describe() == {
        "total_j": None,
        "prefill_j": None,
        "decode_j": None,
        "source": None,
        "settled": True,
        "unknown_engines": ["d7"],
    }


def test_lost_joules_are_found_out() -> None:
    account = Account(opened_s=0.0)
    account.total_j = 5.0
    with pytest.raises(InvariantError, match="5"):
        account.check_invariants()


_seconds = st.floats(min_value=0.0, max_value=3.0)
_joules = st.floats(min_value=0.0, max_value=1e6)
_tokens = st.integers(min_value=0, max_value=50_000)
_steps = st.builds(
    Steps,
    prefill_tokens=_tokens,
    prefill_s=_seconds,
    decode_steps=st.integers(min_value=0, max_value=1000),
    decode_s=_seconds,
    decode_batch_sum=st.floats(min_value=0.0, max_value=1e5),
)
_which = st.integers(min_value=0, max_value=5)
_events = st.one_of(
    st.tuples(st.just("begin"), _tokens, st.booleans(), st.booleans()),
    st.tuples(st.just("first_token"), _which),
    st.tuples(st.just("end"), _which, st.none() | st.tuples(_tokens, _tokens)),
    st.tuples(st.just("settle"), _steps, _joules, _joules, _joules, st.booleans(), st.booleans()),
    st.tuples(st.just("abandon")),
)


@settings(max_examples=150, deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(_seconds, _events), max_size=40))
def test_whatever_happens_every_joule_is_somewhere_once(history: list[tuple[float, Any]]) -> None:
    account = Account(opened_s=0.0)
    whole, works, now_s, given_j = Tally(), [], 0.0, []
    account.weights = lambda steps: (1.0 + steps.prefill_s, 2.0)

    def check() -> None:
        account.check_invariants()
        assert account.total_j == pytest.approx(math.fsum(given_j), rel=1e-9)
        turns_j = math.fsum(one.tally.total_j for one in works)
        idle_j, lost_j = account.joules(Kind.IDLE), account.joules(Kind.UNATTRIBUTED)
        parts = math.fsum([turns_j, idle_j, lost_j, account.pending_j])
        assert parts == pytest.approx(account.total_j, rel=1e-9, abs=1e-9)
        assert whole.total_j == pytest.approx(turns_j, rel=1e-9, abs=1e-9)
        for one in works:
            assert one.tally.prefill_j >= 0.0 and one.tally.decode_j >= 0.0

    for wait_s, event in history:
        now_s += wait_s
        match event:
            case ("begin", tokens, decodes, streams):
                one = Work(
                    Tally(whole),
                    begin_s=now_s,
                    prefill_tokens=tokens,
                    decodes=decodes,
                    streams=streams,
                )
                works.append(one)
                account.begin(one)
            case ("first_token", number) if number < len(works):
                works[-1 - number].first_token(now_s)
            case ("end", number, facts) if number < len(works):
                if facts is not None:
                    works[-1 - number].facts(prefill_tokens=facts[0], output_tokens=facts[1])
                works[-1 - number].end(now_s)
            case ("settle", steps, idle_j, active_j, lost_j, by_the_clock, other):
                given_j += [idle_j, active_j, lost_j]
                account.settle(
                    now_s,
                    idle_j=idle_j,
                    active_j=active_j,
                    lost_j=lost_j,
                    steps=steps,
                    by_the_clock=by_the_clock,
                    source="measured" if other else "modelled",
                )
                check()
            case ("abandon",):
                account.abandon(now_s)
                check()
    for one in works:
        one.end(now_s)
    account.settle(
        now_s, idle_j=0, active_j=0, lost_j=0, steps=Steps(), source="x", by_the_clock=True
    )
    check()
    assert account.quiet and whole.pending == 0
