"""What an engine says of itself: the endpoints, fields and types that the driver reads."""

from __future__ import annotations

import re
from typing import Any

import pytest

from conserve_serving.engines.client_types import Loads, step_delta


@pytest.mark.parametrize("path", ["/health", "/health_generate", "/ready"])
async def test_health_is_an_empty_200(engine: Any, path: str) -> None:
    answer = await engine.ask("GET", path)
    assert (answer.status, answer.body) == (200, b"")


async def test_models(engine: Any) -> None:
    listed = (await engine.ask("GET", "/v1/models")).json()
    (card,) = listed["data"]
    assert listed["object"] == "list"
    assert card["id"] == "tiny"
    assert card["object"] == "model"
    assert card["max_model_len"] == engine.max_context_tokens
    one = (await engine.ask("GET", "/v1/models/tiny")).json()
    assert one.keys() == card.keys()
    missing = await engine.ask("GET", "/v1/models/nope")
    assert missing.status == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert missing.json()["error"]["param"] == "model"


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
async def test_model_info(engine: Any, path: str) -> None:
    info = (await engine.ask("GET", path)).json()
    assert info["served_model_name"] == "tiny"
    assert info["is_generation"] is True
    assert info["disaggregation_mode"] == "null"
    assert {"model_path", "tokenizer_path", "tool_call_parser", "weight_version"} <= info.keys()


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
async def test_server_info(engine: Any, path: str) -> None:
    info = (await engine.ask("GET", path)).json()
    assert info["max_total_num_tokens"] == 20_000
    assert info["page_size"] == 16
    assert (info["tp_size"], info["dp_size"]) == (1, 1)
    assert info["version"] == "0.5.23"
    assert info["disaggregation_mode"] == "null"
    assert info["enable_metrics"] is info["enable_cache_report"] is True
    assert info["enable_hierarchical_cache"] is True
    assert info["enable_session_radix_cache"] is True
    assert info["enable_streaming_session"] is False
    assert info["enable_priority_scheduling"] is True
    assert info["schedule_low_priority_values_first"] is False
    assert info["hicache_write_policy"] == "write_through"
    assert info["hicache_storage_backend"] == "dynamic"
    kinds = {"dtype": str, "kv_cache_dtype": str, "hicache_mem_layout": str, "tokenizer_path": str}
    assert {name: type(info[name]) for name in kinds} == kinds
    assert info["internal_states"][0]["memory_usage"]["token_capacity"] == 20_000


async def test_the_driver_can_describe_it(engine: Any) -> None:
    await engine.driver.health()
    told = await engine.driver.describe()
    assert told.model == "tiny"
    assert told.page_tokens == 16
    assert told.kv_capacity_tokens == 20_000
    assert told.max_context_tokens == engine.max_context_tokens
    assert told.keeps_sessions
    assert told.priority_field(3) == 3
    assert told.handoff_role == "decode"
    (card,) = await engine.driver.models()
    assert card.id == "tiny"


async def test_engines_of_a_pair_agree_on_their_kv(pair: Any) -> None:
    prefiller = await pair.prefiller.driver.describe()
    decoder = await pair.decoder.driver.describe()
    assert prefiller.kv_layout == decoder.kv_layout
    assert prefiller.handoff_role == "prefill"


async def test_loads_have_what_the_driver_reads(engine: Any) -> None:
    await engine.ok("/generate", {"input_ids": engine.ids(40), "sampling_params": _tokens(4)})
    await counted(engine, 40)
    told = (await engine.ask("GET", "/v1/loads?include=core")).json()
    (load,) = told["loads"]
    assert told["version"] == "0.5.23"
    assert load["dp_rank"] == 0
    assert load["max_total_num_tokens"] == 20_000
    for name in ("num_running_reqs", "num_waiting_reqs", "num_waiting_uncached_tokens"):
        assert load[name] == 0
    assert isinstance(load["total_prefill_uncached_tokens"], int)
    assert isinstance(load["total_prefill_busy_us"], int)
    assert len(load["decode_moments"]) == 6
    assert "queues" not in load
    assert "queues" in (await engine.ask("GET", "/v1/loads")).json()["loads"][0]


def _tokens(count: int) -> dict[str, Any]:
    return {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}


async def counted(engine: Any, prefill_tokens: int, running: int = 0) -> Loads:
    """A reading that has come so far: an engine's load is published a moment after."""
    reading: Loads = await engine.driver.loads()

    async def there() -> bool:
        nonlocal reading
        reading = await engine.driver.loads()
        now = (reading.prefill_tokens, reading.running_requests)
        return now[0] >= prefill_tokens and now[1] == running

    await engine.until(there, f"{prefill_tokens} prefill tokens")
    return reading


async def test_prefill_counters_count_what_was_not_cached(engine: Any) -> None:
    ids = engine.ids(320)
    before = await counted(engine, 0)
    await engine.driver.prefill(ids, rid="first")
    between = await counted(engine, before.prefill_tokens + 320)
    assert between.prefill_tokens - before.prefill_tokens == 320
    assert between.prefill_busy_us > before.prefill_busy_us
    again = await engine.driver.prefill([*ids, *engine.ids(80)], rid="second")
    assert again.cached_tokens == 320
    after = await counted(engine, between.prefill_tokens + 80)
    assert after.prefill_tokens - between.prefill_tokens == 80


async def test_decode_moments_count_steps_between_steps(engine: Any) -> None:
    before = await counted(engine, 0)
    await engine.ok("/generate", {"input_ids": engine.ids(50), "sampling_params": _tokens(33)})
    after = await counted(engine, before.prefill_tokens + 50)
    delta = step_delta(before, after)
    assert delta is not None
    # The first token comes with the prefill, and the first decode step follows none.
    assert delta.times.decode_steps == 31
    assert delta.decode_batch_sum == 31
    assert delta.decode_generated_tokens == 31
    assert delta.times.decode_s > 0
    assert delta.times.prefill_tokens == 50
    assert step_delta(after, before) is None  # backwards: the engine has been restarted


#: Of each metric that is read here or by operators: its kind.
METRICS = {
    "sglang:kv_used_tokens": "gauge",
    "sglang:kv_evictable_tokens": "gauge",
    "sglang:kv_available_tokens": "gauge",
    "sglang:hicache_host_used_tokens": "gauge",
    "sglang:hicache_host_total_tokens": "gauge",
    "sglang:num_running_reqs": "gauge",
    "sglang:num_queue_reqs": "gauge",
    "sglang:token_usage": "gauge",
    "sglang:max_total_num_tokens": "gauge",
    "sglang:prompt_tokens_total": "counter",
    "sglang:generation_tokens_total": "counter",
    "sglang:cached_tokens_total": "counter",
    "sglang:num_requests_total": "counter",
}


async def test_metrics_have_the_names_that_are_read(engine: Any) -> None:
    ids = engine.ids(64)
    for _ in range(2):  # the second finds something in the cache
        await engine.ok("/generate", {"input_ids": ids, "sampling_params": _tokens(3)})

    async def all_there() -> bool:
        text = (await engine.ask("GET", "/metrics")).body.decode()
        return all(f"\n{name}{{" in text for name in METRICS)

    await engine.until(all_there, "all metrics")
    answer = await engine.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.body.decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert {name: kinds.get(name) for name in METRICS} == METRICS
    for name in METRICS:
        (labels,) = set(re.findall(rf"^{name}\{{(.*?)\}}", text, re.MULTILINE)[:1])
        assert 'model_name="tiny"' in labels
    sources = re.findall(r'^sglang:cached_tokens_total\{.*cache_source="(\w+)"', text, re.MULTILINE)
    assert "device" in sources
