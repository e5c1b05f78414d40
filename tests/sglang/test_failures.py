"""What breaks on the way of a hand-off costs time, never a conversation and never its text."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

pytestmark = pytest.mark.sglang

PAGE = 16


def reference(engine: Any, prompt: list[int], tokens: int) -> list[int]:
    """The answer of one engine alone."""
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    reply = engine.post("/generate", {"input_ids": prompt, "sampling_params": sampling})
    engine.flush()
    answer: list[int] = reply["output_ids"]
    return answer


def test_acknowledgement_that_comes_late(make_gateway: Any, bed: Any, random_ids: Any) -> None:
    prompt = random_ids(500)
    answer = reference(bed.decoders[0], prompt, 12)
    gateway = make_gateway(handoff_ack_timeout_s=0.5)
    bed.acks.hold()
    reply = gateway.complete("late", prompt, 12)
    assert reply.choice["token_ids"] == answer
    assert gateway.counter("fallbacks_by_reason") == {"ack_late": 1}
    bed.acks.release()  # when nobody waits any more
    context = [*prompt, *answer]
    again = gateway.complete("late", [*context, *random_ids(30)], 4)
    assert again.cached_tokens >= len(context) - PAGE - 1
    assert again.headers["x-conserve-reason"] == "pinned"
    assert gateway.complete("next", random_ids(500), 4).headers["x-conserve-prefill-engine"] == "p0"


def test_store_that_is_full(make_gateway: Any, bed: Any, random_ids: Any) -> None:
    gateway = make_gateway()
    gateway.complete("before", random_ids(200), 4)
    # More than the store may hold, in use by a conversation that has just begun.
    page = bed.store / "tiny" / "pages" / "ff" / f"{'f' * 64}.t0"
    page.parent.mkdir(exist_ok=True)
    with page.open("wb") as file:
        file.truncate(2**40)  # a sparse file: no bytes
    link = bed.store / "tiny" / "conversations" / "hoarder" / page.name
    link.parent.mkdir()
    os.link(page, link)
    tried = []

    def refused() -> bool:
        prompt = random_ids(300)
        tried.append((prompt, gateway.complete(f"full{len(tried)}", prompt, 8)))
        return gateway.counter("fallbacks_by_reason").get("store_full", 0) > 0

    gateway.until(refused, within_s=30)  # the store looks around once in a while
    prompt, reply = tried[-1]
    assert reply.headers["x-conserve-prefill-engine"] != "p0"
    link.unlink()
    page.unlink()
    assert reply.choice["token_ids"] == reference(bed.decoders[0], prompt, 8)
    gateway.until(
        lambda: (
            gateway.complete(f"after{time.monotonic()}", random_ids(300), 4).headers[
                "x-conserve-prefill-engine"
            ]
            == "p0"
        )
    )


def test_partial_pages(make_gateway: Any, bed: Any, random_ids: Any) -> None:
    """Pages that vanish between the acknowledgement and the decoder's look: computed again."""
    prompt = random_ids(600)
    answer = reference(bed.decoders[0], prompt, 12)
    gateway = make_gateway()
    bed.acks.hold()
    with ThreadPoolExecutor(1) as pool:
        turn = pool.submit(gateway.complete, "partial", prompt, 12)
        bed.acks.wait()
        for page in (bed.store / "tiny" / "pages").rglob("*.t0"):
            page.unlink()
        bed.acks.release()
        reply = turn.result()
    assert reply.choice["token_ids"] == answer
    counters = gateway.cluster()["counters"]
    assert counters["cached_token_shortfall_tokens"] >= len(prompt) - 2 * PAGE


def running(engine: Any) -> int:
    _, text = engine.call("GET", "/v1/loads?include=core")
    loads = json.loads(text)["loads"]
    return sum(int(one["num_running_reqs"]) + int(one["num_waiting_reqs"]) for one in loads)


def test_prefiller_killed_after_before_and_during_its_prefill(
    make_gateway: Any, bed: Any, random_ids: Any
) -> None:
    short, next_one, long = random_ids(500), random_ids(500), random_ids(15_000)
    answers = [reference(bed.decoders[0], prompt, 8) for prompt in (short, next_one, long)]
    gateway = make_gateway(handoff_ack_timeout_s=60.0, health_failures=1)
    placed = lambda: gateway.counter("placements_by_reason")  # noqa: E731 -- read twice
    with ThreadPoolExecutor(1) as pool:
        # After: prefilled and stored, but nobody has said so yet.
        bed.acks.hold()
        turn: Future[Any] = pool.submit(gateway.complete, "after", short, 8)
        bed.acks.wait()
        bed.prefiller.kill()
        assert turn.result().choice["token_ids"] == answers[0]
        assert gateway.counter("fallbacks_by_reason") or placed().get("first_turn_no_prefiller")

        # Before: it is not there.
        gateway.until(lambda: gateway.engine("p0")["state"] != "ready")
        without = placed().get("first_turn_no_prefiller", 0)
        assert gateway.complete("before", next_one, 8).choice["token_ids"] == answers[1]
        assert placed()["first_turn_no_prefiller"] == without + 1

        # During: back again, and killed at work.
        bed.acks.reset()
        bed.acks.forward_to(gateway.url)
        bed.revive()
        gateway.until_ready("p0")
        failed = sum(gateway.counter("fallbacks_by_reason").values())
        without = placed()["first_turn_no_prefiller"]
        turn = pool.submit(gateway.complete, "during", long, 8)
        gateway.until(lambda: running(bed.prefiller) > 0)
        bed.prefiller.kill()
        assert turn.result().choice["token_ids"] == answers[2]
        counted = sum(gateway.counter("fallbacks_by_reason").values())
        assert counted + placed()["first_turn_no_prefiller"] > failed + without
    for name in ("after", "before", "during"):
        assert gateway.conversation(name)["transfers"] <= 1
        assert gateway.conversation(name)["turns"] == 1


def test_decoder_killed_in_the_tail(make_gateway: Any, bed: Any, random_ids: Any) -> None:
    """Its conversations go on elsewhere, with the right text; the move is counted."""
    first_prompt = random_ids(700)
    first = reference(bed.decoders[0], first_prompt, 8)
    second_prompt = [*first_prompt, *first, *random_ids(40)]
    second = reference(bed.decoders[0], second_prompt, 400)
    gateway = make_gateway()
    home = gateway.complete("c", first_prompt, 8).headers["x-conserve-decode-engine"]
    victim = bed.engines[home]
    reply: list[Any] = []

    def ask() -> None:
        reply.append(gateway.complete("c", second_prompt, 400))

    turn = threading.Thread(target=ask)
    turn.start()
    gateway.until(lambda: running(victim) > 0)
    victim.kill()
    turn.join(300)
    (answer,) = reply
    assert answer.status == 200, answer.body
    assert answer.choice["token_ids"] == second
    assert answer.headers["x-conserve-decode-engine"] != home
    # The move brings its pages through the store or not at all; either way it is counted.
    moved = gateway.counter("moves_by_reason")
    assert moved.get("engine_lost") == 1, moved
    assert gateway.conversation("c")["turns"] == 2
