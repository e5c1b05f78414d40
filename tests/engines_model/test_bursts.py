"""Decode steps that run together, cut short by what happens in their midst: as single steps."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_serving.engines.content import StreamPrompt
from conserve_serving.engines.kv_audit import problems
from conserve_serving.engines.model import EngineModel
from conserve_serving.engines.model_types import (
    ModelConfig,
    ModelRequest,
    ModelStats,
    PagesStored,
    PrefillDone,
    RequestFinished,
    Retracted,
)
from conserve_serving.engines.power import reprice
from conserve_serving.engines.profile import load_profile

PAGE = 16
H100 = load_profile("h100-qwen3-8b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """Something a driver does at a time of its own: in the midst of steps, mostly."""

    at_s: float
    what: str
    conversation: int
    prompt_tokens: int
    output_tokens: int
    priority: int
    stored_tokens: int


acts = st.lists(
    st.builds(
        Act,
        at_s=st.floats(0.0, 3.0),
        what=st.sampled_from(["submit", "submit", "submit", "abort", "close", "read"]),
        conversation=st.integers(0, 5),
        prompt_tokens=st.integers(1, 500),
        output_tokens=st.integers(0, 400),
        priority=st.integers(0, 2),
        stored_tokens=st.sampled_from([0, 0, 128]),
    ),
    min_size=1,
    max_size=30,
)
configs = st.builds(
    ModelConfig,
    page_tokens=st.just(PAGE),
    kv_capacity_tokens=st.sampled_from([1_024, 4_096]),
    host_capacity_tokens=st.sampled_from([0, 512, 4_096]),
    max_running_requests=st.sampled_from([2, 64]),
    chunk_tokens=st.sampled_from([32, 256]),
    output_reserve_ratio=st.sampled_from([0.0, 0.3, 1.0]),
    store_writes=st.booleans(),
    store_read_min_tokens=st.just(64),
    token_events=st.booleans(),
)


@dataclass(slots=True)
class Seen:
    """What a driver saw."""

    events: list[tuple[str, str, float]] = field(default_factory=list)
    readings: list[ModelStats] = field(default_factory=list)
    steps: int = 0


def play(config: ModelConfig, wanted: list[Act], until_s: float | None) -> Seen:
    """Do everything at its time; ``until_s`` None: single steps."""
    model = EngineModel(H100, config)
    seen = Seen()
    todo = sorted(enumerate(wanted), key=lambda item: item[1].at_s)
    kinds = (PrefillDone, RequestFinished, PagesStored, Retracted)
    while True:
        step = model.step
        wake_s = None if step else model.wake_at_s()
        next_s = step.end_s if step else (math.inf if wake_s is None else wake_s)
        if todo and todo[0][1].at_s < next_s:
            number, act = todo.pop(0)
            do(model, number, act, seen)
            if model.step is None:
                begin(model, act.at_s, until_s, seen)
            continue
        if next_s == math.inf:
            break
        events = model.end_step(now_s=next_s) if step else model.poll(now_s=next_s)
        seen.events += [
            (type(e).__name__, e.rid, round(e.at_s, 6)) for e in events if isinstance(e, kinds)
        ]
        begin(model, next_s, until_s, seen)
    assert problems(model.pool) == []
    seen.readings.append(model.stats())
    assert seen.readings[-1].used_tokens == 0
    return seen


def begin(model: EngineModel, now_s: float, until_s: float | None, seen: Seen) -> None:
    seen.steps += model.begin_step(now_s=now_s, until_s=until_s) is not None


def do(model: EngineModel, number: int, act: Act, seen: Seen) -> None:
    name, now_s = act.conversation, act.at_s
    if act.what == "submit":
        whole = act.prompt_tokens + act.output_tokens
        model.submit(
            ModelRequest(
                rid=str(number),
                prompt=StreamPrompt([(name, 0, act.prompt_tokens)], PAGE),
                context=StreamPrompt([(name, 0, whole)], PAGE),
                output_tokens=act.output_tokens,
                prefill_only=not act.output_tokens,
                priority=act.priority,
                stored_tokens=min(act.stored_tokens, act.prompt_tokens),
                session_id=f"s{name}" if name % 2 else None,
            ),
            now_s=now_s,
        )
    elif act.what == "abort":
        for rid in range(number):
            if model.abort(str(rid), now_s=now_s):
                break
    elif act.what == "close":
        model.close_session(f"s{name}", now_s=now_s)
        model.free_session(f"s{name}", now_s=now_s)
    else:
        model.settle(now_s=now_s)
        seen.readings.append(model.stats())


def alike(config: ModelConfig, wanted: list[Act]) -> tuple[Seen, Seen]:
    single = play(config, wanted, None)
    together = play(config, wanted, math.inf)
    assert together.events == single.events
    assert len(together.readings) == len(single.readings)
    for one, other in zip(together.readings, single.readings, strict=True):
        for name in ModelStats.__dataclass_fields__:
            if name in ("counters", "energy", "now_s"):
                continue
            assert getattr(one, name) == getattr(other, name), name
        for name in ("decode_steps", "decode_kv_tokens", "decode_batch_sum", "mixed_steps"):
            assert getattr(one.counters, name) == getattr(other.counters, name), name
        for name in ("decode_s", "mixed_s", "prefill_s"):
            seconds = getattr(one.counters, name)
            assert seconds == pytest.approx(getattr(other.counters, name), abs=1e-6)
        assert one.energy.total_j == pytest.approx(other.energy.total_j, rel=1e-6)
    return single, together


@settings(max_examples=120, deadline=None)
@given(configs, acts)
def test_whatever_happens_in_their_midst(config: ModelConfig, wanted: list[Act]) -> None:
    alike(config, wanted)


@pytest.mark.parametrize("seed", range(10))
def test_in_a_crowd(seed: int) -> None:
    dice = random.Random(seed)
    config = ModelConfig(
        page_tokens=PAGE,
        kv_capacity_tokens=2_048,
        host_capacity_tokens=dice.choice([0, 1_024, 8_192]),
        chunk_tokens=dice.choice([64, 256]),
        output_reserve_ratio=dice.choice([0.0, 0.3, 1.0]),
        store_writes=dice.random() < 0.5,
        store_read_min_tokens=64,
    )
    wanted = [
        Act(
            at_s=dice.uniform(0.0, 8.0),
            what=dice.choice(["submit"] * 5 + ["abort", "close", "read"]),
            conversation=dice.randrange(8),
            prompt_tokens=dice.randrange(1, 600),
            output_tokens=dice.randrange(0, 500),
            priority=dice.randrange(3),
            stored_tokens=dice.choice([0, 0, 128]),
        )
        for _ in range(80)
    ]
    single, together = alike(config, wanted)
    assert together.steps < single.steps / 3


def test_a_step_alone_is_not_cut() -> None:
    model = EngineModel(H100, ModelConfig(page_tokens=PAGE))
    prompt = StreamPrompt([("a", 0, 100)], PAGE)
    model.submit(ModelRequest(rid="a", prompt=prompt, output_tokens=50), now_s=0.0)
    step = model.begin_step(now_s=0.0, until_s=math.inf)
    assert step is not None
    model.submit(ModelRequest(rid="b", prompt=prompt, output_tokens=50), now_s=step.end_s / 2)
    assert model.step is step
    model.end_step(now_s=step.end_s)


def test_the_step_at_that_time_runs_to_its_end() -> None:
    model = EngineModel(H100, ModelConfig(page_tokens=PAGE, token_events=False))
    prompt = StreamPrompt([("a", 0, 100)], PAGE)
    model.submit(ModelRequest(rid="a", prompt=prompt, output_tokens=50), now_s=0.0)
    first = model.begin_step(now_s=0.0, until_s=math.inf)
    assert first is not None
    model.end_step(now_s=first.end_s)
    burst = model.begin_step(now_s=first.end_s, until_s=math.inf)
    assert burst is not None
    assert burst.steps == 49
    model.submit(
        ModelRequest(rid="b", prompt=prompt, output_tokens=50),
        now_s=burst.start_s + 0.3 * burst.duration_s,
    )
    short = model.step
    assert short is not None
    assert short.steps == math.ceil(0.3 * 49)
    assert short.duration_s == pytest.approx(burst.duration_s * short.steps / 49, rel=1e-3)
    model.end_step(now_s=short.end_s)
    seconds = model.energy_seconds()
    assert seconds.busy_s == pytest.approx(short.end_s)
    priced, counted = reprice(seconds, H100.power), model.stats().energy
    assert priced.total_j == pytest.approx(counted.total_j)


@pytest.mark.parametrize("seed", range(8))
def test_an_abort_at_the_very_end_of_a_step_leaves_one_step(seed: int) -> None:
    """The end as single steps add it up is rounded otherwise than that of steps together."""
    dice = random.Random(seed)
    prompts = [StreamPrompt([(name, 0, dice.randrange(20, 900))], 1) for name in "abcd"]

    def decoding() -> EngineModel:
        config = ModelConfig(page_tokens=1, token_events=False, kv_capacity_tokens=100_000)
        model = EngineModel(H100, config)
        for number, prompt in enumerate(prompts):
            request = ModelRequest(rid=f"r{number}", prompt=prompt, output_tokens=200)
            model.submit(request, now_s=0.0)
        while model.running < len(prompts):
            step = model.begin_step(now_s=0.0)
            assert step is not None
            model.end_step(now_s=step.end_s)
        return model

    single = decoding()
    for _ in range(50):
        step = single.begin_step(now_s=0.0)
        assert step is not None
        single.end_step(now_s=step.end_s)
        together = decoding()
        together.begin_step(now_s=0.0, until_s=math.inf)
        together.abort("r0", now_s=step.end_s)
        left = together.step
        assert left is not None
        assert left.steps == 1  # in the midst of two, the batch would change under the second
        while left is not None:
            together.end_step(now_s=left.end_s)
            left = together.begin_step(now_s=0.0, until_s=math.inf)
        assert problems(together.pool) == []
        assert together.pool.private_tokens == 0
