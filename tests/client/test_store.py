"""A store of conversations: bounded by number and by time, one object per key."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_agents import (
    ArgumentError,
    Conversation,
    ConversationIdError,
    ConversationStore,
    wire,
)

ASK: list[Any] = [{"role": "user", "content": "hi"}]
ANSWER = {"role": "assistant", "content": "hello"}


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_key_is_one_conversation_in_all_threads() -> None:
    store = ConversationStore()
    with ThreadPoolExecutor(8) as pool:
        talks = list(pool.map(store.get, ["chat"] * 64))
    assert len({id(talk) for talk in talks}) == 1
    assert talks[0].id == "chat" and "chat" in store and len(store) == 1
    assert store.get("naïve key").id == wire.safe_id("naïve key")
    with pytest.raises(ConversationIdError):
        store.get("")


def test_the_least_recently_used_is_forgotten_and_resumes_from_its_history() -> None:
    gone: list[str] = []
    store = ConversationStore(max_conversations=2, on_forget=lambda t: gone.extend(c.id for c in t))
    store.get("a").headers_for(ASK)
    store.get("b")
    store.get("a")
    store.get("c")
    assert gone == ["b"] and "a" in store and "b" not in store
    store.get("d")
    assert gone == ["b", "a"]
    tags = store.get("a").headers_for([*ASK, ANSWER, *ASK])
    assert (tags[wire.CONVERSATION_ID], tags[wire.TURN_INDEX]) == ("a", "2")


def test_idle_ones_are_forgotten() -> None:
    clock, gone = Clock(), list[str]()
    store = ConversationStore(
        max_idle_s=10, clock=clock, on_forget=lambda talks: gone.extend(t.id for t in talks)
    )
    for second, key in enumerate("abc"):
        clock.now_s = second
        store.get(key)
    clock.now_s = 11.5
    assert store.forget_idle() == 2
    assert gone == ["a", "b"] and len(store) == 1
    clock.now_s = 30
    store.get("d")
    assert gone == ["a", "b", "c"]
    assert store.forget_idle() == 0


def test_ending_ends_at_the_gateway_and_a_key_may_begin_again(server: Any) -> None:
    store = ConversationStore(make=lambda key: Conversation(key, gateway=server.base_url))
    for key in ("a", "b", "unused"):
        store.get(key)
    first = store.get("a")
    first.headers_for(ASK)
    store.get("b").headers_for(ASK)
    assert store.end("a", "never seen") == 1
    assert server.ended == ["a"] and store.get("a") is not first
    store.get("b").end()
    assert not store.get("b").ended  # ended by somebody else: begun again
    store.get("b").headers_for(ASK)
    assert store.end() == 1
    assert len(store) == 0


@pytest.mark.parametrize("bound", [{"max_conversations": 0}, {"max_idle_s": float("nan")}])
def test_bounds_must_make_sense(bound: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(bound))):
        ConversationStore(**bound)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=60))
def test_it_never_holds_more_than_its_bounds_and_never_loses_a_fresh_one(
    uses: list[tuple[int, int]],
) -> None:
    clock = Clock()
    store = ConversationStore(max_conversations=3, max_idle_s=15, clock=clock)
    model: dict[int, float] = {}
    for key, pause_s in uses:
        clock.now_s += pause_s
        store.get(f"k{key}")
        model = {k: at for k, at in model.items() if clock.now_s - at <= 15 and k != key}
        model[key] = clock.now_s
        model = dict(list(model.items())[-3:])
        assert len(store) == len(model)
        assert all(f"k{k}" in store for k in model)
