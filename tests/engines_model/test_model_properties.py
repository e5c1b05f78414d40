"""Whatever is asked of a small engine, and whenever: its books add up and everything ends."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_serving.engines.content import StreamPrompt
from conserve_serving.engines.kv_audit import problems
from conserve_serving.engines.model import EngineModel
from conserve_serving.engines.model_types import (
    ModelConfig,
    ModelEvent,
    ModelRequest,
    PagesStored,
    PrefillDone,
    RequestFinished,
    Retracted,
    TokensEmitted,
)
from conserve_serving.engines.profile import load_profile

PAGE = 16
CAPACITY = 1_024
H100 = load_profile("h100-qwen3-8b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of a random workload."""

    at_s: float
    conversation: int
    prompt_tokens: int
    output_tokens: int
    priority: int
    stored_tokens: int
    in_session: bool
    max_output_tokens: int | None
    abort_after_s: float | None


asks = st.lists(
    st.builds(
        Ask,
        at_s=st.floats(0.0, 0.4),
        conversation=st.integers(0, 4),
        prompt_tokens=st.integers(1, 600),
        output_tokens=st.integers(0, 300),
        priority=st.integers(0, 2),
        stored_tokens=st.sampled_from([0, 0, 128, 512]),
        in_session=st.booleans(),
        max_output_tokens=st.sampled_from([None, 50, 5_000]),
        abort_after_s=st.one_of(st.none(), st.floats(0.0, 0.5)),
    ),
    min_size=1,
    max_size=25,
)
configs = st.builds(
    ModelConfig,
    page_tokens=st.just(PAGE),
    kv_capacity_tokens=st.just(CAPACITY),
    host_capacity_tokens=st.sampled_from([0, 256, 2_048]),
    max_running_requests=st.sampled_from([1, 3, 64]),
    chunk_tokens=st.sampled_from([32, 256]),
    output_reserve_ratio=st.sampled_from([0.0, 0.3, 1.0]),
    store_writes=st.booleans(),
    store_read_min_tokens=st.just(64),
    chunked_first=st.booleans(),
)


def crowd(seed: int) -> tuple[ModelConfig, list[Ask]]:
    """A workload that is far too much for the engine: everything is evicted, retracted, aborted."""
    dice = random.Random(seed)
    config = ModelConfig(
        page_tokens=PAGE,
        kv_capacity_tokens=CAPACITY,
        host_capacity_tokens=dice.choice([0, 512, 2_048]),
        max_running_requests=dice.choice([4, 64]),
        chunk_tokens=dice.choice([32, 256]),
        output_reserve_ratio=dice.choice([0.0, 0.2, 1.0]),
        store_writes=dice.random() < 0.5,
        store_read_min_tokens=64,
        chunked_first=dice.random() < 0.5,
    )
    return config, [
        Ask(
            at_s=dice.uniform(0.0, 1.5),
            conversation=dice.randrange(6),
            prompt_tokens=dice.randrange(1, 500),
            output_tokens=dice.choice([0, 1, dice.randrange(2, 400)]),
            priority=dice.randrange(3),
            stored_tokens=dice.choice([0, 0, 256]),
            in_session=dice.random() < 0.5,
            max_output_tokens=dice.choice([None, 50, 5_000]),
            abort_after_s=dice.uniform(0.0, 1.0) if dice.random() < 0.2 else None,
        )
        for _ in range(40)
    ]


@dataclass(slots=True)
class Result:
    """What a run left behind."""

    events: list[ModelEvent] = field(default_factory=list)
    aborted: set[str] = field(default_factory=set)
    end_s: float = 0.0
    energy_j: float = 0.0


def run(config: ModelConfig, wanted: list[Ask], *, burst: bool, audit: bool) -> Result:
    """Play a workload to its end, checking the books at every step."""
    model = EngineModel(H100, config)
    result = Result()
    todo: list[tuple[float, int, str, Ask]] = []
    for i, ask in enumerate(wanted):
        todo.append((ask.at_s, i, "submit", ask))
        if ask.abort_after_s is not None:
            todo.append((ask.at_s + ask.abort_after_s, i, "abort", ask))
    todo.sort(key=lambda item: (item[0], item[2] == "abort", item[1]))
    now_s = 0.0
    for _ in range(200_000):
        while todo and todo[0][0] <= now_s:
            at_s, i, what, ask = todo.pop(0)
            if what == "abort":
                if model.abort(str(i), now_s=at_s):
                    result.aborted.add(str(i))
                continue
            name = ask.conversation
            whole = ask.prompt_tokens + ask.output_tokens
            session = f"s{name}" if ask.in_session else None
            model.submit(
                ModelRequest(
                    rid=str(i),
                    prompt=StreamPrompt([(name, 0, ask.prompt_tokens)], PAGE),
                    context=StreamPrompt([(name, 0, whole)], PAGE),
                    output_tokens=ask.output_tokens,
                    max_output_tokens=ask.max_output_tokens,
                    prefill_only=not ask.output_tokens,
                    priority=ask.priority,
                    stored_tokens=min(ask.stored_tokens, ask.prompt_tokens),
                    session_id=session,
                ),
                now_s=at_s,
            )
            if i % 7 == 3 and session is not None:
                model.close_session(session, now_s=at_s)
                if i % 2:
                    model.free_session(session, now_s=at_s)
        next_s = todo[0][0] if todo else 1e9
        step = model.begin_step(now_s=now_s, until_s=next_s if burst else None)
        if audit:
            check(model)
        if step is None:
            wake_s = model.wake_at_s()
            if wake_s is None and not todo:
                break
            now_s = min(next_s, wake_s or 1e9)
            result.events += model.poll(now_s=now_s)
            continue
        assert step.duration_s > 0
        now_s = step.end_s
        result.events += model.end_step(now_s=now_s)
        if audit:
            check(model)
    else:
        raise AssertionError("the model does not come to rest")
    stats = model.stats()
    check(model)
    assert (stats.used_tokens, stats.running, stats.queued, stats.loading) == (0, 0, 0, 0)
    assert stats.queued_tokens == 0
    result.end_s, result.energy_j = stats.now_s, stats.energy.total_j
    return result


def check(model: EngineModel) -> None:
    stats = model.stats()
    assert problems(model.pool) == []
    assert min(stats.used_tokens, stats.evictable_tokens, stats.available_tokens) >= 0
    total = stats.used_tokens + stats.evictable_tokens + stats.available_tokens
    assert total == stats.capacity_tokens
    assert stats.host_used_tokens <= stats.host_capacity_tokens


@settings(max_examples=50, deadline=None)
@given(configs, asks)
def test_every_request_ends_and_nothing_leaks(config: ModelConfig, wanted: list[Ask]) -> None:
    every_request_ends(config, wanted)


def test_every_request_of_a_crowd_ends_too() -> None:
    seen: Counter[str] = Counter()
    for seed in range(25):
        for event in every_request_ends(*crowd(seed)).events:
            seen[type(event).__name__] += 1
            if isinstance(event, PrefillDone):
                seen["host hits"] += event.cached_host_tokens > 0
                seen["store hits"] += event.cached_storage_tokens > 0
    assert min(seen["Retracted"], seen["host hits"], seen["store hits"]) >= 20, seen


def every_request_ends(config: ModelConfig, wanted: list[Ask]) -> Result:
    result = run(config, wanted, burst=False, audit=True)
    finished = [e for e in result.events if isinstance(e, RequestFinished)]
    assert {e.rid for e in finished} | result.aborted == {str(i) for i in range(len(wanted))}
    assert len(finished) + len(result.aborted) == len(wanted)
    emitted = dict.fromkeys(map(str, range(len(wanted))), 0)
    for event in result.events:
        if isinstance(event, TokensEmitted):
            for rid in event.rids:
                emitted[rid] += event.count
    for done in finished:
        ask = wanted[int(done.rid)]
        assert (done.prompt_tokens, done.output_tokens) == (ask.prompt_tokens, ask.output_tokens)
        assert emitted[done.rid] == ask.output_tokens
        assert 0 <= done.cached_tokens < ask.prompt_tokens
    prefilled = [e.rid for e in result.events if isinstance(e, PrefillDone)]
    assert len(prefilled) == len(set(prefilled))
    stored = [e.rid for e in result.events if isinstance(e, PagesStored)]
    assert sorted(stored) == sorted(prefilled if config.store_writes else [])
    if config.output_reserve_ratio == 1.0:
        assert not any(isinstance(e, Retracted) for e in result.events)
    return result


def comparable(events: list[ModelEvent]) -> list[tuple[str, str, float]]:
    kinds = (PrefillDone, RequestFinished, PagesStored, Retracted)
    return sorted(
        (type(e).__name__, e.rid, round(e.at_s, 6)) for e in events if isinstance(e, kinds)
    )


@settings(max_examples=30, deadline=None)
@given(configs, asks)
def test_bursts_change_nothing_but_the_number_of_calls(
    config: ModelConfig, wanted: list[Ask]
) -> None:
    bursts_change_nothing(config, wanted)


@pytest.mark.parametrize("seed", range(12))
def test_bursts_change_nothing_in_a_crowd(seed: int) -> None:
    bursts_change_nothing(*crowd(seed))


def bursts_change_nothing(config: ModelConfig, wanted: list[Ask]) -> None:
    single = run(config, wanted, burst=False, audit=False)
    together = run(config, wanted, burst=True, audit=False)
    assert comparable(together.events) == comparable(single.events)
    assert together.aborted == single.aborted
    assert abs(together.energy_j - single.energy_j) <= 1e-6 * single.energy_j


@settings(max_examples=20, deadline=None)
@given(configs, asks)
def test_equal_calls_give_equal_results(config: ModelConfig, wanted: list[Ask]) -> None:
    first = run(config, wanted, burst=True, audit=False)
    second = run(config, wanted, burst=True, audit=False)
    assert first == second
