"""The KV pool: matching, sharing, eviction and its order, sessions, the books."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from conserve_serving.engines.content import Run, StreamPrompt
from conserve_serving.engines.errors import InvariantError
from conserve_serving.engines.kv import KvPool
from conserve_serving.engines.kv_audit import problems
from conserve_serving.engines.kv_nodes import Node

PAGE = 4


def prompt(*runs: Run) -> StreamPrompt:
    return StreamPrompt(runs, PAGE)


def stream(name: str, tokens: int) -> StreamPrompt:
    return prompt((name, 0, tokens))


def pool_of(tokens: int, host_tokens: int = 0, *, protect: bool = True) -> KvPool:
    return KvPool(
        capacity_tokens=tokens,
        host_capacity_tokens=host_tokens,
        page_tokens=PAGE,
        session_protection=protect,
    )


def fill(pool: KvPool, content: StreamPrompt, session: str | None = None) -> None:
    """Compute ``content`` as a request would, and leave it idle."""
    match = pool.match(content, content.tokens)
    pool.lock(match.node)
    pool.restore(match.node, ready_s=0.0)
    found = match.device_tokens + match.host_tokens
    pool.allocate(content.tokens - found)
    node = pool.insert(match.node, found, content, content.tokens, session)
    if session is not None:
        pool.sessions.reach(session, node)
    pool.unlock(node)
    assert problems(pool) == []


def cached(pool: KvPool, content: StreamPrompt) -> tuple[int, int]:
    match = pool.match(content, content.tokens)
    return match.device_tokens, match.host_tokens


def test_idle_kv_is_evictable_and_found_again() -> None:
    pool = pool_of(100)
    fill(pool, stream("a", 40))
    assert (pool.used_tokens, pool.evictable_tokens, pool.available_tokens) == (0, 40, 60)
    assert cached(pool, stream("a", 60)) == (40, 0)
    assert cached(pool, stream("b", 60)) == (0, 0)


def test_a_page_that_differs_anywhere_is_not_shared() -> None:
    pool = pool_of(100)
    fill(pool, prompt(("system", 0, 10), ("a", 0, 10)))
    assert cached(pool, prompt(("system", 0, 10), ("b", 0, 10))) == (8, 0)
    assert cached(pool, prompt(("system", 0, 10), ("a", 0, 6), ("b", 6, 4))) == (16, 0)
    fill(pool, prompt(("system", 0, 10), ("b", 0, 10)))
    assert pool.evictable_tokens == 20 + 12
    assert cached(pool, prompt(("system", 0, 10), ("b", 0, 10))) == (20, 0)


def test_growing_conversation_stays_one_node() -> None:
    pool = pool_of(1000)
    for tokens in range(100, 1000, 100):
        fill(pool, stream("a", tokens), None)
    (node,) = pool.root.children.values()
    assert not node.children
    assert node.tokens == 900


def test_pieces_are_joined_when_nothing_tells_them_apart() -> None:
    pool = pool_of(16_000, host_tokens=16_000)
    fill(pool, stream("a", 12_000))
    fill(pool, stream("b", 10_000))  # cuts a in two, half of it on the host
    fill(pool, stream("a", 12_000))
    assert len(pool.root.children) == 2
    assert sum(len(node.children) for node in pool.root.children.values()) >= 1
    assert cached(pool, stream("a", 12_000)) == (12_000, 0)  # looking joins them
    (joined,) = [node for node in pool.root.children.values() if node.tokens == 12_000]
    assert not joined.children
    assert problems(pool) == []


def test_duplicates_are_freed() -> None:
    pool = pool_of(100)
    content = stream("a", 40)
    first = pool.match(content, 40)
    for _ in range(2):  # two requests compute the same prompt at once
        pool.lock(first.node)
        pool.allocate(40)
    assert pool.used_tokens == 80
    one = pool.insert(first.node, 0, content, 40, None)
    two = pool.insert(first.node, 0, content, 40, None)
    assert one is two
    assert (pool.used_tokens, pool.private_tokens) == (40, 0)
    pool.unlock(one)
    assert pool.used_tokens == 40
    pool.unlock(two)
    assert (pool.used_tokens, pool.evictable_tokens) == (0, 40)
    assert problems(pool) == []


def test_least_recently_used_goes_to_the_host_then_is_dropped() -> None:
    pool = pool_of(100, host_tokens=40)
    for name in "ab":
        fill(pool, stream(name, 40))
    fill(pool, stream("a", 40))  # used again: b is now the older one
    fill(pool, stream("c", 40))
    assert cached(pool, stream("b", 40)) == (0, 40)
    assert pool.host_used_tokens == 40
    fill(pool, stream("d", 40))  # a goes to the host, where b makes room
    assert cached(pool, stream("a", 40)) == (0, 40)
    assert cached(pool, stream("b", 40)) == (0, 0)
    assert pool.dropped_tokens_total == 40


def test_large_leaves_give_up_their_tail_first() -> None:
    pool = pool_of(16_000, host_tokens=16_000)
    fill(pool, stream("a", 12_000))
    fill(pool, stream("b", 6_000))
    device, host = cached(pool, stream("a", 12_000))
    assert (device, host) == (6_000, 6_000)
    assert cached(pool, stream("b", 6_000)) == (6_000, 0)


def test_restoring_brings_the_host_part_back() -> None:
    pool = pool_of(100, host_tokens=100)
    fill(pool, stream("a", 60))
    fill(pool, stream("b", 80))
    assert cached(pool, stream("a", 60)) == (0, 60)
    match = pool.match(stream("a", 60), 60)
    pool.lock(match.node)
    assert pool.restore(match.node, ready_s=7.0) == 60
    assert (pool.used_tokens, pool.host_used_tokens) == (60, 80)
    assert pool.match(stream("a", 60), 60).ready_s == 7.0
    pool.unlock(match.node)
    assert problems(pool) == []


def test_open_sessions_are_evicted_last_but_not_pinned() -> None:
    pool = pool_of(120, host_tokens=200)
    for name in "ab":
        pool.sessions.open(name)
        fill(pool, stream(name, 40), name)
    fill(pool, stream("c", 40))  # newer, but nobody's
    fill(pool, stream("d", 40))
    assert cached(pool, stream("c", 40)) == (0, 40)
    assert cached(pool, stream("a", 40)) == (40, 0)
    match = pool.match(stream("d", 40), 40)
    pool.lock(match.node)
    fill(pool, stream("e", 40))  # nothing unprotected is left: the longest idle session goes
    assert cached(pool, stream("a", 40)) == (0, 40)
    assert cached(pool, stream("b", 40)) == (40, 0)
    pool.unlock(match.node)


def test_without_protection_sessions_are_like_everything_else() -> None:
    pool = pool_of(120, host_tokens=200, protect=False)
    pool.sessions.open("a")
    fill(pool, stream("a", 40), "a")
    fill(pool, stream("c", 40))
    fill(pool, stream("d", 80))
    assert cached(pool, stream("a", 40)) == (0, 40)


def test_closing_a_session_ends_its_protection() -> None:
    pool = pool_of(80, host_tokens=100)
    pool.sessions.open("a")
    fill(pool, stream("a", 40), "a")
    fill(pool, stream("b", 40))
    assert pool.sessions.close("a")
    assert not pool.sessions.close("a")
    fill(pool, stream("c", 40))
    assert cached(pool, stream("a", 40)) == (0, 40)
    assert problems(pool) == []


def test_allocating_beyond_the_room_is_a_bug_and_says_so() -> None:
    pool = pool_of(40)
    with pytest.raises(InvariantError, match="room_tokens"):
        pool.allocate(44)


class Books(RuleBasedStateMachine):
    """Random requests over random content; after every step the books are recounted."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(160, host_tokens=80)
        self.running: list[tuple[StreamPrompt, Node, int, int, str | None]] = []

    content = st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 1), st.integers(1, 40)),
        min_size=1,
        max_size=3,
    )
    session = st.sampled_from(["s", "t", None])

    @rule(runs=content, session=session)
    def begin(self, runs: list[tuple[str, int, int]], session: str | None) -> None:
        whole = prompt(*runs)
        end = whole.tokens - whole.tokens % PAGE
        match = self.pool.match(whole, end)
        self.pool.lock(match.node)
        found = match.device_tokens + match.host_tokens
        if end - found + match.host_tokens > self.pool.room_tokens:
            self.pool.unlock(match.node)
            return
        assert self.pool.restore(match.node, ready_s=0.0) == match.host_tokens
        self.pool.allocate(end - found)
        self.running.append((whole, match.node, found, end, session))

    @rule(which=st.integers(0, 9), kept=st.booleans())
    def finish(self, which: int, kept: bool) -> None:
        if not self.running:
            return
        whole, node, found, end, session = self.running.pop(which % len(self.running))
        if kept:
            node = self.pool.insert(node, found, whole, end, session)
            if session is not None:
                self.pool.sessions.reach(session, node)
        else:
            self.pool.release(end - found)
        self.pool.unlock(node)

    @rule(session=st.sampled_from(["s", "t"]))
    def open(self, session: str) -> None:
        self.pool.sessions.open(session)

    @rule(session=st.sampled_from(["s", "t"]), free=st.booleans())
    def close(self, session: str, free: bool) -> None:
        for leaf in self.pool.sessions.close(session) or ():
            if free and self.pool.drop(leaf):
                assert self.pool.drop(leaf)  # once more changes nothing

    @invariant()
    def books_add_up(self) -> None:
        pool = self.pool
        assert problems(pool) == []
        total = pool.used_tokens + pool.evictable_tokens + pool.available_tokens
        assert total == pool.capacity_tokens
        held = sum(end - found for _, _, found, end, _ in self.running)
        assert pool.private_tokens == held
        for whole, _, found, _, _ in self.running:  # a running request's KV is still there
            assert pool.match(whole, found).device_tokens == found

    def teardown(self) -> None:
        while self.running:
            self.finish(0, True)
        assert self.pool.used_tokens == 0
        assert problems(self.pool) == []


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBooks = Books.TestCase


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 30)), max_size=30))
def test_what_was_computed_last_and_fits_is_found(turns: list[tuple[str, int]]) -> None:
    pool = pool_of(128, host_tokens=64)
    for name, pages in turns:
        fill(pool, stream(name, pages * PAGE))
        assert cached(pool, stream(name, pages * PAGE)) == (pages * PAGE, 0)
