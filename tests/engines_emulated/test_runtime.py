"""Time: the model's is exact, whatever the event loop does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from conserve_serving.engines.content import TokenPrompt
from conserve_serving.engines.emulated.plan import Limits, make_plan
from conserve_serving.engines.emulated.runtime import EngineRuntime, Generation, Signal, WallClock
from conserve_serving.engines.emulated.script import Reply
from conserve_serving.engines.emulated.template import ChatTemplate
from conserve_serving.engines.errors import ModelMisuseError
from conserve_serving.engines.model import EngineModel
from conserve_serving.engines.model_types import ModelConfig, ModelEvent, ModelRequest
from conserve_serving.engines.profile import load_profile

PROFILE = load_profile("a40-qwen3-0.6b")


class Bench:
    """A runtime, what it reported, and requests for it."""

    def __init__(self, clock: Any, kind: type[EngineModel] = EngineModel, **config: Any) -> None:
        self.stored: list[tuple[str, int]] = []
        self.ended: list[str] = []
        self.clock = clock
        self.model = kind(PROFILE, ModelConfig(**config))
        self.runtime = EngineRuntime(
            self.model,
            clock,
            on_stored=lambda stored: self.stored.append((stored.rid, stored.tokens)),
            on_ended=lambda generation: self.ended.append(generation.rid),
        )

    def submit(self, rid: str, prompt_tokens: int, output_tokens: int) -> Generation:
        limits = Limits(max_tokens=output_tokens, room_tokens=10_000, ignore_eos=True)
        plan = make_plan(Reply(), limits, ChatTemplate(), seed=1)
        generation = Generation(
            rid=rid, plan=plan, prompt_tokens=prompt_tokens, signal=Signal(), each_token=True
        )
        first = sum(rid.encode())
        prompt = TokenPrompt.of(range(first, first + prompt_tokens), 64)
        request = ModelRequest(
            rid=rid, prompt=prompt, output_tokens=output_tokens, prefill_only=not output_tokens
        )
        self.runtime.submit(request, generation)
        return generation


async def test_steps_follow_each_other_without_a_gap(manual_clock: Any) -> None:
    bench = Bench(manual_clock())
    generation = bench.submit("a", 100, 20)
    while not generation.ended:
        await bench.clock.fire_next()
    # The same requests, driven by hand.
    other = EngineModel(PROFILE, ModelConfig())
    other.submit(
        ModelRequest(rid="a", prompt=TokenPrompt.of(range(97, 197), 64), output_tokens=20),
        now_s=0.0,
    )
    at_s = 0.0
    while (step := other.begin_step(now_s=at_s)) is not None:
        at_s = step.end_s
        other.end_step(now_s=at_s)
    assert bench.clock.now_s() == pytest.approx(at_s)
    assert generation.emitted == 20


async def test_a_late_event_loop_does_not_slow_the_device_down(manual_clock: Any) -> None:
    prompt = Bench(manual_clock())
    late = Bench(manual_clock())
    on_time = prompt.submit("a", 100, 20)
    while not on_time.ended:
        await prompt.clock.fire_next()
    generation = late.submit("a", 100, 20)
    await late.clock.armed()
    late.clock.set_now_s(100.0)  # the loop was busy for a long time
    await late.clock.fire_next()
    while not generation.ended:
        await generation.signal.wait()
    assert generation.finished is not None
    assert on_time.finished is not None
    assert generation.finished.at_s == pytest.approx(on_time.finished.at_s)
    assert late.runtime.max_lag_s > 90.0


async def test_pages_are_acknowledged_while_a_step_runs(manual_clock: Any) -> None:
    bench = Bench(manual_clock(), store_writes=True)
    first = bench.submit("a", 2000, 0)
    while not first.ended:
        await bench.clock.fire_next()
    assert not bench.stored  # the reply comes before the pages are out
    bench.submit("b", 2900, 0)
    await asyncio.wait_for(bench.clock.armed(), 5)
    step_ends_s = None
    while not bench.stored:
        at_s = await bench.clock.fire_next()
        step_ends_s = bench.clock.next_s()
    assert bench.stored == [("a", 1984)]
    assert step_ends_s is not None
    assert at_s < step_ends_s


async def test_an_abort_frees_everything_at_once(manual_clock: Any) -> None:
    bench = Bench(manual_clock())
    generation = bench.submit("a", 1000, 50)
    while generation.emitted < 5:
        await bench.clock.fire_next()
    assert bench.runtime.stats().used_tokens > 0
    assert bench.runtime.abort("a")
    assert not bench.runtime.abort("a")
    assert generation.ended
    assert generation.finish["type"] == "abort"
    assert bench.ended == ["a"]
    while bench.clock.next_s() is not None:
        await bench.clock.fire_next()
    stats = bench.runtime.stats()
    assert (stats.used_tokens, stats.running, stats.queued) == (0, 0, 0)
    assert generation.emitted < 10


async def test_closing_aborts_what_is_left(manual_clock: Any) -> None:
    bench = Bench(manual_clock())
    generations = [bench.submit(rid, 100, 10) for rid in "abc"]
    bench.runtime.close()
    assert all(generation.aborted for generation in generations)
    assert not bench.runtime.rids()


class BrokenModel(EngineModel):
    """Breaks at the end of its first step."""

    def end_step(self, *, now_s: float) -> list[ModelEvent]:
        raise ModelMisuseError("the books are off")


async def test_a_fault_of_the_model_ends_every_request(manual_clock: Any) -> None:
    bench = Bench(manual_clock(), kind=BrokenModel)
    generations = [bench.submit(rid, 100, 10) for rid in "abc"]
    await bench.clock.armed()
    with pytest.raises(ModelMisuseError):
        await bench.clock.fire_next()
    assert all(generation.aborted for generation in generations)
    assert bench.runtime.failed


def test_the_wall_clock_runs_at_its_speed() -> None:
    now = [50.0]
    clock = WallClock(speed=20.0, monotonic=lambda: now[0])
    assert clock.now_s() == 0.0
    now[0] += 0.5
    assert clock.now_s() == pytest.approx(10.0)
