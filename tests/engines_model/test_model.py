"""The engine model, rule by rule, on a virtual clock."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from conserve_serving.engines.content import Prompt, StreamPrompt, TokenPrompt
from conserve_serving.engines.errors import (
    DuplicateRequestError,
    ModelError,
    ModelMisuseError,
    RequestTooLargeError,
)
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

H100 = load_profile("h100-qwen3-8b")
PAGE = 64


def stream(name: str, tokens: int) -> StreamPrompt:
    return StreamPrompt([(name, 0, tokens)], PAGE)


def request(name: str, prompt_tokens: int, length: int, /, **more: object) -> ModelRequest:
    """A request for ``length`` tokens whose conversation is the stream of its name."""
    fields: dict[str, object] = {
        "rid": name,
        "prompt": stream(name, prompt_tokens),
        "context": stream(name, prompt_tokens + length),
        "output_tokens": length,
    }
    return ModelRequest(**(fields | more))  # type: ignore[arg-type] # a test's shorthand


class Driver:
    """Runs a model on a virtual clock and keeps its events."""

    def __init__(self, **config: object) -> None:
        self.model = EngineModel(H100, ModelConfig(**config))  # type: ignore[arg-type] # as above
        self.now_s = 0.0
        self.events: list[ModelEvent] = []
        self.max_held = 0

    def submit(self, *requests: ModelRequest) -> None:
        for item in requests:
            self.model.submit(item, now_s=self.now_s)

    def step(self) -> bool:
        """One step, or a wait for the next transfer; False when there is neither."""
        step = self.model.begin_step(now_s=self.now_s)
        if step is not None:
            self.max_held = max(self.max_held, self.model.pool.used_tokens)
            self.now_s = step.end_s
            self.events += self.model.end_step(now_s=self.now_s)
            return True
        wake_s = self.model.wake_at_s()
        if wake_s is not None:
            self.now_s = wake_s
            self.events += self.model.poll(now_s=wake_s)
        return wake_s is not None

    def run(self, limit: int = 100_000) -> list[ModelEvent]:
        """Until nothing is left to do."""
        for _ in range(limit):
            if not self.step():
                assert not self.model.stats().queued
                assert problems(self.model.pool) == []
                return self.events
        raise AssertionError("the model does not come to rest")

    def finished(self) -> dict[str, RequestFinished]:
        return {e.rid: e for e in self.events if isinstance(e, RequestFinished)}

    def prefilled(self) -> dict[str, PrefillDone]:
        return {e.rid: e for e in self.events if isinstance(e, PrefillDone)}


def emitted(events: Iterable[ModelEvent], rid: str) -> int:
    return sum(e.count for e in events if isinstance(e, TokensEmitted) and rid in e.rids)


def test_one_request_from_prompt_to_end() -> None:
    driver = Driver()
    driver.submit(request("a", 1000, 20))
    events = driver.run()
    assert isinstance(events[0], PrefillDone)
    assert emitted(events, "a") == 20
    done = driver.finished()["a"]
    assert (done.prompt_tokens, done.output_tokens, done.cached_tokens) == (1000, 20, 0)
    stats = driver.model.stats()
    assert (stats.used_tokens, stats.evictable_tokens) == (0, 1019 // PAGE * PAGE)
    assert stats.counters.prefill_tokens == 1000
    assert stats.counters.decode_moments[0] == 18  # the first follows no decode step


def test_step_times_are_the_profiles() -> None:
    driver = Driver()
    driver.submit(request("a", 2048, 2))
    step = driver.model.begin_step(now_s=0.0)
    assert step is not None
    assert step.duration_s == pytest.approx(0.0463228)
    assert (step.prefill_tokens, step.decode_batch) == (2048, 0)
    driver.model.end_step(now_s=step.end_s)
    step = driver.model.begin_step(now_s=step.end_s)
    assert step is not None
    assert (step.decode_batch, step.decode_kv_tokens) == (1, 2049)


def test_the_next_turn_computes_only_what_it_appends() -> None:
    driver = Driver()
    driver.submit(request("a", 1000, 100))
    driver.run()
    driver.submit(request("a", 1300, 10))
    driver.run()
    cached = driver.prefilled()["a"].cached_device_tokens
    assert cached == 1099 // PAGE * PAGE
    assert driver.model.stats().counters.prefill_tokens == 1000 + 1300 - cached


def test_real_token_ids_work_the_same() -> None:
    ids = [i * 31 % 5000 for i in range(1500)]
    driver = Driver()
    first = TokenPrompt.of(ids[:1000], PAGE)
    driver.submit(
        ModelRequest(
            rid="a", prompt=first, output_tokens=100, context=first.extended(ids[1000:1100])
        )
    )
    driver.run()
    driver.submit(ModelRequest(rid="b", prompt=TokenPrompt.of(ids, PAGE), output_tokens=1))
    driver.run()
    assert driver.prefilled()["b"].cached_device_tokens == 1099 // PAGE * PAGE


def test_context_may_come_after_submission() -> None:
    driver = Driver()
    driver.submit(request("a", 640, 128, context=None))
    driver.model.set_context("a", stream("a", 768))
    driver.model.set_context("gone", stream("a", 768))
    driver.run()
    assert driver.model.stats().evictable_tokens == 767 // PAGE * PAGE
    driver.submit(request("b", 640, 128, context=None))
    with pytest.raises(ModelError, match="context must extend"):
        driver.model.set_context("b", stream("b", 1))
    driver.run()
    assert driver.model.stats().evictable_tokens == 767 // PAGE * PAGE + 640


def test_prompts_are_chunked_beside_decode() -> None:
    driver = Driver(chunk_tokens=512)
    driver.submit(request("a", 100, 50))
    driver.step()
    driver.submit(request("b", 1600, 1))
    steps = []
    while "b" not in driver.finished():
        step = driver.model.begin_step(now_s=driver.now_s)
        assert step is not None
        steps.append(step)
        driver.now_s = step.end_s
        driver.events += driver.model.end_step(now_s=driver.now_s)
    assert [s.prefill_tokens for s in steps] == [448, 448, 448, 256]
    assert all(s.decode_batch == 1 for s in steps)
    counters = driver.model.stats().counters
    assert (counters.mixed_steps, counters.mixed_prefill_tokens) == (4, 1600)
    assert counters.mixed_s == pytest.approx(sum(s.duration_s for s in steps))


def test_tail_turns_go_before_first_turns() -> None:
    driver = Driver(max_running_requests=1)
    driver.submit(request("running", 64, 5))
    driver.step()
    driver.submit(
        request("new-1", 100, 2), request("new-2", 100, 2), request("tail", 100, 2, priority=1)
    )
    driver.run()
    order = [e.rid for e in driver.events if isinstance(e, RequestFinished)]
    assert order == ["running", "tail", "new-1", "new-2"]


def test_a_begun_prompt_goes_on_first_unless_told_otherwise() -> None:
    for chunked_first, expected in ((True, ["long", "tail"]), (False, ["tail", "long"])):
        driver = Driver(chunk_tokens=512, chunked_first=chunked_first)
        driver.submit(request("long", 4000, 1))
        driver.step()
        driver.submit(request("tail", 100, 1, priority=1))
        driver.run()
        assert [e.rid for e in driver.events if isinstance(e, RequestFinished)] == expected


def test_prefill_only_ends_without_a_token() -> None:
    driver = Driver()
    driver.submit(request("a", 1000, 0, prefill_only=True))
    events = driver.run()
    assert emitted(events, "a") == 0
    assert driver.finished()["a"].first_token_s is None
    assert driver.model.stats().evictable_tokens == 960


def test_stored_pages_are_announced_in_order_behind_the_backlog() -> None:
    driver = Driver(store_writes=True)
    driver.submit(*(request(name, 4000, 0, prefill_only=True) for name in "ab"))
    driver.run()
    stored = [e for e in driver.events if isinstance(e, PagesStored)]
    assert [e.rid for e in stored] == ["a", "b"]
    assert [e.tokens for e in stored] == [3968, 3968]
    one_s = H100.handoff_s(3968)
    prefilled = driver.prefilled()
    assert stored[0].at_s == pytest.approx(prefilled["a"].at_s + one_s)
    assert stored[1].at_s == pytest.approx(stored[0].at_s + one_s)
    assert driver.model.stats().stored_tokens == 2 * 3968


def test_handed_over_pages_are_loaded_not_computed() -> None:
    driver = Driver()
    driver.submit(request("a", 4000, 1, stored_tokens=3968))
    driver.run()
    done = driver.prefilled()["a"]
    assert (done.cached_storage_tokens, done.cached_device_tokens) == (3968, 0)
    stats = driver.model.stats()
    assert stats.counters.prefill_tokens == 32
    loading_s = H100.ingress_s(3968)
    assert done.at_s == pytest.approx(loading_s + stats.counters.prefill_s)
    assert stats.energy.idle_j == pytest.approx(H100.power.idle_w * loading_s)


def test_short_hits_in_the_store_are_computed() -> None:
    driver = Driver()
    driver.submit(request("a", 300, 1, stored_tokens=192))
    driver.run()
    assert driver.prefilled()["a"].cached_storage_tokens == 0


def test_a_whole_prompt_in_the_cache_still_computes_its_last_page() -> None:
    driver = Driver()
    for rid in ("a", "again"):
        driver.submit(request("a", 640, 1, rid=rid))
        driver.run()
    assert driver.prefilled()["again"].cached_device_tokens == 640 - PAGE


def test_parked_kv_comes_back_over_the_host_link() -> None:
    driver = Driver(kv_capacity_tokens=10_240, host_capacity_tokens=10_240)
    driver.submit(request("a", 6_000, 10))
    driver.run()
    driver.submit(request("b", 9_000, 10))
    driver.run()
    assert driver.model.stats().host_used_tokens > 0
    started_s = driver.now_s
    driver.submit(request("a", 6_500, 10))
    driver.run()
    done = driver.prefilled()["a"]
    assert done.cached_device_tokens + done.cached_host_tokens == 6_009 // PAGE * PAGE
    assert done.cached_host_tokens > 2_000
    assert done.at_s - started_s > H100.restore_s(done.cached_host_tokens)


def test_too_large_is_refused_at_once() -> None:
    driver = Driver(kv_capacity_tokens=1_024)
    with pytest.raises(RequestTooLargeError, match=r"KV pool of 1024"):
        driver.submit(request("a", 1_000, 30))
    with pytest.raises(RequestTooLargeError, match=r"context length of 131072"):
        driver.submit(request("a", 131_000, 100))
    driver.submit(request("a", 1_000, 24))
    driver.run()
    assert set(driver.finished()) == {"a"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"output_tokens": 0}, "output_tokens is 0 exactly when prefill_only"),
        ({"prefill_only": True}, "output_tokens is 0 exactly when prefill_only"),
        ({"prompt": stream("a", 0)}, "the prompt is empty"),
        ({"prompt": StreamPrompt([("a", 0, 9)], 16)}, "prompt has pages of 16"),
        ({"context": stream("a", 9)}, "context is shorter"),
    ],
)
def test_bad_requests_are_named(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Driver().submit(request("a", 100, 5, **bad))


def test_bad_settings_are_named() -> None:
    with pytest.raises(ModelError, match="page_tokens"):
        Driver(page_tokens=0)
    for none in (0, 10):  # tokens: less than a page
        with pytest.raises(ModelError, match="kv_capacity_tokens"):
            Driver(kv_capacity_tokens=none)
    with pytest.raises(ModelError, match="chunk_tokens"):
        Driver(chunk_tokens=0)


def test_order_of_calls_is_checked() -> None:
    driver = Driver()
    with pytest.raises(ModelMisuseError, match="end_step without"):
        driver.model.end_step(now_s=0.0)
    driver.submit(request("a", 100, 5))
    with pytest.raises(DuplicateRequestError, match="rid 'a'"):
        driver.submit(request("a", 100, 5))
    step = driver.model.begin_step(now_s=0.0)
    assert step is not None
    with pytest.raises(ModelMisuseError, match="begin_step before end_step"):
        driver.model.begin_step(now_s=0.0)
    with pytest.raises(ModelMisuseError, match="the step ends at"):
        driver.model.end_step(now_s=step.end_s / 2)


def test_over_full_engine_queues_and_everything_ends() -> None:
    driver = Driver(kv_capacity_tokens=4_096, host_capacity_tokens=2_048)
    driver.submit(*(request(f"r{i}", 1_000 + i, 100) for i in range(30)))
    driver.run()
    assert len(driver.finished()) == 30
    assert driver.max_held <= 4_096
    assert driver.model.stats().retractions == 0  # the whole output is reserved


def test_without_reserve_the_newest_is_retracted_and_still_ends() -> None:
    driver = Driver(kv_capacity_tokens=4_096, output_reserve_ratio=0.0)
    driver.submit(*(request(f"r{i}", 1_000, 600) for i in range(8)))
    events = driver.run()
    retracted = [e.rid for e in events if isinstance(e, Retracted)]
    assert retracted
    assert "r0" not in retracted
    assert len(driver.finished()) == 8
    for i in range(8):  # nothing is generated twice, nothing is lost
        assert emitted(events, f"r{i}") == 600
    assert driver.max_held <= 4_096


def test_a_limit_larger_than_the_pool_does_not_block_for_ever() -> None:
    driver = Driver(kv_capacity_tokens=2_048)
    driver.submit(*(request(n, 500, 10, max_output_tokens=100_000) for n in "ab"))
    driver.run()
    assert set(driver.finished()) == {"a", "b"}


def test_abort_at_every_point() -> None:
    driver = Driver(chunk_tokens=512, kv_capacity_tokens=8_192)
    driver.submit(request("parked", 4_000, 10))
    driver.run()
    driver.submit(request("other", 6_000, 10))
    driver.run()
    driver.submit(request("decoding", 100, 500))
    driver.step()
    driver.step()
    driver.submit(request("parked", 4_200, 10, priority=1), request("mid", 2_000, 10))
    step = driver.model.begin_step(now_s=driver.now_s)
    assert step is not None
    driver.submit(request("queued", 7_000, 10))
    stats = driver.model.stats()
    assert (stats.loading, stats.prefilling, stats.running, stats.queued) == (1, 1, 1, 1)
    before = len(driver.events)
    for rid in ("queued", "parked", "mid", "decoding"):
        assert driver.model.abort(rid, now_s=driver.now_s)
        assert not driver.model.abort(rid, now_s=driver.now_s)
        assert problems(driver.model.pool) == []
    driver.now_s = step.end_s
    driver.events += driver.model.end_step(now_s=driver.now_s)
    driver.run()
    assert driver.events[before:] == []  # nothing more is heard of them
    stats = driver.model.stats()
    assert (stats.used_tokens, stats.aborted_requests) == (0, 4)
    assert stats.queued_tokens == 0


def test_sessions_keep_their_kv_under_other_traffic() -> None:
    """As measured on SGLang: 24k tokens of other traffic through a 20k pool."""
    driver = Driver(kv_capacity_tokens=20_480, host_capacity_tokens=20_480)
    driver.model.open_session("s", now_s=0.0)
    driver.submit(request("mine", 4_000, 10, session_id="s"))
    driver.run()
    for i in range(6):
        driver.submit(request(f"other-{i}", 4_000, 10))
        driver.run()
    driver.submit(request("mine", 4_200, 10, session_id="s"))
    driver.run()
    assert driver.prefilled()["mine"].cached_device_tokens == 4_009 // PAGE * PAGE
    assert driver.model.close_session("s", now_s=driver.now_s)
    assert not driver.model.close_session("s", now_s=driver.now_s)


def test_a_freed_session_s_kv_leaves_both_tiers() -> None:
    driver = Driver(kv_capacity_tokens=20_480, host_capacity_tokens=20_480)
    driver.model.open_session("s", now_s=0.0)
    driver.submit(request("mine", 4_000, 10, session_id="s"))
    driver.run()
    driver.model.close_session("s", now_s=driver.now_s)
    for i in range(5):  # enough to send part of it to the host
        driver.submit(request(f"other-{i}", 4_000, 10))
        driver.run()
    before = driver.model.stats()
    driver.model.free_session("s", now_s=driver.now_s)
    after = driver.model.stats()
    held = [stats.evictable_tokens + stats.host_used_tokens for stats in (before, after)]
    assert held[0] - held[1] == 4_009 // PAGE * PAGE
    driver.model.free_session("s", now_s=driver.now_s)  # there is nothing left to free
    assert driver.model.stats() == after


def test_kv_in_use_leaves_when_its_request_ends() -> None:
    driver = Driver()
    driver.submit(request("a", 640, 65, session_id="s"))
    driver.run()
    driver.model.close_session("s", now_s=driver.now_s)
    again = {"prompt": stream("a", 704), "context": None, "prefill_only": True}
    driver.submit(request("again", 704, 0, **again))
    driver.step()
    driver.model.free_session("s", now_s=driver.now_s)
    driver.run()
    stats = driver.model.stats()
    assert (stats.evictable_tokens, stats.host_used_tokens) == (0, 0)


def test_a_request_of_a_closed_session_protects_nothing() -> None:
    driver = Driver()
    driver.submit(request("a", 640, 10, session_id="s"))
    assert not driver.model.open_session("s", now_s=0.0)  # the request opened it
    driver.model.close_session("s", now_s=0.0)
    driver.model.open_session("s", now_s=0.0)  # another incarnation
    driver.run()
    assert driver.model.pool.sessions.leaves == {"s": {}}


def test_flush_drops_idle_kv_and_keeps_sessions_open() -> None:
    driver = Driver()
    driver.submit(request("a", 640, 65, session_id="s"))
    assert not driver.model.flush(now_s=0.0)
    driver.run()
    assert driver.model.flush(now_s=driver.now_s)
    stats = driver.model.stats()
    assert (stats.evictable_tokens, stats.open_sessions, stats.dropped_tokens) == (0, 1, 704)
    driver.submit(request("a", 640, 10))
    driver.run()
    assert driver.finished()["a"].cached_tokens == 0


def test_energy_is_power_times_time_by_state() -> None:
    driver = Driver(chunk_tokens=512)
    driver.submit(request("a", 1_000, 50))
    for _ in range(10):
        driver.step()
    driver.submit(request("b", 3_000, 10))
    driver.run()
    driver.events += driver.model.poll(now_s=driver.now_s + 3.0)
    stats = driver.model.stats()
    energy, counters = stats.energy, stats.counters
    assert energy.idle_j == pytest.approx(3.0 * H100.power.idle_w)
    assert energy.prefill_j == pytest.approx(counters.prefill_s * H100.power.prefill_w)
    lowest, highest = H100.power.decode_w(1), H100.power.decode_w(2)
    assert counters.decode_s * lowest <= energy.decode_j <= counters.decode_s * highest
    assert 0 < energy.mixed_j < counters.mixed_s * H100.power.prefill_w
    parts = energy.idle_j + energy.prefill_j + energy.decode_j + energy.mixed_j
    assert energy.total_j == pytest.approx(parts)
    busy_s = counters.prefill_s + counters.decode_s + counters.mixed_s
    assert stats.now_s == pytest.approx(busy_s + 3.0)


def test_bursts_give_what_single_steps_give() -> None:
    def run(burst: bool) -> tuple[list[tuple[object, ...]], float, int]:
        model = EngineModel(H100, ModelConfig(token_events=False, kv_capacity_tokens=200_000))
        arrivals = [
            (0.3 * i, request(f"r{i}", 500 + 3_000 * (i % 4), 40 + 700 * (i % 3)))
            for i in range(20)
        ]
        now_s, calls = 0.0, 0
        ends: list[tuple[object, ...]] = []
        while True:
            while arrivals and arrivals[0][0] <= now_s:
                at_s, item = arrivals.pop(0)
                model.submit(item, now_s=at_s)
            until_s = arrivals[0][0] if arrivals else 1e9
            step = model.begin_step(now_s=now_s, until_s=until_s if burst else None)
            if step is None:
                if not arrivals:
                    break
                now_s = until_s
                continue
            calls += 1
            now_s = step.end_s
            for event in model.end_step(now_s=now_s):
                assert isinstance(event, PrefillDone | RequestFinished)
                ends.append((type(event), event.rid, round(event.at_s, 7)))
        stats = model.stats()
        assert stats.finished_requests == 20
        assert calls < 250 if burst else calls > 1_000
        return ends, stats.energy.total_j, stats.counters.decode_kv_tokens

    single_ends, single_j, single_kv = run(False)
    burst_ends, burst_j, burst_kv = run(True)
    assert burst_ends == single_ends
    assert burst_j == pytest.approx(single_j)
    assert burst_kv == single_kv


def test_prompt_protocol_is_met() -> None:
    kinds: list[Prompt] = [stream("a", 10), TokenPrompt.of([1, 2], PAGE)]
    assert [kind.tokens for kind in kinds] == [10, 2]
