"""Figures of runs worked out by hand: every definition has a number that only it gives."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.core.types import ConversationId, Outcome, TransferReason
from conserve_serving.lab.metrics import PARTS, RunMeter, turn_parts
from conserve_serving.replay.ideal import IdealLatency
from conserve_serving.simulator import TurnResult

IDEAL = IdealLatency(
    first_turn_ttft_s=1.0,
    ttfet_s=5.2,
    last_turn_tbt_s=0.25,
    e2e_s=6.2,
    gaps_s=3.0,
    first_tokens_s=1.5,
)


def turn(name: str, index: int, arrived_s: float, **changed) -> TurnResult:
    """Held 1 s, queued 2 s, prefilled 3 s, handed over in 4 s, 5 s at the decoder, decoded 6 s."""
    at = {"placed_s": 1.0, "prefill_began_s": 3.0, "prefilled_s": 6.0, "handed_s": 10.0}
    at |= {"first_token_s": 15.0, "finished_s": 21.0}
    plain = {k: v for k, v in changed.items() if not k.endswith("_s")}
    at |= {k: v for k, v in changed.items() if k.endswith("_s")}
    values = {
        "prompt_tokens": 1000,
        "new_tokens": 1000 if index == 1 else 50,
        "output_tokens": 4,
        "cached_tokens": 0 if index == 1 else 950,
        "outcome": Outcome.FINISHED,
    }
    return TurnResult(
        conversation=ConversationId(name),
        index=index,
        arrived_s=arrived_s,
        **{k: None if v is None else arrived_s + v for k, v in at.items()},
        **(values | plain),
    )


def local(name: str, index: int, arrived_s: float, **changed) -> TurnResult:
    """Prefilled where it is decoded: first token when the prompt is computed, after 6 s."""
    times = {"handed_s": None, "first_token_s": 6.0, "finished_s": 12.0}
    return turn(name, index, arrived_s, **(times | changed))


def meter(*conversations: list[TurnResult], ideal: IdealLatency = IDEAL) -> RunMeter:
    """A run of these conversations, each given as its turns, in order of arrival."""
    made = RunMeter()
    for turns in conversations:
        made.expect(turns[0].conversation, len(turns), ideal)
    results = [result for turns in conversations for result in turns]
    for result in sorted(results, key=lambda r: r.finished_s or r.arrived_s):
        made.on_turn(result)
    return made


def two_turns(name: str = "c", at_s: float = 10.0, **last) -> list[TurnResult]:
    """Turn 1 at 10, first token at 25, done at 31; 3 s later turn 2, first token 6 s after that."""
    first = turn(name, 1, at_s, transfer=TransferReason.FIRST_TURN)
    return [first, local(name, 2, at_s + 24.0, **last)]


def test_latencies_by_definition() -> None:
    out = meter(two_turns()).figures(warmup_share=0.0)
    latency = out["latency"]
    assert latency["ttfet_s"]["p50"] == 30.0  # 10 → 34 + 6: gap included
    assert latency["ttfet_without_gaps_s"]["p50"] == 27.0
    assert latency["first_turn_ttft_s"]["p50"] == 15.0
    assert latency["last_turn_tbt_s"]["p50"] == 2.0  # 6 s for the 3 tokens after the first
    assert latency["e2e_s"]["p50"] == 36.0
    assert latency["tail_turn_ttft_s"]["p50"] == 6.0  # from the turn's own arrival
    assert latency["ttfet_s_normalized"]["p95"] == pytest.approx(30.0 / 5.2)
    assert latency["ttfet_without_gaps_s_normalized"]["p95"] == pytest.approx(27.0 / 2.2)
    assert latency["first_turn_ttft_s_normalized"]["p95"] == 15.0
    assert latency["last_turn_tbt_s_normalized"]["p95"] == 8.0
    assert latency["e2e_s_normalized"]["p95"] == pytest.approx(36.0 / 6.2)
    assert {distribution["n"] for distribution in latency.values()} == {1}


def test_a_single_turn_has_no_tail_and_a_single_token_no_gap() -> None:
    out = meter([turn("c", 1, 0.0, output_tokens=1)]).figures(warmup_share=0.0)
    assert out["latency"]["last_turn_tbt_s"] == {
        "p50": None, "p90": None, "p95": None, "p99": None, "mean": None, "n": 0
    }  # fmt: skip
    assert out["latency"]["tail_turn_ttft_s"]["n"] == 0
    assert out["latency"]["ttfet_s"]["p50"] == out["latency"]["first_turn_ttft_s"]["p50"] == 15.0
    assert out["slo"]["last_turn_tbt"] is None


def test_percentiles_interpolate_between_closest_ranks() -> None:
    runs = [[local(f"c{i}", 1, float(i), first_token_s=1.0 + i)] for i in range(11)]
    out = meter(*runs).figures(warmup_share=0.0)["latency"]["ttfet_s"]
    assert out == {
        "p50": 6.0, "p90": 10.0, "p95": 10.5, "p99": pytest.approx(10.9), "mean": 6.0, "n": 11
    }  # fmt: skip


def test_slo_is_five_times_the_ideal_and_the_edge_is_met() -> None:
    ideal = IdealLatency(
        first_turn_ttft_s=3.0, ttfet_s=6.0, last_turn_tbt_s=0.4, e2e_s=7.3, gaps_s=3.0
    )
    slo = meter(two_turns(), ideal=ideal).figures(warmup_share=0.0)["slo"]
    # TTFET 30 = 5 × 6, TTFT 15 = 5 × 3, TBT 2 = 5 × 0.4, E2E 36 < 36.5; without gaps 27 > 15.
    assert slo == {
        "factor": 5.0,
        "ttfet": 1.0,
        "ttfet_without_gaps": 0.0,
        "first_turn_ttft": 1.0,
        "last_turn_tbt": 1.0,
        "e2e": 1.0,
        "all": 1.0,
    }
    late = meter(two_turns(finished_s=12.01), ideal=ideal).figures(warmup_share=0.0)["slo"]
    assert (late["last_turn_tbt"], late["ttfet"], late["all"]) == (0.0, 1.0, 0.0)


def test_a_conversation_that_breaks_off_is_in_no_latency_and_misses_every_slo() -> None:
    ideal = IdealLatency(
        first_turn_ttft_s=9.0, ttfet_s=99.0, last_turn_tbt_s=9.0, e2e_s=99.0, gaps_s=0.0
    )
    broken = two_turns("b", outcome=Outcome.REJECTED, first_token_s=None)
    out = meter(two_turns("a"), broken, ideal=ideal).figures(warmup_share=0.0)
    assert out["conversations"] == 2
    assert out["conversations_incomplete"] == 1
    assert out["latency"]["ttfet_s"]["n"] == 1
    assert {v for k, v in out["slo"].items() if k != "factor"} == {0.5}


def test_warm_up_is_dropped_by_arrival_not_by_completion() -> None:
    slow_first = [turn("a", 1, 0.0, first_token_s=100.0, finished_s=101.0)]
    others = [[local(f"c{i}", 1, 1.0 + i)] for i in range(9)]
    out = meter(slow_first, *others).figures(warmup_share=0.1)
    assert out["conversations"] == 10
    assert out["conversations_measured"] == 9
    assert out["latency"]["ttfet_s"]["n"] == 9
    assert out["latency"]["ttfet_s"]["mean"] == 6.0  # the slow one was the first to arrive
    tails = meter(two_turns("a"), two_turns("b", 11.0)).figures(warmup_share=0.5)
    assert tails["latency"]["tail_turn_ttft_s"]["n"] == 1
    assert tails["tokens"]["prompt"] == 4000  # tokens are the whole run's


def test_where_the_time_goes_adds_up_to_ttfet() -> None:
    where = meter(two_turns()).figures(warmup_share=0.0)["where"]["all"]
    assert {part: where[part] for part in PARTS} == {
        "held": 2.0,
        "prefill_queue": 4.0,
        "prefill": 6.0,
        "handoff": 4.0,
        "decoder_wait": 5.0,
        "decode": 6.0,  # of turn 1; the last turn's is after TTFET
        "gaps": 3.0,
    }
    assert where["ttfet_s"] == 30.0
    assert where["ideal_ttfet_s"] == 5.2
    assert where["ideal_prefill"] == 1.5
    assert where["ideal_decode"] == pytest.approx(5.2 - 3.0 - 1.5)
    assert where["conversations"] == 1


def test_where_of_the_slowest() -> None:
    """Slow by the clock and slow by its own measure are not the same conversation."""
    made = RunMeter()
    for i in range(40):
        long = i == 7
        alone_s = 100.0 if long else 1.0
        ideal = IdealLatency(
            first_turn_ttft_s=1, ttfet_s=alone_s, last_turn_tbt_s=1, e2e_s=1, gaps_s=0
        )
        made.expect(ConversationId(f"c{i}"), 1, ideal)
        held = 50.0 if long else 8.0 if i == 9 else 1.0 + i / 1000
        made.on_turn(
            turn(
                f"c{i}", 1, float(i), placed_s=held, prefill_began_s=held, prefilled_s=held + 1,
                handed_s=None, first_token_s=held + 1, finished_s=held + 2,
            )
        )  # fmt: skip
    where = made.figures(warmup_share=0.0)["where"]
    assert where["p95"]["held"] == pytest.approx((50.0 + 8.0) / 2)
    assert where["p95_normalized"]["held"] == pytest.approx((8.0 + 1.039) / 2)
    assert where["p95"]["conversations"] == where["p95_normalized"]["conversations"] == 2
    assert where["all"]["conversations"] == 40


def test_parts_of_a_turn_that_moves_before_it_is_prefilled() -> None:
    """The context is copied first: it is on its way before the prompt is computed."""
    moved = turn("c", 2, 0.0, placed_s=1.0, handed_s=4.0, prefill_began_s=5.0, prefilled_s=8.0,
                 first_token_s=8.0)  # fmt: skip
    assert turn_parts(moved) == (1.0, 1.0, 3.0, 3.0, 0.0)


@given(
    st.lists(st.one_of(st.none(), st.floats(0.0, 100.0)), min_size=4, max_size=4),
    st.floats(0.0, 100.0),
)
def test_parts_of_a_turn_always_add_up_to_its_ttft(times: list[float | None], first: float) -> None:
    """Also where it was placed again, so that times are not in order."""
    placed, began, prefilled, handed = times
    parts = turn_parts(
        turn("c", 1, 0.0, placed_s=placed, prefill_began_s=began, prefilled_s=prefilled,
             handed_s=handed, first_token_s=first)
    )  # fmt: skip
    assert min(parts) >= 0.0
    assert math.fsum(parts) == pytest.approx(first)


def test_tokens_and_transfers() -> None:
    out = meter(
        two_turns(restored_tokens=7, recomputed_tokens=3, moved_tokens=11,
                  transfer=TransferReason.NO_ROOM),
        [local("d", 1, 20.0)],
    ).figures(warmup_share=0.0)  # fmt: skip
    assert out["tokens"] == {
        "prompt": 3000, "new": 2050, "output": 12, "cached": 950, "recomputed": 3, "restored": 7,
        "moved": 11,
    }  # fmt: skip
    assert out["transfers_per_conversation"] == {"mean": 1.0, "max": 2}
    assert out["turns"] == 3


def stream(count: int, *, life_s, rate_per_s: float = 1.0) -> dict:
    made = RunMeter()
    for i in range(count):
        made.expect(ConversationId(f"c{i}"), 1, IDEAL)
        made.on_turn(local(f"c{i}", 1, i / rate_per_s, finished_s=life_s(i)))
    return made.figures(warmup_share=0.1)


def test_in_a_steady_state_completions_keep_pace() -> None:
    out = stream(400, life_s=lambda i: 7.5 + i % 3, rate_per_s=2.0)
    assert out["arrival_rate_per_s"] == pytest.approx(2.0)
    assert out["completion_rate_per_s"] == pytest.approx(2.0, rel=0.02)
    assert out["stretch"] == pytest.approx(1.0, rel=0.02)
    assert not out["saturated"]


def test_a_backlog_that_grows_is_saturated() -> None:
    """Each conversation takes a fifth of a second longer than the one before."""
    out = stream(400, life_s=lambda i: 7.0 + 0.2 * i)
    assert out["arrival_rate_per_s"] == pytest.approx(1.0)
    assert out["completion_rate_per_s"] == pytest.approx(1 / 1.2)
    assert out["stretch"] == pytest.approx(1.2)
    assert out["saturated"]
    assert not stream(400, life_s=lambda i: 7.0 + 0.04 * i)["saturated"]


def test_how_a_run_begins_says_nothing_of_its_steady_state() -> None:
    out = stream(400, life_s=lambda i: 50.0 if i < 10 else 5.0)
    assert out["stretch"] == pytest.approx(1.0, abs=0.005)


def test_conversations_that_outlive_the_run_are_no_backlog() -> None:
    out = stream(400, life_s=lambda _: 10_000.0)
    assert out["stretch"] == pytest.approx(1.0)


def test_nothing_measured() -> None:
    out = RunMeter().figures(warmup_share=0.1)
    assert out["latency"]["ttfet_s"]["n"] == 0
    assert out["slo"]["all"] is None
    assert out["where"] == {"all": None, "p95": None, "p95_normalized": None}
    assert out["saturated"] is False and out["stretch"] is None
