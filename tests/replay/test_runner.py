"""The replayer against a scripted gateway on real sockets."""

from __future__ import annotations

import asyncio

import pytest

from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.replay.errors import GatewayUnusable, TurnFailure
from conserve_serving.replay.figures import figures
from conserve_serving.replay.gateway_api import GatewayApi, pool_for
from conserve_serving.replay.options import Clock, Options
from conserve_serving.replay.runner import Replay
from conserve_serving.replay.workload import Arrivals, Caps, select


def conversation(name: str = "c", turns: int = 3, **extra) -> Conversation:
    """Grows by an answer of 5 and 20 new tokens a turn, from 100."""
    made = [Turn(input_tokens=100, new_input_tokens=100, output_tokens=5)]
    for _ in range(turns - 1):
        kept = made[-1].context_tokens
        made.append(Turn(input_tokens=kept + 20, new_input_tokens=20, output_tokens=5, **extra))
    return Conversation(id=name, turns=tuple(made))


def replay(gateway, *conversations: Conversation, arrivals_s=None, clock=None, **options):
    pool = pool_for(gateway.url)
    run = Replay(
        api=GatewayApi(pool, url=gateway.url),
        model="m",
        workload=select(conversations, Caps(), name="test"),
        arrivals_s=arrivals_s or [0.0] * len(conversations),
        options=Options(**{"speed": 1000.0, "backoff_s": 0.0, "sample_every_s": 3600.0, **options}),
        clock=clock or Clock(now=asyncio.get_running_loop().time),
    )
    return run, pool


async def result_of(gateway, *conversations: Conversation, **options):
    run, pool = replay(gateway, *conversations, **options)
    try:
        return await run.run(arrivals=Arrivals.POISSON, rate_per_s=1.0)
    finally:
        pool.close()


async def test_a_conversation_extends_its_own_history_and_is_ended(gateway) -> None:
    result = await result_of(gateway, conversation())
    (record,) = result.conversations
    assert record.complete
    first, second, third = gateway.prompts["replay-0-c"]
    assert [len(p) for p in (first, second, third)] == [100, 125, 150]
    assert second[:105] == first + [91_000 + i for i in range(5)]
    assert third[:130] == second + [92_000 + i for i in range(5)]
    assert [t.cached_tokens for t in record.turns] == [0, 96, 128]
    assert [t.decode_engine for t in record.turns] == ["d0"] * 3
    assert gateway.ended == ["replay-0-c"]
    times = [(t.due_s, t.first_token_s, t.last_token_s) for t in record.turns]
    flat = [t for triple in times for t in triple]
    assert flat == sorted(flat) and flat[0] == 0.0


async def test_requests_ask_for_exact_counts_and_carry_the_tags(gateway) -> None:
    await result_of(gateway, conversation(turns=2))
    first, second = gateway.requests
    body = first["body"]
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (5, 5, True)
    assert body["stream"] and body["stream_options"] == {"include_usage": True}
    assert first["headers"]["x-conserve-first-turn-tokens"] == "100"
    assert "x-conserve-placement" not in first["headers"]
    assert second["headers"]["x-conserve-placement"] == "token-1"
    assert second["headers"]["x-conserve-turn-index"] == "2"
    assert second["headers"]["x-conserve-first-turn-tokens"] == "100"
    assert first["headers"]["x-conserve-turn-id"] != second["headers"]["x-conserve-turn-id"]


async def test_a_rewrite_drops_the_tail_of_the_context(gateway) -> None:
    turns = (
        Turn(input_tokens=100, new_input_tokens=100, output_tokens=5),
        Turn(input_tokens=90, new_input_tokens=50, output_tokens=5),
    )
    await result_of(gateway, Conversation(id="c", turns=turns))
    first, second = gateway.prompts["replay-0-c"]
    assert len(second) == 90
    assert second[:40] == first[:40]
    assert second[40] != first[40]


async def test_equal_seeds_send_equal_prompts_and_others_do_not(gateway) -> None:
    await result_of(gateway, conversation(), seed=7)
    await result_of(gateway, conversation(), seed=7)
    await result_of(gateway, conversation(), seed=8)
    seven, eight = gateway.prompts["replay-7-c"], gateway.prompts["replay-8-c"]
    assert seven[:3] == seven[3:]
    assert eight != seven[:3]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (("status", 429, 0), "http_429"),
        (("status", 503, None), "http_503"),
        ("reset", "connection_lost"),
        ("die", "connection_lost"),
        ("error", "stream_error"),
        ("cut", "stream_cut"),
        ("garbage", "bad_reply"),
    ],
)
async def test_a_failed_attempt_is_retried_under_the_same_turn_id(gateway, fault, kind) -> None:
    gateway.faults = {(2, 1): fault}
    if fault == "reset":  # the pool itself repeats once what a reused connection lost
        gateway.faults[2, 2] = fault
    result = await result_of(gateway, conversation())
    (record,) = result.conversations
    assert record.complete
    assert [t.retries for t in record.turns] == [[], [kind], []]
    ids = [
        r["headers"]["x-conserve-turn-id"]
        for r in gateway.requests
        if r["headers"]["x-conserve-turn-index"] == "2"
    ]
    assert len(ids) >= 2 and len(set(ids)) == 1
    out = figures(result, ideal=None, ideal_note="none")
    assert out["errors"] == {} and out["retries"] == {kind: 1}
    assert record.turns[1].output_tokens == 5  # the broken attempt's token does not count


async def test_retry_after_is_waited_for(gateway) -> None:
    gateway.faults = {(1, 1): ("status", 429, 7)}
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)
        if delay_s > 1000:
            await asyncio.Event().wait()  # the sampler, which this test does not need

    clock = Clock(now=asyncio.get_running_loop().time, sleep=sleep)
    await result_of(gateway, conversation(turns=1), clock=clock)
    assert 7.0 in slept


async def test_an_endless_retry_after_is_not_obeyed_forever(gateway) -> None:
    gateway.faults = {(1, 1): ("status", 503, 86_400)}
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)
        if delay_s == 3600.0:
            await asyncio.Event().wait()  # the sampler, which this test does not need

    clock = Clock(now=asyncio.get_running_loop().time, sleep=sleep)
    result = await result_of(gateway, conversation(turns=1), clock=clock)
    assert 60.0 in slept and max(slept) <= 3600.0
    assert result.conversations[0].complete


async def test_a_turn_without_an_answer_ends_its_conversation_as_an_error(gateway) -> None:
    gateway.faults = {(2, n): ("status", 503, 0) for n in range(1, 4)}
    result = await result_of(gateway, conversation(), max_attempts=3)
    (record,) = result.conversations
    assert not record.complete and len(record.turns) == 2
    assert record.turns[1].error == "http_503"
    assert "scripted" in (record.turns[1].error_message or "")
    assert gateway.ended == ["replay-0-c"]
    out = figures(result, ideal=None, ideal_note="none")
    assert out["errors"] == {"http_503": 1} and out["turns"] == 1
    assert out["ttfet_s"]["n"] == 0


async def test_a_bad_request_is_not_retried(gateway) -> None:
    gateway.faults = {(1, 1): ("status", 400, None)}
    result = await result_of(gateway, conversation())
    assert result.conversations[0].turns[0].error == "http_400"
    assert len(gateway.requests) == 1


async def test_a_wrong_token_count_is_an_error_but_the_conversation_goes_on(gateway) -> None:
    gateway.faults = {(1, 1): "short"}
    result = await result_of(gateway, conversation())
    (record,) = result.conversations
    assert record.turns[0].error == "token_count_mismatch"
    assert [len(p) for p in gateway.prompts["replay-0-c"]] == [100, 125, 150]
    assert record.complete


async def test_a_stalled_stream_times_out_and_is_retried(gateway) -> None:
    gateway.faults = {(1, 1): "stall"}
    result = await result_of(gateway, conversation(), stall_timeout_s=0.05)
    assert result.conversations[0].turns[0].retries == ["timeout"]
    assert result.conversations[0].complete


async def test_ids_come_from_the_tokenizer_where_the_reply_has_none(gateway) -> None:
    gateway.token_ids = False
    result = await result_of(gateway, conversation())
    assert [t.output_ids for t in result.conversations[0].turns] == ["tokenize"] * 3
    assert gateway.prompts["replay-0-c"][1][100:105] == [91_000 + i for i in range(5)]
    notes = figures(result, ideal=None, ideal_note="none")["notes"]
    assert any("not in the reply" in note for note in notes)


async def test_gaps_and_arrivals_are_kept_in_model_time(gateway) -> None:
    result = await result_of(
        gateway, conversation("a", gap_s=20.0), conversation("b"), arrivals_s=[0.0, 30.0]
    )
    a, b = result.conversations
    for before, after in zip(a.turns, a.turns[1:], strict=False):
        assert after.due_s == pytest.approx(before.last_token_s + 20.0)
        assert after.first_token_s > after.due_s
    assert b.turns[0].due_s == 30.0
    assert b.turns[0].first_token_s > 30.0
    assert result.wall_s >= 0.04


async def test_a_turn_is_not_sent_before_its_recorded_time(gateway) -> None:
    turns = (
        Turn(input_tokens=50, new_input_tokens=50, output_tokens=2),
        Turn(input_tokens=60, new_input_tokens=8, output_tokens=2, at_s=25.0),
    )
    result = await result_of(gateway, Conversation(id="c", turns=turns), arrivals_s=[5.0])
    assert result.conversations[0].turns[1].due_s == 30.0


async def test_no_more_turns_in_flight_than_connections(gateway) -> None:
    many = [conversation(f"c{i}") for i in range(12)]
    result = await result_of(gateway, *many, connections=3)
    assert gateway.most_in_flight <= 3
    assert result.waits_for_socket > 0
    assert all(record.complete for record in result.conversations)


async def test_stop_ends_open_conversations_and_keeps_what_was_measured(gateway) -> None:
    gateway.faults = {(2, 1): "stall"}
    run, pool = replay(gateway, conversation())
    running = asyncio.create_task(run.run(arrivals=Arrivals.POISSON, rate_per_s=1.0))
    async with asyncio.timeout(10):
        await gateway.stalled.wait()
        run.stop()
        result = await running
    pool.close()
    assert result.interrupted
    assert result.conversations[0].turns[0].answered
    assert gateway.ended == ["replay-0-c"]
    out = figures(result, ideal=None, ideal_note="none")
    assert out["errors"] == {"interrupted": 1}
    assert any("interrupted" in note for note in out["notes"])


async def test_a_server_without_a_cluster_description_can_be_replayed_against(gateway) -> None:
    gateway.describes_cluster = False
    result = await result_of(gateway, conversation())
    out = figures(result, ideal=None, ideal_note="no profile")
    assert result.samples == []
    assert out["tokens_per_j"] is None and "no cluster" in out["energy_source"]
    assert out["conversations_complete"] == 1


async def test_figures_of_a_whole_run(gateway) -> None:
    result = await result_of(gateway, conversation("a"), conversation("b"))
    out = figures(result, ideal=None, ideal_note="no profile")
    assert (out["conversations"], out["turns"], out["errors"]) == (2, 6, {})
    transfers = out["transfers_per_conversation"]
    assert transfers["mean"] == 1.0 and transfers["max"] == 1
    assert transfers["by_reason"] == {"first_turn": 2}
    assert out["tail_turns_on_pinned_decoder"] == 1.0
    assert out["cached_token_shortfall"] == 0
    # Prompts of 100, 125, 150 and 3 × 5 output tokens each; 2 engines × 50 J between readings.
    assert out["tokens_per_j"] == pytest.approx(2 * 390 / 100.0)
    assert out["energy_source"] == "modelled: test"
    assert out["ttfet_s"]["p50"] > 0 and out["ttfet_s_normalized"] is None
    # The fake answers in no model time, so gateway and client are most of every latency.
    assert ["Gateway and client took" in note for note in out["notes"]] == [True]


async def test_nothing_listens() -> None:
    pool = pool_for("http://127.0.0.1:9")  # the discard port: nothing answers there
    with pytest.raises(TurnFailure, match=r"127\.0\.0\.1:9") as failure:
        await GatewayApi(pool, url="http://127.0.0.1:9").model()
    assert failure.value.kind == "connect_failed"


@pytest.mark.parametrize("url", ["https://x", "ftp://x", "x:80", "http://h:99999", "http://h/v1"])
def test_unusable_addresses_are_named(url: str) -> None:
    with pytest.raises(GatewayUnusable, match="http://HOST:PORT"):
        pool_for(url)
