"""The hand-off: a prompt prefilled on one engine, its pages stored, acknowledged, and found."""

from __future__ import annotations

from typing import Any

import pytest

from conserve_serving.engines.pages import last_page_key, page_keys

PAGE = 16


def cached(reply: Any) -> dict[str, int]:
    """Cached tokens by tier."""
    details = reply["meta_info"]["cached_tokens_details"]
    return details or {"device": 0, "host": 0, "storage": 0}


async def decode(pair: Any, ids: list[int], **fields: Any) -> Any:
    sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": ids, "sampling_params": sampling, **fields}
    return await pair.decoder.ok("/generate", body)


def key_of(ids: list[int]) -> str:
    key = last_page_key(ids, PAGE)
    assert key is not None
    return key


@pytest.mark.parametrize("tokens", [1000, 1008, 5000])
async def test_what_is_prefilled_on_one_is_cached_on_the_other(pair: Any, tokens: int) -> None:
    ids = pair.prefiller.ids(tokens)
    done = await pair.prefiller.driver.prefill(ids, rid="t-p", conversation="c")
    assert done.prompt_tokens == tokens
    ack = await pair.acknowledged(key_of(ids))
    assert ack["engine"] == "p0"
    assert ack["tokens"] == tokens // PAGE * PAGE
    assert ack.get("error") is None
    assert ack["duration_s"] >= 0
    before = await pair.decoder.driver.loads()
    found = cached(await decode(pair, ids))
    assert sum(found[tier] for tier in ("device", "host", "storage")) >= tokens - PAGE - 1
    assert found["storage"] > 0
    after = await pair.decoder.driver.loads()
    assert after.prefill_tokens - before.prefill_tokens <= PAGE + 1


async def test_the_text_is_the_same_with_and_without(pair: Any) -> None:
    ids = pair.prefiller.ids(800)
    alone = await decode(pair, ids, extra_key="elsewhere")
    await pair.prefiller.driver.prefill(ids, rid="t-p", conversation="c")
    await pair.acknowledged(key_of(ids))
    handed = await decode(pair, ids)
    assert cached(handed)["storage"] > 0
    assert handed["output_ids"] == alone["output_ids"]


async def test_the_race_costs_time_never_the_text(pair: Any) -> None:
    """A decoder called before the acknowledgement recomputes what it does not find."""
    ids = pair.prefiller.ids(4000)
    await pair.prefiller.driver.prefill(ids, rid="t-p", conversation="c")
    raced = await decode(pair, ids)
    assert 0 <= raced["meta_info"]["cached_tokens"] < 4000
    await pair.acknowledged(key_of(ids))
    assert (await decode(pair, ids))["output_ids"] == raced["output_ids"]


async def test_every_prefill_is_acknowledged(pair: Any) -> None:
    """Also one whose pages are stored already: they could have been removed meanwhile."""
    ids = pair.prefiller.ids(320)
    for count in (1, 2):
        await pair.prefiller.driver.prefill(ids, rid=f"t-{count}", conversation="c")
        ack = await pair.acknowledged(key_of(ids), count)
        assert ack["tokens"] == 320


async def test_a_tail_turn_finds_its_own_kv_first(pair: Any) -> None:
    ids = pair.prefiller.ids(640)
    await pair.prefiller.driver.prefill(ids, rid="t-p", conversation="c")
    await pair.acknowledged(key_of(ids))
    first = await decode(pair, ids)
    turn = [*ids, *first["output_ids"], *pair.decoder.ids(100)]
    found = cached(await decode(pair, turn))
    assert found["device"] >= 640
    assert found["storage"] == 0


async def test_a_decoder_stores_nothing(pair: Any) -> None:
    ids = pair.decoder.ids(640)
    await decode(pair, ids, routing_key="c")
    done = await pair.prefiller.driver.prefill(ids, rid="t-p", conversation="c")
    assert done.cached_tokens == 0
    await pair.acknowledged(key_of(ids))
    assert {ack["engine"] for ack in pair.acks.received} == {"p0"}


async def test_pages_go_when_their_conversation_is_over(pair: Any) -> None:
    ids = pair.prefiller.ids(640)
    await pair.prefiller.driver.prefill(ids, rid="t-p", conversation="over")
    await pair.acknowledged(key_of(ids))
    await pair.decoder.driver.forget_pages("over")

    async def gone() -> bool:
        return not stored_names(pair, key_of(ids))

    await pair.decoder.until(gone, "removed")
    assert cached(await decode(pair, ids)).get("storage", 0) == 0


async def test_a_prompt_below_a_page_is_not_handed_over(pair: Any) -> None:
    await pair.prefiller.driver.prefill(pair.prefiller.ids(15), rid="short", conversation="c")
    ids = pair.prefiller.ids(16)
    await pair.prefiller.driver.prefill(ids, rid="page", conversation="c")
    await pair.acknowledged(key_of(ids))
    assert len(pair.acks.received) == 1


async def test_pages_are_stored_under_the_keys_we_compute(pair: Any, kind: str) -> None:
    """Of every page on SGLang; the emulated store names a hand-off by its last page."""
    ids = pair.prefiller.ids(650)
    await pair.prefiller.driver.prefill(ids, rid="t-p", conversation="c")
    await pair.acknowledged(key_of(ids))
    keys = [key.hex() for key in page_keys(ids, PAGE)]
    assert len(keys) == 40
    assert keys[-1] == key_of(ids)
    for key in keys if kind == "sglang" else keys[-1:]:
        assert stored_names(pair, key), key
    assert not stored_names(pair, page_keys(pair.prefiller.ids(16), PAGE)[0].hex())


def stored_names(pair: Any, key: str) -> list[str]:
    """Files of the store that are named by a page's key."""
    return [path.name for path in pair.store.rglob(f"*{key}*") if path.is_file()]
