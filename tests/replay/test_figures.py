"""Figures on cases worked out by hand."""

from __future__ import annotations

from array import array

import pytest

from conserve_serving.replay.cluster import Cluster, Engine, Gateway, counter_delta, parse_cluster
from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.replay.energy import energy_used
from conserve_serving.replay.errors import GatewayUnusable
from conserve_serving.replay.figures import figures
from conserve_serving.replay.ideal import IdealCluster, IdealLatency, ideal_for
from conserve_serving.replay.latencies import distribution, percentile
from conserve_serving.replay.records import (
    ClusterSample,
    ConversationRecord,
    RunResult,
    TurnRecord,
)
from conserve_serving.replay.workload import Arrivals, Workload

FIRST = Turn(input_tokens=1000, new_input_tokens=1000, output_tokens=10)
SECOND = Turn(input_tokens=1060, new_input_tokens=50, output_tokens=5, gap_s=3.0)


def answered(turn: Turn, index: int, due: float, first: float, last: float, **extra) -> TurnRecord:
    extra = {"decode_engine": "d0", "transfers": 1, "cached_tokens": turn.kept_tokens, **extra}
    return TurnRecord(
        index=index,
        turn=turn,
        due_s=due,
        sent_s=due,
        first_token_s=first,
        last_token_s=last,
        prompt_tokens=turn.input_tokens,
        output_tokens=turn.output_tokens,
        output_ids="reply",
        **extra,
    )


def record(name: str = "c", arrival_s: float = 10.0, **second) -> ConversationRecord:
    """Turn 1 due at 10, answered 12–13; turn 2 due at 16, answered 16.5–18.5."""
    last = answered(SECOND, 2, arrival_s + 6, arrival_s + 6.5, arrival_s + 8.5, **second)
    last.token_times_s = array("d", [arrival_s + t for t in (6.5, 7.5, 8.5)])
    last.token_counts = array("L", [1, 3, 1])
    return ConversationRecord(
        conversation=Conversation(id=name, turns=(FIRST, SECOND)),
        arrival_s=arrival_s,
        turns=[answered(FIRST, 1, arrival_s, arrival_s + 2, arrival_s + 3), last],
    )


def result(*records: ConversationRecord, samples=(), **extra) -> RunResult:
    return RunResult(
        workload=Workload(name="t", conversations=tuple(r.conversation for r in records)),
        seed=0,
        arrivals=Arrivals.POISSON,
        rate_per_s=1.0,
        speed=2.0,
        gateway_url="http://x",
        model="m",
        connections=4,
        conversations=list(records),
        samples=list(samples),
        wall_s=30.0,
        **extra,
    )


def run_figures(*records: ConversationRecord, ideal=None, **extra) -> dict:
    return figures(result(*records, **extra), ideal=ideal, ideal_note="test")


class FixedIdeal:
    def latency(self, conversation: Conversation) -> IdealLatency:
        return IdealLatency(
            first_turn_ttft_s=1.0, ttfet_s=5.2, last_turn_tbt_s=0.25, e2e_s=6.2, gaps_s=3.0
        )


def test_percentiles_interpolate_between_closest_ranks() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([0.0, 10.0], 0.95) == 9.5
    assert percentile([7.0], 0.95) == 7.0
    assert percentile([], 0.5) is None
    assert distribution([3.0, 1.0]) == {
        "p50": 2.0, "p95": 2.9, "p99": 2.98, "mean": 2.0, "max": 3.0, "n": 2
    }  # fmt: skip


def test_latencies_by_definition() -> None:
    out = run_figures(record(), ideal=FixedIdeal())
    assert out["ttfet_s"]["p50"] == 6.5
    assert out["ttfet_without_gaps_s"]["p50"] == 3.5  # turn 2 was due 3 s after turn 1's end
    assert out["first_turn_ttft_s"]["p50"] == 2.0
    assert out["last_turn_tbt_s"]["p50"] == 0.5  # 2 s for the 4 tokens after the first
    assert out["e2e_s"]["p50"] == 8.5
    assert out["tail_turn_ttft_s"]["p50"] == 0.5
    assert out["ttfet_s_normalized"]["p95"] == pytest.approx(6.5 / 5.2)
    assert out["ttfet_without_gaps_s_normalized"]["p95"] == pytest.approx(3.5 / 2.2)
    assert out["last_turn_tbt_s_normalized"]["p50"] == 2.0
    assert out["slo_attainment"]["ttfet"] == 1.0
    # Gaps seen by the client: 1 s, two tokens in the same event, 1 s.
    assert out["last_turn_token_gap_s"]["n"] == 4
    assert out["last_turn_token_gap_s"]["mean"] == 0.5


def test_normalised_names_of_the_issue_and_null_without_an_ideal() -> None:
    out = run_figures(record())
    for name in ("ttfet_s", "first_turn_ttft_s", "last_turn_tbt_s", "e2e_s"):
        assert out[name]["p50"] is not None and out[name]["p95"] is not None
        assert out[f"{name}_normalized"] is None
    assert out["conditions"]["ideal"] == "test"


def test_incomplete_conversations_are_not_in_the_latencies() -> None:
    broken = record("broken")
    broken.turns[1].last_token_s = None
    broken.turns[1].error = "http_503"
    out = run_figures(record(), broken)
    assert out["ttfet_s"]["n"] == 1
    assert (out["conversations"], out["conversations_complete"], out["turns"]) == (2, 1, 3)
    assert out["errors"] == {"http_503": 1}


def test_pinned_share_counts_a_move_once() -> None:
    third = Turn(input_tokens=1100, new_input_tokens=35, output_tokens=5)
    moved = record()
    moved.conversation = Conversation(id="c", turns=(FIRST, SECOND, third))
    moved.turns[1].decode_engine = "d1"
    moved.turns.append(answered(third, 3, 19.0, 19.5, 20.0, decode_engine="d1"))
    assert run_figures(moved)["tail_turns_on_pinned_decoder"] == 0.5
    assert run_figures(moved, record())["tail_turns_on_pinned_decoder"] == pytest.approx(2 / 3)


def test_transfers_take_each_conversations_last_count() -> None:
    out = run_figures(record(), record(transfers=3))
    assert out["transfers_per_conversation"]["mean"] == 2.0
    assert out["transfers_per_conversation"]["max"] == 3
    assert out["transfers_per_conversation"]["conversations_by_count"] == {"1": 1, "3": 1}


@pytest.mark.parametrize(
    ("cached", "beyond", "largest"),
    [(1010, 0, 0), (946, 0, 64), (945, 65 - 64, 65), (0, 946, 1010)],
)
def test_shortfall_beyond_a_page(cached: int, beyond: int, largest: int) -> None:
    out = run_figures(record(cached_tokens=cached))
    assert out["cached_token_shortfall"] == beyond
    detail = out["cached_token_shortfall_detail"]
    assert (detail["max_tokens"], detail["turns_short"]) == (largest, int(beyond > 0))


def test_shortfall_is_unknown_where_the_engine_does_not_report_cached_tokens() -> None:
    out = run_figures(record(cached_tokens=None))
    assert out["cached_token_shortfall"] is None
    assert out["cached_token_shortfall_detail"]["turns_unknown"] == 1


# --- energy and counters ----------------------------------------------------------------------


def sample(at_s: float, counters=None, **joules: float | None) -> ClusterSample:
    engines = tuple(
        Engine(id=name, energy_j=j, energy_source="modelled: a", page_tokens=16)
        for name, j in joules.items()
    )
    cluster = Cluster(gateway=Gateway(), speed=2.0, engines=engines, counters=counters or {})
    return ClusterSample(at_s=at_s, cluster=cluster)


def test_energy_is_the_growth_of_every_engine() -> None:
    used = energy_used([sample(0, p0=100.0, d0=50.0), sample(9, p0=160.0, d0=90.0)])
    assert used.joules == 100.0
    assert used.by_engine == {"p0": 60.0, "d0": 40.0}
    assert used.source == "modelled: a"


def test_energy_of_engines_that_die_restart_or_join() -> None:
    used = energy_used(
        [
            sample(0, a=100.0, b=100.0),
            sample(1, a=150.0, b=140.0),
            sample(2, a=5.0),  # a restarted; b is gone
            sample(3, a=25.0, c=8.0),  # c joined and has counted since its start
        ]
    )
    assert used.by_engine == {"a": 50.0 + 5.0 + 20.0, "b": 40.0, "c": 8.0}


def test_energy_is_unknown_when_one_engine_does_not_tell() -> None:
    used = energy_used([sample(0, a=1.0, b=None), sample(1, a=3.0, b=None)])
    assert used.joules is None and "not reported by b" in used.source
    assert energy_used([]).joules is None


def test_tokens_per_joule_counts_what_was_served_and_once_what_was_new() -> None:
    out = run_figures(record(), samples=[sample(0, a=0.0), sample(9, a=213.0)])
    assert out["tokens_per_j"] == pytest.approx((1000 + 1060 + 10 + 5) / 213.0)
    assert out["new_tokens_per_j"] == pytest.approx((1000 + 50 + 10 + 5) / 213.0)
    assert out["conditions"]["page_tokens"] == 16


def test_counters_are_the_growth_during_the_run() -> None:
    before = {"transfers_by_reason": {"first_turn": 5}, "moves_by_reason": {}}
    after = {
        "transfers_by_reason": {"first_turn": 6, "engine_lost": 1},
        "moves_by_reason": {"replaced_engine_lost": 1},
        "turns": 9,
    }
    out = run_figures(
        record(transfers=2), samples=[sample(0, before, a=0.0), sample(9, after, a=1.0)]
    )
    by_reason = out["transfers_per_conversation"]["by_reason"]
    assert by_reason == {"first_turn": 1, "engine_lost": 1}
    assert out["scheduler"]["moves_by_reason"] == {"replaced_engine_lost": 1}
    assert not any("other clients" in note for note in out["notes"])
    lonely = run_figures(
        record(transfers=1), samples=[sample(0, before, a=0.0), sample(9, after, a=1.0)]
    )
    assert any("other clients" in note for note in lonely["notes"])


def test_a_counter_that_went_down_counts_from_zero() -> None:
    assert counter_delta({"x": {"a": 9}}, {"x": {"a": 4}}, "x") == {"a": 4}
    assert counter_delta({}, {"x": 3}, "x") == {}


def test_warm_caches_are_noticed() -> None:
    warm = record()
    warm.turns[0].cached_tokens, warm.turns[0].transfers = 960, 0
    assert any("already cached" in note for note in run_figures(warm)["notes"])


@pytest.mark.parametrize(("overhead_ms", "noted"), [(0.1, False), (100.0, True)])
def test_own_time_that_shows_in_the_latencies_is_noted(overhead_ms: float, noted: bool) -> None:
    made = record()
    for turn in made.turns:
        turn.overhead_ms = overhead_ms  # × speed 2, against a first-turn TTFT of 2 s
    out = run_figures(made)
    assert out["gateway_overhead_ms"]["p50"] == overhead_ms
    assert any("Gateway and client took" in note for note in out["notes"]) is noted


def test_client_delay_is_wall_time() -> None:
    late = record()
    late.turns[0].sent_s = late.turns[0].due_s + 0.5
    assert run_figures(late)["client_delay_ms"]["max"] == pytest.approx(250.0)


def test_cluster_json_of_another_shape_is_refused_by_field() -> None:
    with pytest.raises(GatewayUnusable, match=r"engines\[0\]"):
        parse_cluster(b'{"engines": [{"tier": "decode"}]}')
    with pytest.raises(GatewayUnusable, match="speed"):
        parse_cluster(b'{"speed": 0}')


def test_longest_context_is_that_of_an_engine_that_holds_conversations() -> None:
    cluster = Cluster(
        engines=(
            Engine(id="p", tier="prefill", kv_capacity_tokens=99_999, max_context_tokens=99_999),
            Engine(id="d", tier="decode", kv_capacity_tokens=5_000, max_context_tokens=8_000),
            Engine(id="e", tier="decode", kv_capacity_tokens=6_000),
        )
    )
    assert cluster.max_context_tokens() == 6_000
    assert Cluster().max_context_tokens() is None


# --- the ideal --------------------------------------------------------------------------------


class Costs:
    """1 ms per new token, 10 ms per decode step plus 1 µs per KV token, chunks of 400."""

    chunk_tokens = 400

    def __init__(self, factor: float = 1.0) -> None:
        self._factor = factor

    def prefill_s(self, new_tokens: int, prefix_tokens: int) -> float:
        return new_tokens * 1e-3 * self._factor

    def decode_s(self, batch: int, kv_tokens: float) -> float:
        return (0.01 + 1e-6 * kv_tokens) * self._factor

    def handoff_s(self, tokens: int) -> float:
        return 0.05

    def ingress_s(self, tokens: int) -> float:
        return 0.02


CONVERSATION = Conversation(id="c", turns=(FIRST, SECOND))


def test_ideal_of_one_engine_by_hand() -> None:
    ideal = IdealCluster(hosts=[Costs()], prefillers=[]).latency(CONVERSATION)
    assert ideal.first_turn_ttft_s == pytest.approx(1.0)
    turn_1_decode = sum(0.01 + 1e-6 * (1000 + i) for i in range(1, 10))
    assert ideal.ttfet_s == pytest.approx(1.0 + turn_1_decode + 3.0 + 0.05)
    turn_2_decode = sum(0.01 + 1e-6 * (1060 + i) for i in range(1, 5))
    assert ideal.e2e_s == pytest.approx(ideal.ttfet_s + turn_2_decode)
    assert ideal.last_turn_tbt_s == pytest.approx(turn_2_decode / 4)
    assert ideal.gaps_s == 3.0
    assert ideal.first_tokens_s == pytest.approx(1.0 + 0.05)


def test_ideal_takes_the_hand_off_only_where_it_pays() -> None:
    fast = IdealCluster(hosts=[Costs()], prefillers=[Costs(0.1)]).latency(CONVERSATION)
    assert fast.first_turn_ttft_s == pytest.approx(0.1 + 0.05 + 0.02 + 0.001)
    equal = IdealCluster(hosts=[Costs()], prefillers=[Costs()]).latency(CONVERSATION)
    assert equal.first_turn_ttft_s == pytest.approx(1.0)


def test_ideal_of_a_recorded_schedule_waits_for_it() -> None:
    turns = (FIRST, Turn(input_tokens=1060, new_input_tokens=50, output_tokens=1, at_s=20.0))
    ideal = IdealCluster(hosts=[Costs()], prefillers=[]).latency(Conversation(id="c", turns=turns))
    assert ideal.ttfet_s == pytest.approx(20.05)
    assert ideal.last_turn_tbt_s is None


def test_ideal_needs_profiles_of_every_engine() -> None:
    known = Engine(id="d0", tier="decode", profile="a40-qwen3-0.6b")
    ideal, note = ideal_for(Cluster(engines=(known,)))
    assert ideal is not None and "a40-qwen3-0.6b" in note
    assert ideal.latency(CONVERSATION).ttfet_s > 3.0
    for engines, says in (
        ((known, Engine(id="d1")), "no hardware profile for d1"),
        ((Engine(id="d1", profile="nope"),), "nope"),
        ((Engine(id="p0", tier="prefill", profile="a40-qwen3-0.6b"),), "holds conversations"),
        ((), "does not describe"),
    ):
        ideal, note = ideal_for(Cluster(engines=engines))
        assert ideal is None and says in note
