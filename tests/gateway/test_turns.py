"""Turns over real sockets, all going well: placement, hand-off, headers, streams, identity."""

from __future__ import annotations

import asyncio
import json
from typing import Any


async def test_first_turn_is_prefilled_handed_over_and_pinned(
    make_cluster: Any, long_text: str
) -> None:
    cluster = await make_cluster()
    first = await cluster.chat("c1", long_text)
    assert first.status == 200
    assert first.headers["x-conserve-conversation-id"] == "c1"
    assert first.headers["x-conserve-identity-source"] == "conserve"
    assert first.headers["x-conserve-turn-index"] == "1"
    assert first.headers["x-conserve-prefill-engine"] == "p0"
    assert first.headers["x-conserve-transfers"] == "1"
    assert first.headers["x-conserve-reason"] == "first_turn_handoff"
    assert float(first.headers["x-conserve-overhead-ms"]) < 1000
    home = first.headers["x-conserve-decode-engine"]
    decoder, prefiller = cluster.engines[home], cluster.prefillers[0]

    (prefilled,) = prefiller.bodies("/generate")
    (sent,) = decoder.bodies("/v1/chat/completions")
    assert prefilled["sampling_params"] == {"max_new_tokens": 0}
    assert prefilled["routing_key"] == decoder.bodies("/open_session")[0]["session_id"]
    assert sent["input_ids"] == prefilled["input_ids"]  # the very same ids on both sides
    assert sent["messages"] == [{"role": "user", "content": long_text}]
    (opened,) = decoder.bodies("/open_session")
    assert sent["session_id"] == opened["session_id"]
    assert first.headers["x-conserve-cached-tokens"] == str(len(prefilled["input_ids"]) // 16 * 16)

    for number in range(2, 5):
        tail = await cluster.chat("c1", long_text, *["again"] * (2 * number - 2))
        assert tail.headers["x-conserve-decode-engine"] == home
        assert tail.headers["x-conserve-reason"] == "pinned"
        assert tail.headers["x-conserve-turn-index"] == str(number)
        assert tail.headers["x-conserve-transfers"] == "1"
    assert len(prefiller.bodies("/generate")) == 1
    assert len(decoder.bodies("/open_session")) == 1
    assert "input_ids" not in decoder.bodies("/v1/chat/completions")[-1]
    # Tail turns go before first turns where the engine knows priorities.
    assert [b["priority"] for b in decoder.bodies("/v1/chat/completions")] == [0, 1, 1, 1]
    cluster.settled()

    seen = (await cluster.ask("GET", "/conserve/v1/conversations/c1")).json()
    assert seen["turns"] == 4
    assert seen["transfers_by_reason"] == {"first_turn": 1}
    assert [turn["outcome"] for turn in seen["recent_turns"]] == ["finished"] * 4
    counters = (await cluster.ask("GET", "/conserve/v1/cluster")).json()["counters"]
    assert counters["transfers_by_reason"] == {"first_turn": 1}
    assert counters["shortfall_turns"] == 0


async def test_short_first_turn_stays_on_its_decoder(make_cluster: Any) -> None:
    cluster = await make_cluster()
    answer = await cluster.chat("c1", "hi")
    assert answer.headers["x-conserve-reason"] == "first_turn_short"
    assert answer.headers["x-conserve-prefill-engine"] == answer.headers["x-conserve-decode-engine"]
    assert answer.headers["x-conserve-transfers"] == "0"
    assert cluster.prefillers[0].bodies("/generate") == []
    cluster.settled()


async def test_body_reaches_the_engine_unchanged_but_for_added_fields(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    raw = (
        '{ "model":"qwen", "messages":[ {"role":"user","content":"ünïcode \\u00e9"} ],\n"x":1.50 }'
    )
    answer = await cluster.ask("POST", "/v1/chat/completions", raw.encode())
    assert answer.status == 200
    (sent,) = cluster.decoders[0].bodies("/v1/chat/completions")
    added = {key: sent.pop(key) for key in ("rid", "session_id", "priority")}
    assert sent == json.loads(raw)
    assert added["rid"]
    # Credentials are between the client and the gateway.
    assert not [h for h in cluster.decoders[0].headers if "authorization" in h]


async def test_stream_is_passed_on_untouched(make_cluster: Any, body: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    asked = body("hi", stream=True, stream_options={"include_usage": True})
    answer = await cluster.ask("POST", "/v1/chat/completions", asked)
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["x-engine"] == "fake"
    events = [e for e in answer.body.split(b"\n\n") if e]
    assert len(events) == 5  # three tokens, usage, end
    assert json.loads(events[3].removeprefix(b"data: "))["usage"]["completion_tokens"] == 3
    assert events[4] == b"data: [DONE]"


async def test_usage_event_nobody_asked_for_is_removed(make_cluster: Any, body: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    asked = body("hi", stream=True, stream_options={"continuous_usage_stats": False})
    answer = await cluster.ask(
        "POST", "/v1/chat/completions", asked, {"x-conserve-conversation-id": "c"}
    )
    events = [e for e in answer.body.split(b"\n\n") if e]
    assert len(events) == 4
    assert events[-1] == b"data: [DONE]"
    assert b'"completion_tokens"' not in answer.body
    (sent,) = cluster.decoders[0].bodies("/v1/chat/completions")
    assert sent["stream_options"] == {"continuous_usage_stats": False, "include_usage": True}
    seen = (await cluster.ask("GET", "/conserve/v1/conversations/c")).json()
    assert seen["output_tokens"] == 3  # counted all the same


async def test_first_token_is_passed_on_before_the_second_exists(
    make_cluster: Any, reply: Any, body: Any
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    more = asyncio.Event()
    cluster.decoders[0].replies.append(reply(after_first=more))
    response = await cluster.send("POST", "/v1/chat/completions", body("hi", stream=True))
    async with asyncio.timeout(5):
        first = await anext(aiter(response))
    assert b"w0" in first
    assert b"w1" not in first
    more.set()
    assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_token_id_prompts_are_counted_and_handed_over(make_cluster: Any) -> None:
    cluster = await make_cluster()
    ids = list(range(1, 201))
    asked = {"model": "qwen", "prompt": ids, "max_tokens": 4, "stream": True}
    answer = await cluster.ask(
        "POST", "/v1/completions", asked, {"x-conserve-conversation-id": "t"}
    )
    assert answer.status == 200
    assert answer.headers["x-conserve-reason"] == "first_turn_handoff"
    assert cluster.prefillers[0].bodies("/v1/tokenize") == []
    assert cluster.prefillers[0].bodies("/generate")[0]["input_ids"] == ids
    decoder = cluster.engines[answer.headers["x-conserve-decode-engine"]]
    (sent,) = decoder.bodies("/v1/completions")
    assert sent["prompt"] == ids
    assert "input_ids" not in sent  # that API has no such field
    again = {**asked, "prompt": [*ids, 7, 8, 9]}
    tail = await cluster.ask("POST", "/v1/completions", again, {"x-conserve-conversation-id": "t"})
    assert tail.headers["x-conserve-reason"] == "pinned"
    seen = (await cluster.ask("GET", "/conserve/v1/conversations/t")).json()
    assert seen["context_tokens"] == 203 + 3
    cluster.settled()


async def test_conversations_of_different_tenants_do_not_meet(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0)
    mine, theirs = {"authorization": "Bearer mine"}, {"authorization": "Bearer theirs"}
    await cluster.chat("same", "hello", headers=mine)
    second = await cluster.chat("same", "hello", headers=theirs)
    assert second.headers["x-conserve-turn-index"] == "1"
    path = "/conserve/v1/conversations/same"
    assert (await cluster.ask("GET", path, headers=mine)).status == 200
    assert (await cluster.ask("GET", path)).status == 404
    assert (await cluster.ask("DELETE", path)).status == 404


async def test_conversation_without_an_id_is_followed_by_lineage(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0)
    first = await cluster.chat(None, "who are you?")
    assert first.headers["x-conserve-identity-source"] == "lineage"
    id = first.headers["x-conserve-conversation-id"]
    second = await cluster.chat(None, "who are you?", "me", "and then?")
    assert second.headers["x-conserve-conversation-id"] == id
    assert second.headers["x-conserve-turn-index"] == "2"
    again = await cluster.chat(None, "who are you?", "me", "and then?")  # a retry
    assert again.headers["x-conserve-conversation-id"] == id
    assert again.headers["x-conserve-turn-index"] == "2"
    fork = await cluster.chat(None, "who are you?", "somebody else", "oh?")
    forked = fork.headers["x-conserve-conversation-id"]
    assert forked != id
    assert (await cluster.ask("GET", f"/conserve/v1/conversations/{forked}")).json()["parent"] == id
    other = await cluster.chat(None, "something else")
    assert other.headers["x-conserve-conversation-id"] not in (id, forked)


async def test_equal_first_turns_at_the_same_time_are_two_conversations(
    make_cluster: Any, reply: Any
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    go = asyncio.Event()
    cluster.decoders[0].replies += [reply(before=go), reply(before=go)]
    first = asyncio.ensure_future(cluster.chat(None, "sample"))
    await cluster.decoders[0].until("/v1/chat/completions")
    second = asyncio.ensure_future(cluster.chat(None, "sample"))
    await cluster.decoders[0].until("/v1/chat/completions")
    go.set()
    ids = {(await t).headers["x-conserve-conversation-id"] for t in (first, second)}
    assert len(ids) == 2


async def test_retry_of_a_call_is_no_new_turn(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0)
    one, two = {"x-conserve-turn-id": "t1"}, {"x-conserve-turn-id": "t2"}
    assert (await cluster.chat("c", "a", headers=one)).headers["x-conserve-turn-index"] == "1"
    assert (await cluster.chat("c", "a", headers=one)).headers["x-conserve-turn-index"] == "1"
    tail = await cluster.chat("c", "a", "b", "c", headers=two)
    assert tail.headers["x-conserve-turn-index"] == "2"
    seen = (await cluster.ask("GET", "/conserve/v1/conversations/c")).json()
    assert seen["turns"] == 2


async def test_retries_of_many_parallel_calls_are_no_new_turns(
    make_cluster: Any, reply: Any
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    calls = [{"x-conserve-turn-id": f"t{n}"} for n in range(30)]
    cluster.decoders[0].replies = [reply(status=400, body=b"{}") for _ in calls]
    refused = [await cluster.chat("c", f"q{n}", headers=call) for n, call in enumerate(calls)]
    again = [await cluster.chat("c", f"q{n}", headers=call) for n, call in enumerate(calls)]
    assert {reply.status for reply in refused} == {400} and {r.status for r in again} == {200}
    indexes = [reply.headers["x-conserve-turn-index"] for reply in again]
    assert indexes == [reply.headers["x-conserve-turn-index"] for reply in refused]
    seen = (await cluster.ask("GET", "/conserve/v1/conversations/c")).json()
    assert seen["turns"] == 30


async def test_life_cycle_open_look_end(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    opened = await cluster.ask("POST", "/conserve/v1/conversations", {"id": "a/b c%"})
    assert opened.status == 400  # a space is not legal
    opened = await cluster.ask(
        "POST", "/conserve/v1/conversations", {"id": "a/b%2F", "parent": "boss"}
    )
    assert opened.status == 201
    assert opened.json()["state"] == "open"
    named = (await cluster.ask("POST", "/conserve/v1/conversations")).json()["id"]
    assert named.startswith("conv-")
    answer = await cluster.chat("a/b%2F", "hello")
    assert answer.status == 200
    path = "/conserve/v1/conversations/a%2Fb%252F"
    seen = await cluster.ask("GET", path)
    assert (seen.json()["turns"], seen.json()["parent"]) == (1, "boss")
    state = cluster.gateway.runtime.scheduler.engines["d0"]
    assert state.held_tokens > 0
    ended = await cluster.ask("DELETE", path)
    assert ended.json()["state"] == "ended"
    assert state.held_tokens == 0  # its KV is free
    await cluster.decoders[0].until("/close_session")
    assert (await cluster.ask("DELETE", path)).status == 200
    listed = (await cluster.ask("GET", "/conserve/v1/conversations?limit=1")).json()
    assert len(listed["conversations"]) == 1
    assert listed["open"] == 1
    fresh = await cluster.chat("a/b%2F", "hello")  # the same id again is a new conversation
    assert fresh.headers["x-conserve-turn-index"] == "1"


async def test_final_turn_ends_its_conversation(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    await cluster.chat("c", "bye", headers={"x-conserve-final": "1"})
    assert (await cluster.ask("GET", "/conserve/v1/conversations/c")).json()["state"] == "ended"
    assert cluster.gateway.runtime.scheduler.open_conversations == 0


async def test_placement_token_brings_a_conversation_home(make_cluster: Any, body: Any) -> None:
    key = {"placement_key": "0123456789abcdef"}
    cluster = await make_cluster(prefillers=0, gateway=key)
    await cluster.chat("other", "x" * 4000)  # so that d1 would be the emptier one
    first = await cluster.chat("c", "hello")
    home, token = (
        first.headers["x-conserve-decode-engine"],
        first.headers["x-conserve-placement"],
    )
    restarted = await make_cluster(prefillers=0, decoders=cluster.decoders, gateway=key, wait=True)
    named = {"x-conserve-placement": token, "x-conserve-turn-index": "2"}
    tail = await restarted.chat("c", "hello", "hi", "how?", headers=named)
    assert tail.headers["x-conserve-decode-engine"] == home
    assert tail.headers["x-conserve-reason"] in ("pinned", "adopted")
    assert tail.headers["x-conserve-turn-index"] == "2"
    forged = await restarted.chat("d", "hello", headers={"x-conserve-placement": token})
    assert forged.headers["x-conserve-turn-index"] == "1"  # another conversation's token


async def test_models_health_ready_metrics_tokenize(make_cluster: Any) -> None:
    cluster = await make_cluster()
    models = (await cluster.ask("GET", "/v1/models")).json()
    assert [card["id"] for card in models["data"]] == ["qwen"]
    assert (await cluster.ask("GET", "/v1/models/qwen")).json()["max_model_len"] == 50_000
    assert (await cluster.ask("GET", "/health")).status == 200
    assert (await cluster.ask("GET", "/ready")).status == 200
    asked = {"model": "qwen", "prompt": "abcd" * 5}
    assert len((await cluster.ask("POST", "/v1/tokenize", asked)).json()["tokens"]) == 5
    await cluster.chat("some-secret-id", "hello")
    text = (await cluster.ask("GET", "/metrics")).body.decode()
    assert 'conserve_turns_total{outcome="finished"} 1.0' in text
    assert 'conserve_engine_kv_tokens{engine="d0",kind="capacity",tier="decode"}' in text
    assert "some-secret-id" not in text


async def test_turn_index_of_a_conversation_that_lived_before(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0)
    answer = await cluster.chat("c", "hi", "a", "b", headers={"x-conserve-turn-index": "2"})
    assert answer.headers["x-conserve-turn-index"] == "2"
    third = await cluster.chat("c", "hi", "a", "b", "c", "d")
    assert third.headers["x-conserve-turn-index"] == "3"


async def test_parallel_calls_that_open_a_conversation_may_arrive_in_any_order(
    make_cluster: Any, reply: Any
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    go = asyncio.Event()
    cluster.decoders[0].replies += [reply(before=go) for _ in range(3)]
    pending = []
    for n in ("3", "1", "2"):
        headers = {"x-conserve-turn-id": f"t{n}", "x-conserve-turn-index": n}
        pending.append(asyncio.ensure_future(cluster.chat("c", f"q{n}", headers=headers)))
        await cluster.decoders[0].until("/v1/chat/completions")
    go.set()
    indexes = [(await one).headers["x-conserve-turn-index"] for one in pending]
    assert indexes == ["3", "1", "2"]
    after = await cluster.chat("c", "q4", headers={"x-conserve-turn-id": "t4"})
    assert after.headers["x-conserve-turn-index"] == "4"


async def test_parallel_calls_of_other_clients_are_turns_of_their_own(
    make_cluster: Any, reply: Any
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    session = {"x-session-id": "s"}  # and no id of the call
    cluster.decoders[0].replies += [reply(status=400, body=b"{}")]
    refused = await cluster.chat(None, "q0", headers=session)
    go = asyncio.Event()
    cluster.decoders[0].replies += [reply(before=go) for _ in range(3)]
    pending = []
    await cluster.decoders[0].until("/v1/chat/completions")
    for n in range(3):
        pending.append(asyncio.ensure_future(cluster.chat(None, f"q{n}", headers=session)))
        await cluster.decoders[0].until("/v1/chat/completions")
    go.set()
    answers = [refused, *[await one for one in pending]]
    answers.append(await cluster.chat(None, "q4", headers=session))
    indexes = [answer.headers["x-conserve-turn-index"] for answer in answers]
    assert indexes == ["1", "1", "2", "3", "4"]


async def test_decisions_are_journalled_while_the_gateway_runs(
    make_cluster: Any, tmp_path: Any
) -> None:
    path = tmp_path / "journal.jsonl"
    cluster = await make_cluster(
        prefillers=0, gateway={"decision_journal": str(path), "stall_timeout_s": 0.2}
    )
    await cluster.chat("c", "hi")
    await cluster.until(lambda: "TurnFinished" in path.read_text())
    kinds = [json.loads(line)["event"]["kind"] for line in path.read_text().splitlines()]
    assert kinds.index("TurnArrived") < kinds.index("TurnFinished")
