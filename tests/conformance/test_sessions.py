"""Sessions: what keeps a conversation's KV on the device, and what lets go of it."""

from __future__ import annotations

from typing import Any

import pytest

from conserve_serving.engines.http_errors import EngineRefused


async def use(engine: Any, ids: list[int], session: str | None, tokens: int = 2) -> int:
    """One turn; the prompt tokens it found in the cache."""
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": ids, "sampling_params": sampling}
    if session is not None:
        body["session_id"] = session
    reply = await engine.ok("/generate", body)
    return int(reply["meta_info"]["cached_tokens"])


async def crowd(engine: Any, tokens: int) -> None:
    """Other traffic, in prompts of 4,000 tokens."""
    for _ in range(-(-tokens // 4000)):
        await use(engine, engine.ids(4000), None)


async def found(engine: Any, ids: list[int]) -> dict[str, int]:
    """Where a prompt's KV is found: tokens by tier."""
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 0}}
    details = (await engine.ok("/generate", body))["meta_info"]["cached_tokens_details"]
    return details or {"device": 0, "host": 0, "storage": 0}


async def test_opening_closing_opening_again(engine: Any) -> None:
    opened = {"session_id": "s", "capacity_of_str_len": 1000, "timeout": 100}
    assert await engine.ok("/open_session", opened) == "s"
    again = await engine.ask("POST", "/open_session", opened)
    assert again.status == 400
    assert "still open" in again.json()["error"]["message"]
    with pytest.raises(EngineRefused) as caught:
        await engine.driver.open_session("s", capacity_tokens=1000, timeout_s=100)
    assert caught.value.status == 400
    closed = await engine.ask("POST", "/close_session", {"session_id": "s"})
    assert (closed.status, closed.body) == (200, b"")
    await engine.open("s")
    await engine.driver.close_session("s")


async def test_an_id_is_made_where_none_is_given(engine: Any) -> None:
    made = await engine.ok("/open_session", {"capacity_of_str_len": 1000})
    assert isinstance(made, str)
    assert made
    await engine.driver.close_session(made)


async def test_closing_what_is_not_open_is_harmless(engine: Any) -> None:
    await engine.driver.close_session("never")


async def test_a_session_ends_by_itself_when_nobody_uses_it(engine: Any) -> None:
    body = {"session_id": "short", "capacity_of_str_len": 1000, "timeout": 0.5}
    assert await engine.ok("/open_session", body) == "short"

    async def opened_again() -> bool:
        return bool((await engine.ask("POST", "/open_session", body)).status == 200)

    await engine.until(opened_again, "ended")
    await engine.driver.close_session("short")


async def test_bad_calls_are_refused(engine: Any) -> None:
    for path, body in (
        ("/open_session", {"session_id": "x"}),
        ("/open_session", b"{"),
        ("/open_session", {"capacity_of_str_len": 10, "streaming": True}),
        ("/close_session", {}),
    ):
        assert (await engine.ask("POST", path, body)).status == 400, (path, body)


async def test_a_session_nobody_opened_is_no_error(engine: Any) -> None:
    """A decoder that was restarted knows none: turns must go on all the same."""
    ids = engine.ids(200)
    assert await use(engine, ids, "lost") == 0
    assert await use(engine, [*ids, *engine.ids(20)], "lost") >= 192
    await engine.open("lost")
    assert await use(engine, ids, "lost") > 0
    await engine.driver.close_session("lost")
    assert await use(engine, ids, "lost") > 0  # closed: served all the same
    await engine.driver.close_session("lost")


async def test_idle_kv_is_evictable_and_must_be_counted(engine: Any) -> None:
    """The trap: an idle conversation uses nothing by the engine's own account."""
    await engine.open("s")
    await use(engine, engine.ids(3200), "s", tokens=1)

    await engine.until(lambda: _holds(engine, 3200), "3,200 tokens held")

    async def unused() -> bool:
        load = (await engine.ask("GET", "/v1/loads?include=core")).json()["loads"][0]
        return bool(load["num_used_tokens"] == load["token_usage"] == 0)

    await engine.until(unused, "unused")
    assert await engine.held_tokens() == 3200
    await engine.driver.close_session("s")


async def test_a_session_s_kv_outlives_other_traffic(engine: Any) -> None:
    """Twice the pool passes by: with a session nothing is lost, without one it is evicted."""
    kept, other = engine.ids(4000), engine.ids(4000)
    await engine.open("kept")
    await use(engine, kept, "kept")
    await use(engine, other, None)
    await crowd(engine, 40_000)
    assert (await found(engine, kept))["device"] >= 3984
    assert (await found(engine, other))["device"] == 0
    await engine.driver.close_session("kept")


async def test_a_closed_session_s_kv_stays_until_it_is_evicted(engine: Any) -> None:
    ids = engine.ids(4000)
    await engine.open("s")
    await use(engine, ids, "s")
    await engine.driver.close_session("s")
    assert (await found(engine, ids))["device"] >= 3984
    await crowd(engine, 40_000)
    assert (await found(engine, ids))["device"] == 0


async def test_a_freed_session_s_kv_leaves_at_once(engine: Any) -> None:
    ids, other = engine.ids(3200), engine.ids(320)
    for name, prompt in (("gone", ids), ("stays", other)):
        await engine.open(name)
        await use(engine, prompt, name)
    await engine.until(lambda: _holds(engine, 3520), "both held")
    await engine.driver.close_session("gone")
    await engine.driver.free_session("gone")
    await engine.until(lambda: _holds(engine, 320), "freed")
    assert (await found(engine, ids)).get("host", 0) == 0
    assert (await found(engine, other))["device"] == 304
    await engine.driver.free_session("gone")  # twice, or of nobody: harmless
    await engine.driver.free_session("never")
    await engine.driver.close_session("stays")


async def test_what_conversations_share_stays_for_the_other(engine: Any) -> None:
    shared = engine.ids(160)
    one, two = [*shared, *engine.ids(160)], [*shared, *engine.ids(160)]
    for name, prompt in (("one", one), ("two", two)):
        await engine.open(name)
        await use(engine, prompt, name)
    await engine.driver.close_session("one")
    await engine.driver.free_session("one")
    assert (await found(engine, two))["device"] == 304
    assert (await found(engine, one))["device"] == 160
    await engine.driver.close_session("two")


async def _holds(engine: Any, tokens: int) -> bool:
    return await engine.held_tokens() == tokens
