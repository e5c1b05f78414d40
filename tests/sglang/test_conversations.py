"""The main job on real SGLang: one hand-off, then one decoder, and the text of one engine alone."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.sglang

PAGE = 16
#: (new tokens, answer) of each turn; the last kind appends more than it was asked first.
SHAPES = [
    [(700, 12), (30, 8), (60, 8), (17, 24)],
    [(333, 8), (16, 8), (500, 8), (31, 8)],
    [(1201, 4), (47, 30), (15, 4), (80, 8)],
    [(96, 8), (64, 8), (1500, 8), (5, 16)],
]


def alone(engine: Any, shape: list[tuple[int, int]], random_ids: Any) -> list[Any]:
    """The conversation on one engine that serves nothing else: prompt and answer of each turn."""
    turns: list[tuple[list[int], list[int]]] = []
    context: list[int] = []
    for new, tokens in shape:
        prompt = [*context, *random_ids(new)]
        sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        reply = engine.post("/generate", {"input_ids": prompt, "sampling_params": sampling})
        turns.append((prompt, reply["output_ids"]))
        context = [*prompt, *reply["output_ids"]]
    engine.flush()
    return turns


def prefilled_tokens(engine: Any) -> int:
    """Prompt tokens an engine has computed since it started."""
    status, text = engine.call("GET", "/v1/loads?include=core")
    assert status == 200
    return sum(int(rank["total_prefill_uncached_tokens"]) for rank in json.loads(text)["loads"])


def test_one_hand_off_then_one_decoder_and_the_same_text(
    gateway: Any, bed: Any, random_ids: Any
) -> None:
    references = [alone(bed.decoders[0], shape, random_ids) for shape in SHAPES]
    before = prefilled_tokens(bed.prefiller)

    def converse(number: int) -> None:
        homes = set()
        for index, (prompt, answer) in enumerate(references[number], start=1):
            reply = gateway.complete(f"c{number}", prompt, len(answer))
            assert reply.status == 200, reply.body
            assert reply.choice["token_ids"] == answer, f"turn {index}"
            assert reply.headers["x-conserve-turn-index"] == str(index)
            assert reply.headers["x-conserve-transfers"] == "1"
            homes.add(reply.headers["x-conserve-decode-engine"])
            if index == 1:
                assert reply.headers["x-conserve-prefill-engine"] == "p0"
                assert reply.cached_tokens >= len(prompt) - PAGE - 1
            else:
                assert reply.headers["x-conserve-prefill-engine"] in homes
                known = len(references[number][index - 2][0]) + SHAPES[number][index - 2][1]
                assert reply.cached_tokens >= known - PAGE - 1
        assert len(homes) == 1

    with ThreadPoolExecutor(len(SHAPES)) as pool:
        list(pool.map(converse, range(len(SHAPES))))

    counters = gateway.cluster()["counters"]
    assert counters["transfers_by_reason"] == {"first_turn": len(SHAPES)}
    assert counters["fallbacks_by_reason"] == {}
    assert counters["cached_token_shortfall_tokens"] == 0
    first_turns = sum(len(turns[0][0]) for turns in references)
    assert prefilled_tokens(bed.prefiller) - before <= first_turns  # and no tail turn


TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Read a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}


def test_chat_with_tools_is_the_same_text(gateway: Any, bed: Any) -> None:
    """Rendered once by the server's own tokenizer and template, tools included."""
    messages: list[Any] = [
        {"role": "system", "content": "You look after conversations. " * 12},
        {"role": "user", "content": "Which decoder holds the KV cache of this conversation?"},
    ]
    more = {"tools": [TOOL], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    steps: list[tuple[list[Any], Any]] = []
    for turn in range(3):
        body = {"model": "tiny", "messages": messages, **more}
        message = bed.decoders[0].post("/v1/chat/completions", body)["choices"][0]["message"]
        steps.append((list(messages), message))
        call = {
            "id": f"call_{turn}",
            "type": "function",
            "function": {"name": "read_file", "arguments": json.dumps({"path": f"{turn}.py"})},
        }
        messages += [
            {"role": "assistant", "content": message["content"], "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"call_{turn}", "content": "def turn(): pass\n" * 9},
        ]
    bed.decoders[0].flush()
    for sent, message in steps:
        reply = gateway.chat("tools", sent, **{k: v for k, v in more.items() if k != "temperature"})
        assert reply.status == 200, reply.body
        assert reply.choice["message"]["content"] == message["content"]
    assert gateway.conversation("tools")["transfers"] == 1
    assert gateway.cluster()["counters"]["cached_token_shortfall_tokens"] == 0


def test_a_stream_is_the_same_text(gateway: Any, bed: Any, random_ids: Any) -> None:
    (prompt, answer), *_ = alone(bed.decoders[0], [(400, 20)], random_ids)
    body = {"model": "tiny", "prompt": prompt, "max_tokens": len(answer), "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    headers = {"X-ConServe-Conversation-ID": "s"}
    reply = gateway.ask("POST", "/v1/completions", body, headers)
    lines = [line for line in reply.body.decode().split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    ids = [one for event in events for c in event["choices"] for one in c.get("token_ids") or ()]
    assert ids == answer
    assert events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(prompt) - PAGE - 1


def test_the_same_prompt_again_is_handed_over_again(
    gateway: Any, bed: Any, random_ids: Any
) -> None:
    """What the store has lost meanwhile is stored anew, though the prefiller computes nothing."""
    shared = random_ids(600)
    homes = bed.store / "tiny" / "conversations"
    for number in range(3):
        conversation = f"again{number}"
        reply = gateway.complete(conversation, [*shared, *random_ids(40 * (number % 2))], 4)
        assert reply.headers["x-conserve-prefill-engine"] == "p0"
        gateway.end(conversation)
        gateway.until(lambda: not list(homes.iterdir()))
        for decoder in bed.decoders:
            decoder.flush()
    counters = gateway.cluster()["counters"]
    assert counters["transfers_by_reason"] == {"first_turn": 3}
    assert counters["fallbacks_by_reason"] == {}
    assert counters["cached_token_shortfall_tokens"] == 0


def test_replay_of_twenty_conversations(gateway: Any, bed: Any, tmp_path: Path) -> None:
    """Token counts drawn from SWE-bench's quantiles, times 0.05: the tiny model's context."""
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "conserve_serving.cli", "replay", "generated:swebench"]
    command += ["--gateway", gateway.url, "--no-progress", "--conversations", "20"]
    command += ["--max-turns", "5", "--scale", "0.05", "--rate", "2", "--json", str(out)]
    command += ["--vocabulary", "2048"]
    before = prefilled_tokens(bed.prefiller)
    done = subprocess.run(  # noqa: S603 -- our own command
        command, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())
    assert figures["conversations_complete"] == figures["conversations"] == 20
    assert figures["errors"] == {}
    transfers = figures["transfers_per_conversation"]
    assert (transfers["mean"], transfers["max"]) == (1, 1)
    assert transfers["by_reason"] == {"first_turn": 20}
    assert figures["tail_turns_on_pinned_decoder"] == 1.0
    assert figures["cached_token_shortfall"] == 0
    records = figures["turn_records"]
    turns = [dict(zip(records["columns"], row, strict=True)) for row in records["rows"]]
    firsts = [turn for turn in turns if turn["turn"] == 1]
    assert len(firsts) == 20
    for turn in firsts:
        assert turn["cached_tokens"] >= turn["prompt_tokens"] - PAGE - 1
        assert turn["prefill_engine"] == "p0"
    assert {turn["prefill_engine"] for turn in turns if turn["turn"] > 1} <= {"d0", "d1"}
    first_tokens = sum(turn["prompt_tokens"] for turn in firsts)
    assert prefilled_tokens(bed.prefiller) - before <= first_tokens


def test_requests_of_others_beside_the_gateway_do_no_harm(
    gateway: Any, bed: Any, random_ids: Any
) -> None:
    """Somebody else's traffic on the same engines: the store keeps nothing for it for long."""
    references = alone(bed.decoders[0], [(300, 8), (20, 8)], random_ids)
    stop = threading.Event()

    def bother() -> None:
        while not stop.is_set():
            body = {"input_ids": random_ids(200), "sampling_params": {"max_new_tokens": 4}}
            bed.prefiller.post("/generate", body)

    other = threading.Thread(target=bother)
    other.start()
    try:
        for prompt, answer in references:
            reply = gateway.complete("mine", prompt, len(answer))
            assert reply.choice["token_ids"] == answer
    finally:
        stop.set()
        other.join()
    assert gateway.cluster()["counters"]["transfers_by_reason"] == {"first_turn": 1}
