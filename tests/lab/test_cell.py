"""A cell from its description to its row, on small workloads of the paper's testbed."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from conserve_serving.core.events import Event, TurnArrived
from conserve_serving.core.policies import POLICIES
from conserve_serving.lab.cell import Cell, cell_from_json, run_cell
from conserve_serving.lab.clusters import cluster
from conserve_serving.lab.contenders import CONTENDERS, Contender, available, contender
from conserve_serving.lab.errors import LabError
from conserve_serving.lab.metrics import PARTS
from conserve_serving.lab.pool import Pool
from conserve_serving.lab.workloads import WorkloadSpec
from conserve_serving.replay.cluster import Cluster, Engine, Gateway
from conserve_serving.replay.ideal import ideal_for


def cell(name: str = "conserve", **changed) -> Cell:
    workload = {"max_turns": 4, "conversations": 40, "pool_size": 40, "rate_per_s": 1.0, "seed": 1}
    for key in list(changed):
        if key in WorkloadSpec.__dataclass_fields__:
            workload[key] = changed.pop(key)
    values = {
        "cluster": cluster("paper"),
        "contender": contender(name),
        "workload": WorkloadSpec(**{"source": "generated:swebench"} | workload),
    }
    return Cell(**values | changed)


@pytest.fixture(scope="module")
def row() -> dict:
    return run_cell(cell())


def test_the_row_is_plain_json_and_names_its_cell(row: dict) -> None:
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert cell_from_json(row["cell"]) == cell()
    assert row["key"] == cell().key


def test_equal_cells_give_equal_rows_but_for_the_wall_clock(row: dict) -> None:
    again = run_cell(cell())
    assert {**again, "wall_s": 0} == {**row, "wall_s": 0}
    assert {**run_cell(cell(seed=2)), "wall_s": 0} != {**row, "wall_s": 0}


def test_contenders_meet_the_same_conversations_at_the_same_times(row: dict) -> None:
    for name in ("collocated", "per_turn-realistic", "oracle"):
        other = run_cell(cell(name))
        for kind in ("prompt", "new", "output"):
            assert other["tokens"][kind] == row["tokens"][kind]
        assert other["arrival_rate_per_s"] == row["arrival_rate_per_s"]
    faster = run_cell(cell(rate_per_s=2.0))
    assert faster["tokens"]["prompt"] == row["tokens"]["prompt"]
    assert faster["arrival_rate_per_s"] == pytest.approx(2 * row["arrival_rate_per_s"])


def test_every_turn_of_the_workload_is_in_the_figures(row: dict) -> None:
    spec = replace(cell().workload, max_context_tokens=row["workload"]["max_context_tokens"])
    drawn = list(Pool.load(spec).stream(spec))
    assert row["conversations"] == len(drawn) == 40
    assert row["turns"] == sum(len(c.turns) for c in drawn)
    assert row["tokens"]["prompt"] == sum(t.prompt_tokens for c in drawn for t in c.turns)
    assert row["tokens"]["output"] == sum(t.output_tokens for c in drawn for t in c.turns)
    assert row["conversations_incomplete"] == 0
    assert row["conversations_measured"] == row["latency"]["ttfet_s"]["n"] == 36
    tails = sum(len(c.turns) - 1 for c in drawn[4:])
    assert row["latency"]["tail_turn_ttft_s"]["n"] == tails


def test_alone_a_conversation_is_at_its_ideal() -> None:
    """One at a time: what is left above 1.0 is steps that do not begin when a turn arrives."""
    alone = run_cell(cell("collocated", rate_per_s=0.001, warmup_share=0.0))
    for name in ("ttfet", "first_turn_ttft", "last_turn_tbt", "e2e"):
        ratios = alone["latency"][f"{name}_s_normalized"]
        assert ratios["p50"] == pytest.approx(1.0, abs=0.02)
        assert ratios["p99"] < 1.05
    assert alone["slo"]["all"] == 1.0
    where = alone["where"]["all"]
    for part in ("prefill", "decode"):
        assert where[part] == pytest.approx(where[f"ideal_{part}"], rel=0.02)


def test_the_ideal_is_the_replayers(row: dict) -> None:
    """The same figures as those a replay through a gateway divides by."""
    spec = replace(cell().workload, max_context_tokens=row["workload"]["max_context_tokens"])
    engines = [("p0", "prefill"), ("d0", "decode"), ("d1", "decode"), ("d2", "decode")]
    described = Cluster(
        gateway=Gateway(),
        engines=tuple(Engine(id=i, tier=t, profile="a40-qwen3-0.6b") for i, t in engines),
    )
    ideal, _ = ideal_for(described)
    assert ideal is not None
    pool = Pool.load(spec)
    drawn = [pool.conversation(c.id) for c in pool.stream(spec)][4:]
    mean = math.fsum(ideal.latency(c).ttfet_s for c in drawn) / len(drawn)
    assert row["where"]["all"]["ideal_ttfet_s"] == pytest.approx(mean)


def test_a_faster_reference_makes_the_same_run_look_slower() -> None:
    mixed = cell("collocated", cluster=cluster("h100-3a100"), rate_per_s=0.5)
    own, by_a100 = run_cell(mixed), run_cell(replace(mixed, reference=cluster("4a100")))
    assert own["latency"]["ttfet_s"] == by_a100["latency"]["ttfet_s"]
    assert (
        own["latency"]["ttfet_s_normalized"]["p50"]
        > 1.5 * by_a100["latency"]["ttfet_s_normalized"]["p50"]
    )


def test_where_the_time_goes_adds_up(row: dict) -> None:
    for group in ("all", "p95", "p95_normalized"):
        where = row["where"][group]
        assert math.fsum(where[part] for part in PARTS) == pytest.approx(where["ttfet_s"])
    assert row["where"]["all"]["ttfet_s"] == pytest.approx(row["latency"]["ttfet_s"]["mean"])


def test_energy_is_the_sum_of_its_parts_and_priced_at_three_levels(row: dict) -> None:
    energy = row["energy"]
    parts = [energy[f"{part}_j"] for part in ("idle", "prefill", "decode", "mixed")]
    assert all(part > 0 for part in parts)
    assert energy["total_j"] == pytest.approx(math.fsum(parts))
    assert energy["total_j"] == pytest.approx(
        math.fsum(engine["energy_j"] for engine in row["engines"].values())
    )
    tokens = row["tokens"]
    served = tokens["prompt"] + tokens["output"]
    assert row["tokens_per_j"] == pytest.approx(served / energy["total_j"])
    assert row["new_tokens_per_j"] == pytest.approx(
        (tokens["new"] + tokens["output"]) / energy["total_j"]
    )
    assert energy["total_low_j"] < energy["total_j"] < energy["total_high_j"]
    assert row["tokens_per_j_low"] == pytest.approx(served / energy["total_low_j"])
    assert row["tokens_per_j_high"] == pytest.approx(served / energy["total_high_j"])
    assert row["tokens_per_j_low"] > row["tokens_per_j"] > row["tokens_per_j_high"]


def test_engines_shares_add_up_to_the_run(row: dict) -> None:
    assert list(row["engines"]) == ["p0", "d0", "d1", "d2"]
    for engine in row["engines"].values():
        assert engine["busy"] + engine["idle"] == pytest.approx(1.0)
        assert engine["prefill"] + engine["decode"] + engine["mixed"] == pytest.approx(
            engine["busy"]
        )
    assert row["engines"]["p0"]["decode"] == 0.0
    assert row["engines"]["p0"]["egress"] > 0.0


def test_counts_of_the_scheduler(row: dict) -> None:
    assert row["transfers"] == {"first_turn": 40}
    assert row["transfers_per_conversation"] == {"mean": 1.0, "max": 1}
    assert sum(row["placements"].values()) == row["turns"]
    assert row["rejections"] == {}


def test_interference_and_link_reach_the_engines(row: dict) -> None:
    slowed = run_cell(cell(mixed_slowdown=2.0))
    assert slowed["latency"]["last_turn_tbt_s"]["mean"] > row["latency"]["last_turn_tbt_s"]["mean"]
    always = "conserve:handoff_min_tokens=1"  # by its costs it would not use such a link
    thin, own = run_cell(cell(always, link="tcp_25g")), run_cell(cell(always))
    assert thin["engines"]["p0"]["egress"] > 3 * own["engines"]["p0"]["egress"]
    assert thin["where"]["all"]["handoff"] > 3 * own["where"]["all"]["handoff"]


def test_nobody_is_told_what_only_an_oracle_knows() -> None:
    """Not as a request's own limit either, which a replay sets to the true output."""

    def arrivals(name: str) -> list[TurnArrived]:
        seen: list[Event] = []
        run_cell(cell(name, conversations=10), observer=lambda _, event, __: seen.append(event))
        return [event for event in seen if isinstance(event, TurnArrived)]

    for arrived in arrivals("conserve"):
        assert arrived.max_output_tokens is None
        assert arrived.predicted_output_tokens is None
        assert arrived.foreseen_tokens == 0
    assert all(arrived.predicted_output_tokens for arrived in arrivals("per_turn-perfect"))
    assert all(arrived.foreseen_tokens for arrived in arrivals("oracle"))


def test_nothing_is_refused_however_long_it_waits() -> None:
    """40 conversations at once on a cluster that holds a few: a gateway would refuse some."""
    crowded = run_cell(cell("collocated", conversations=300, rate_per_s=500.0))
    assert crowded["conversations_incomplete"] == 0
    assert crowded["rejections"] == {}
    assert crowded["latency"]["ttfet_s"]["p99"] > 60.0
    assert crowded["saturated"]


def test_longer_contexts_than_an_engine_holds_are_cut_and_counted() -> None:
    short = run_cell(cell(max_context_tokens=12_000))
    assert short["workload"]["cut_by_context"] + short["workload"]["dropped_by_context"] > 0
    assert short["workload"]["max_context_tokens"] == 12_000
    assert run_cell(cell())["workload"]["max_context_tokens"] <= 308_448


@pytest.mark.parametrize("name", sorted(CONTENDERS))
def test_every_contender_answers_every_turn(name: str) -> None:
    out = run_cell(cell(name, conversations=25, rate_per_s=2.0))
    assert out["conversations_incomplete"] == 0
    assert out["latency"]["ttfet_s_normalized"]["p50"] > 0.99


def test_progress_is_told() -> None:
    told: list[int] = []
    out = run_cell(cell("collocated", conversations=2000), on_progress=told.append)
    assert told == sorted(told)
    assert 0 < told[-1] <= out["turns"]


# --- contenders ---------------------------------------------------------------------------------


def test_every_policy_has_a_contender_and_every_contender_its_line() -> None:
    assert {one.policy for one in CONTENDERS.values()} == set(POLICIES)
    assert available() == list(CONTENDERS)
    assert all(label == one.label for label, one in CONTENDERS.items())


def test_contenders_with_variations() -> None:
    assert contender("conserve") == CONTENDERS["conserve"]
    varied = contender("per_turn-perfect:biased:hosting:headroom=0.5")
    assert varied == Contender(
        label="per_turn-perfect:biased:hosting:headroom=0.5",
        policy="per_turn",
        predictor="biased",
        tier_mode="hosting",
        settings={"headroom": 0.5},
    )
    assert contender("per_turn:realistic").policy == "per_turn"
    settings = varied.scheduler_settings()
    assert (settings.headroom, settings.tier_mode) == (0.5, "hosting")
    assert settings.max_hold_s > 1e6  # and the patience of every contender


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nobody", "no contender 'nobody'. There are: conserve"),
        ("conserve:clairvoyant", "neither a predictor"),
        ("conserve:speed=1", "no scheduler setting 'speed'"),
        ("conserve:tier_mode=1", "no scheduler setting 'tier_mode'"),
        ("conserve:headroom=much", "headroom is 'much', which is no number"),
        ("conserve:headroom=nan", "headroom is nan. Give a number of 0 or more"),
        ("conserve:headroom=-1", "headroom is -1. Give a number of 0 or more"),
        ("conserve:max_hold_s=inf", "max_hold_s is inf. Give a number of 0 or more"),
        ("conserve:max_attempts=0", "max_attempts is 0. Give a whole number of 1 or more"),
        ("conserve:handoff_min_tokens=0.5", "handoff_min_tokens is 0.5. Give a whole number"),
        ("conserve:review_interval_s=0", "review_interval_s is 0. Give a number above 0"),
        ("conserve:copies=7", "copies is 7. Give 0 or 1"),
    ],
)
def test_contenders_that_cannot_be(name: str, text: str) -> None:
    with pytest.raises(LabError, match=text):
        contender(name)


def test_cells_that_cannot_be() -> None:
    with pytest.raises(LabError, match="mixed_slowdown is 0"):
        cell(mixed_slowdown=0.0)
    with pytest.raises(LabError, match="warmup_share is 1"):
        cell(warmup_share=1.0)
    with pytest.raises(LabError, match="predictor 'crystal'"):
        Contender(label="x", policy="conserve", predictor="crystal")
