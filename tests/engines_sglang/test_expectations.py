"""A prompt is acknowledged exactly once: when its last page is written, and not before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.engines.sglang.expectations import (
    PARTIAL_PAGES,
    STORE_FULL,
    Expectations,
    Verdict,
)

KEYS = ["k1", "k2", "k3"]


class Store:
    def __init__(self, *keys: str) -> None:
        self.keys = set(keys)

    def __call__(self, key: str) -> bool:
        return key in self.keys


def test_pages_written_before_and_after_the_end_of_the_prefill() -> None:
    store = Store("k1")
    expected = Expectations(store, timeout_s=30.0)
    assert expected.expect("c", KEYS, since_s=1.0, now_s=1.0) == []
    assert expected.written(["k3", "other"], now_s=1.2) == []
    (verdict,) = expected.written(["k2"], now_s=1.5)
    assert verdict == Verdict(conversation="c", keys=tuple(KEYS), stored=3, duration_s=0.5)
    assert len(expected) == 0
    assert expected.written(["k2"], now_s=2.0) == []


def test_a_prompt_that_is_stored_already_is_told_at_once() -> None:
    expected = Expectations(Store(*KEYS), timeout_s=30.0)
    (verdict,) = expected.expect("c", KEYS, since_s=1.0, now_s=1.25)
    assert (verdict.error, verdict.stored, verdict.duration_s) == (None, 3, 0.25)


def test_two_conversations_with_one_prompt_are_both_told() -> None:
    expected = Expectations(Store(), timeout_s=30.0)
    expected.expect("a", KEYS, since_s=0.0, now_s=0.0)
    expected.expect("b", KEYS, since_s=0.0, now_s=0.0)
    told = expected.written(KEYS, now_s=1.0)
    assert [verdict.conversation for verdict in told] == ["a", "b"]


def test_a_full_store_says_how_far_it_got() -> None:
    expected = Expectations(Store("k1"), timeout_s=30.0)
    expected.expect("c", KEYS, since_s=0.0, now_s=0.0)
    expected.expect("other", ["k9"], since_s=0.0, now_s=0.0)
    (verdict,) = expected.failed(["k2", "k3"], STORE_FULL, now_s=1.0)
    assert (verdict.conversation, verdict.stored, verdict.error) == ("c", 1, STORE_FULL)
    assert len(expected) == 1


def test_a_prompt_is_given_up_in_the_end_unless_its_pages_came_another_way() -> None:
    store = Store()
    expected = Expectations(store, timeout_s=30.0)
    expected.expect("a", KEYS, since_s=0.0, now_s=0.0)
    expected.expect("b", ["k1"], since_s=0.0, now_s=0.0)
    assert expected.expire(now_s=29.9) == []
    store.keys.add("k1")  # written by another prefiller
    first, second = expected.expire(now_s=30.0)
    assert (first.conversation, first.stored, first.error) == ("a", 1, PARTIAL_PAGES)
    assert (second.conversation, second.stored, second.error) == ("b", 1, None)


@given(
    prompts=st.lists(st.lists(st.integers(0, 9), min_size=1, unique=True), max_size=6),
    writes=st.lists(st.integers(0, 9)),
    before=st.sets(st.integers(0, 9)),
)
def test_each_prompt_is_told_once_and_only_when_complete(
    prompts: list[list[int]], writes: list[int], before: set[int]
) -> None:
    there = set(before)
    expected = Expectations(lambda key: int(key) in there, timeout_s=10.0)
    told: list[Verdict] = []
    for index, prompt in enumerate(prompts):
        told += expected.expect(str(index), [str(n) for n in prompt], since_s=0.0, now_s=0.0)
    for number in writes:
        there.add(number)
        told += expected.written([str(number)], now_s=1.0)
        for verdict in told:
            assert {int(key) for key in verdict.keys} <= there
    told += expected.expire(now_s=10.0)
    assert sorted(int(verdict.conversation) for verdict in told) == list(range(len(prompts)))
    for verdict in told:
        complete = {int(key) for key in verdict.keys} <= there
        assert (verdict.error is None) == complete
        assert all(int(key) in there for key in verdict.keys[: verdict.stored])
