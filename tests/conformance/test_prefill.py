"""Prefill alone, as the driver asks for it, and what ``/generate`` answers."""

from __future__ import annotations

from typing import Any


def sampling(tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}


async def test_a_prefill_generates_nothing(engine: Any) -> None:
    ids = engine.ids(300)
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 0}, "rid": "turn-p"}
    reply = await engine.ok("/generate", body)
    assert (reply["text"], reply["output_ids"]) == ("", [])
    meta = reply["meta_info"]
    assert meta["id"] == "turn-p"
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (300, 0)
    assert (meta["cached_tokens"], meta["cached_tokens_details"]) == (0, None)


async def test_the_driver_reads_what_was_cached(engine: Any) -> None:
    ids = engine.ids(300)
    cold = await engine.driver.prefill(ids, rid="cold")
    assert (cold.prompt_tokens, cold.cached_tokens) == (300, 0)
    warm = await engine.driver.prefill(ids, rid="warm")
    assert (warm.prompt_tokens, warm.cached_tokens) == (300, 288)


async def test_the_last_token_is_always_computed(engine: Any) -> None:
    ids = engine.ids(320)  # whole pages
    await engine.driver.prefill(ids, rid="cold")
    assert (await engine.driver.prefill(ids, rid="warm")).cached_tokens == 304


async def test_a_prompt_below_a_page_is_never_cached(engine: Any) -> None:
    ids = engine.ids(15)
    for rid in ("a", "b"):
        assert (await engine.driver.prefill(ids, rid=rid)).cached_tokens == 0


async def test_priority_of_a_prefill(engine: Any) -> None:
    await engine.driver.prefill(engine.ids(40), rid="urgent", priority=5)


async def test_namespaces_share_nothing(engine: Any) -> None:
    ids = engine.ids(64)
    body = {"input_ids": ids, "sampling_params": sampling(1)}
    cached = []
    for extra in ({"extra_key": "a"}, {"extra_key": "b"}, {}, {"extra_key": "a"}):
        reply = await engine.ok("/generate", {**body, **extra})
        cached.append(reply["meta_info"]["cached_tokens"])
    assert cached == [0, 0, 0, 48]


async def test_generate_streams_the_whole_text_so_far(engine: Any) -> None:
    body = {"input_ids": engine.ids(40), "sampling_params": sampling(6)}
    whole = await engine.ok("/generate", body)
    assert len(whole["output_ids"]) == 6
    events = (await engine.ask("POST", "/generate", {**body, "stream": True})).events
    assert events[-1]["text"] == whole["text"]
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
    assert all(whole["text"].startswith(event["text"]) for event in events)


async def test_of_text_and_ids_the_ids_count(engine: Any) -> None:
    body = {"text": engine.text(50), "input_ids": engine.ids(7), "sampling_params": sampling(1)}
    reply = await engine.ok("/generate", body)
    assert reply["meta_info"]["prompt_tokens"] == 7


async def test_several_prompts_at_once(engine: Any) -> None:
    body = {"input_ids": [engine.ids(20), engine.ids(30)], "sampling_params": sampling(2)}
    replies = await engine.ok("/generate", body)
    assert [reply["meta_info"]["prompt_tokens"] for reply in replies] == [20, 30]
