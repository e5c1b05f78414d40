"""Cached tokens over a conversation, and the hand-off of its first turn between two engines."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

PAGE = 64
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "read_file",
            "description": "Read a file.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}},
                "required": ["path"],
            },
        },
    }
]


def cached(usage: dict[str, Any]) -> int:
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def handoffs(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.kv.json")]


async def test_every_turn_finds_the_turn_before_but_for_a_page(engine: Any) -> None:
    history: list[dict[str, Any]] = [{"role": "system", "content": "You read files. " * 100}]
    known = 0
    for turn in range(6):
        history.append({"role": "user", "content": f"Please read src/part{turn}.py"})
        for _ in range(2):  # the call, then the answer
            body = {"messages": history, "tools": TOOLS, "session_id": "c"}
            told = await engine.ok("/v1/chat/completions", body)
            usage = told["usage"]
            assert cached(usage) >= known - PAGE
            if known:
                assert cached(usage) > 0
            # The last token of an output has no KV until it is read.
            known = usage["total_tokens"] - 1
            message = told["choices"][0]["message"]
            if calls := message.get("tool_calls"):
                for call in calls:  # as clients do: parse and write again
                    spelled = json.loads(call["function"]["arguments"])
                    call["function"]["arguments"] = json.dumps(spelled, separators=(",", ":"))
                history.append(message)
                result = {
                    "role": "tool",
                    "tool_call_id": calls[0]["id"],
                    "content": f"{turn} " * 99,
                }
                history.append(result)
            else:
                history.append({"role": "assistant", "content": message["content"]})
    assert known > 1000


async def test_a_conversation_of_token_ids_finds_its_outputs_too(engine: Any) -> None:
    ids = list(range(1000, 2000))
    known = 0
    for turn in range(4):
        body = {"prompt": ids, "max_tokens": 90, "ignore_eos": True, "return_token_ids": True}
        told = await engine.ok("/v1/completions", body)
        assert cached(told["usage"]) >= known - PAGE
        ids = [*ids, *told["choices"][0]["token_ids"]]
        known = len(ids) - 1
        ids += [turn + 7] * 30
    assert known > 1300


async def test_a_conversation_of_text_finds_its_outputs_too(engine: Any) -> None:
    text, known = "The story so far: " * 50, 0
    for _ in range(4):
        told = await engine.ok("/v1/completions", {"prompt": text, "max_tokens": 90})
        assert cached(told["usage"]) >= known - PAGE
        known = told["usage"]["total_tokens"] - 2
        text += told["choices"][0]["text"] + "\nAnd then?"


async def test_equal_prompts_get_equal_answers_on_different_engines(start_engine: Any) -> None:
    body = {"messages": [{"role": "user", "content": "Read a/b.py"}], "tools": TOOLS}
    one, other = [await start_engine(engine_id=name) for name in ("d0", "d1")]
    answers = [
        (await engine.ok("/v1/chat/completions", body))["choices"] for engine in (one, other)
    ]
    assert answers[0] == answers[1]


async def test_namespaces_do_not_share_kv(engine: Any) -> None:
    body = {"prompt": [9] * 200, "max_tokens": 1}
    await engine.ok("/v1/completions", {**body, "extra_key": "tenant-a"})
    other = await engine.ok("/v1/completions", {**body, "extra_key": "tenant-b"})
    same = await engine.ok("/v1/completions", {**body, "extra_key": "tenant-a"})
    assert (cached(other["usage"]), cached(same["usage"])) == (0, 192)


async def test_a_hand_off(
    start_engine: Any, ack_server: Any, manual_clock: Any, tmp_path: Path
) -> None:
    clock = manual_clock()
    shared = {"store_dir": tmp_path, "ack_url": ack_server.url, "model_name": "m"}
    prefiller = await start_engine(role="prefill", engine_id="p0", clock=clock, **shared)
    early, late = [
        await start_engine(role="decode", engine_id=name, **shared) for name in ("d0", "d1")
    ]
    messages = [{"role": "user", "content": "Explain the ledger. " * 400}]
    ids = (await prefiller.ok("/v1/tokenize", {"messages": messages}))["tokens"]
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 0}, "rid": "turn-1"}
    body["routing_key"] = "a conversation"
    call = asyncio.create_task(prefiller.ok("/generate", body))
    await clock.armed()
    while prefiller.engine.service.runtime.rids():
        await clock.fire_next()
    assert (await call)["meta_info"]["prompt_tokens"] == len(ids)

    # The race: the reply is there, the pages are not.
    chat = {"messages": messages, "input_ids": ids}
    assert not ack_server.received
    raced = await early.ok("/v1/chat/completions", chat)
    assert cached(raced["usage"]) == 0

    ack_server.statuses = [503]  # lost once, sent again
    await clock.fire_next()
    await ack_server.wait(2)
    ack = ack_server.received[-1]
    assert ack["engine"] == "p0"
    assert ack["tokens"] == len(ids) // PAGE * PAGE
    assert handoffs(tmp_path) == [f"{ack['key']}.kv.json"]
    handed = await late.ok("/v1/chat/completions", {**chat, "return_cached_tokens_details": True})
    assert cached(handed["usage"]) >= len(ids) - PAGE - 1
    details = handed["sglext"]["cached_tokens_details"]
    assert (details["device"], details["storage"]) == (0, cached(handed["usage"]))
    assert handed["choices"] == raced["choices"]

    # The next turn extends the history and lives on the decoder alone.
    history = [
        *messages,
        {"role": "assistant", "content": handed["choices"][0]["message"]["content"]},
        {"role": "user", "content": "And then?"},
    ]
    tail = await late.ok(
        "/v1/chat/completions", {"messages": history, "return_cached_tokens_details": True}
    )
    assert cached(tail["usage"]) >= handed["usage"]["total_tokens"] - 1 - PAGE
    assert tail["sglext"]["cached_tokens_details"]["storage"] == 0
    assert len(handoffs(tmp_path)) == 1  # decoders write nothing


async def test_a_prompt_below_a_page_is_not_handed_over(
    start_engine: Any, ack_server: Any, tmp_path: Path
) -> None:
    prefiller = await start_engine(role="prefill", store_dir=tmp_path, ack_url=ack_server.url)
    body = {"sampling_params": {"max_new_tokens": 0}, "routing_key": "c"}
    await prefiller.ok("/generate", {**body, "input_ids": [1] * 63})
    await prefiller.ok("/generate", {**body, "input_ids": [1] * 64})
    await ack_server.wait(1)
    assert [ack["tokens"] for ack in ack_server.received] == [64]


async def test_parked_kv_comes_back_from_the_host(start_engine: Any) -> None:
    engine = await start_engine(kv_capacity_tokens=6400, host_capacity_tokens=64_000)
    first = {"prompt": [1] * 3000, "max_tokens": 1}
    await engine.ok("/v1/completions", first)
    for other in (2, 3, 4):
        await engine.ok("/v1/completions", {"prompt": [other] * 3000, "max_tokens": 1})
    again = await engine.ok("/v1/completions", {**first, "return_cached_tokens_details": True})
    details = again["sglext"]["cached_tokens_details"]
    assert details["host"] + details["device"] == cached(again["usage"]) == 2944
    assert details["host"] > 0


async def test_an_open_session_keeps_its_place_on_the_device(start_engine: Any) -> None:
    engine = await start_engine(kv_capacity_tokens=6400, host_capacity_tokens=64_000)
    first = {"prompt": [1] * 3000, "max_tokens": 1, "session_id": "s"}
    await engine.ok("/open_session", {"session_id": "s", "capacity_of_str_len": 9})
    await engine.ok("/v1/completions", first)
    for other in (2, 3, 4):
        await engine.ok("/v1/completions", {"prompt": [other] * 3000, "max_tokens": 1})
    again = await engine.ok("/v1/completions", {**first, "return_cached_tokens_details": True})
    assert again["sglext"]["cached_tokens_details"] == {"device": 2944, "host": 0}
