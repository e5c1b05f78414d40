"""What the report says of wins and losses, goodput and clusters, from rows with known answers."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import rows as made
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.lab.capacity import ClusterCapacity, capacity
from conserve_serving.lab.cell import Cell as LabCell
from conserve_serving.lab.cluster_spec import ClusterSpec
from conserve_serving.lab.clusters import cluster
from conserve_serving.lab.contenders import contender
from conserve_serving.lab.demand import Demand
from conserve_serving.lab.pool import Pool
from conserve_serving.lab.report import lines, losses, sensitivity, tiers
from conserve_serving.lab.report.carried import carried
from conserve_serving.lab.report.context import Context
from conserve_serving.lab.report.document import Cell, Figure, Note, Section, Table, Tone
from conserve_serving.lab.report.metrics import SLO_ALL
from conserve_serving.lab.report.reached import crossing, goodput
from conserve_serving.lab.report.rows import Rows, workload_name
from conserve_serving.lab.stats import Verdict
from conserve_serving.lab.workloads import Arrivals, WorkloadSpec


def planted(changes: dict[tuple[str, float], float], *, seeds: int = 6) -> Context:
    """Two policies with equal TTFET but for factors planted by (policy, load); 1 % noise."""
    rows = []
    for policy in ("conserve", "collocated"):
        for rate in (1.0, 1.5):
            for seed in range(seeds):
                row = made.row(policy="same", rate_per_s=rate, seed=seed)
                row["cell"]["contender"] |= {"label": policy, "policy": policy}
                noise = random.Random(f"{policy} {rate} {seed}").gauss(1.0, 0.01)
                factor = changes.get((policy, rate), 1.0) * noise
                row["latency"]["ttfet_s_normalized"]["p95"] *= factor
                rows.append(row)
    return Context.of(Rows(rows))


def tables(section: Section) -> list[Table]:
    found = [block for block in section.blocks if isinstance(block, Table)]
    return found + [b.data for b in section.blocks if isinstance(b, Figure) and b.data]


def lost(context: Context) -> set[tuple[str, str]]:
    section = losses.section(context, losses.meetings(context))
    rows = [row for t in tables(section) if "difference" in t.columns for row in t.rows]
    return {(row[1].text, row[5].text) for row in rows}


def test_a_planted_loss_is_listed_and_a_planted_win_is_not() -> None:
    context = planted({("conserve", 1.0): 1.2, ("conserve", 1.5): 0.8})
    assert lost(context) == {("TTFET, p95", "1")}


def test_a_tie_whose_interval_spans_zero_is_not_listed_and_a_sure_trifle_is() -> None:
    assert ("TTFET, p95", "1.5") not in lost(planted({}))
    context = planted({("conserve", 1.0): 1.01}, seeds=12)
    trifle = next(
        one
        for one in losses.meetings(context)
        if one.excludes_win and one.rate_per_s == 1.0 and one.metric.name == "ttfet"
    )
    assert trifle.comparison.verdict is Verdict.TIE
    assert ("TTFET, p95", "1") in lost(context)


def test_losses_are_sorted_by_how_much_is_lost_whichever_way_is_better() -> None:
    rows = made.rows(("conserve", "collocated"), (1.0, 1.5), 4)
    for row in rows:
        if row["cell"]["contender"]["label"] == "conserve":
            row["tokens_per_j"] /= 3
            row["latency"]["ttfet_s_normalized"]["p95"] *= 2
    met = losses.meetings(Context.of(Rows(rows)))
    worse = [one.worse_by for one in met if one.metric.name == "tokens_per_j"]
    assert all(one == pytest.approx(2, rel=0.1) for one in worse)
    section = losses.section(Context.of(Rows(rows)), met)
    listed = [row[1].text for row in tables(section)[1].rows]
    assert listed.index("Tokens per joule") < listed.index("TTFET, p95")


def test_the_best_rival_is_the_best_mean_and_never_an_oracle_or_one_of_ours() -> None:
    rows = made.rows(
        ("conserve", "conserve_plus", "collocated", "round_robin", "oracle"), (1.5,), 3
    )
    context = Context.of(Rows(rows))
    place = context.rows.places()[0]
    assert context.ours == ("conserve", "conserve_plus")
    assert context.rivals_at(place) == ["collocated", "round_robin"]
    assert {one.comparison.rival for one in losses.meetings(context)} <= {
        "collocated",
        "round_robin",
    }
    assert {one.ours for one in losses.meetings(context)} == {"conserve", "conserve_plus"}


# --- goodput --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1.0, 0.0), (2.0, 0.1)], (math.sqrt(2), 0)),
        ([(1.0, 0.0), (2.0, 0.04)], (2.0, 1)),
        ([(1.0, 0.2), (2.0, 0.3)], (0.0, -1)),
        ([(1.0, 0.05), (2.0, 0.5)], (1.0, 0)),
        ([(1.0, 0.0), (2.0, 0.1), (3.0, 0.0)], (math.sqrt(2), 0)),
    ],
)
def test_goodput_is_where_misses_first_pass_five_per_cent(
    points: list[tuple[float, float]], expected: tuple[float, int]
) -> None:
    rate, beyond = crossing(points)
    assert (rate, beyond) == (pytest.approx(expected[0]), expected[1])


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.floats(0, 1)), min_size=2, unique_by=lambda p: p[0])
)
def test_goodput_lies_between_a_load_that_passes_and_the_next(
    points: list[tuple[float, float]],
) -> None:
    ascending = sorted(points)
    rate, beyond = crossing(ascending)
    if beyond < 0:
        assert ascending[0][1] > 0.05
    elif beyond > 0:
        assert all(missed <= 0.05 for _, missed in ascending)
    else:
        first = next(i for i, (_, missed) in enumerate(ascending) if missed > 0.05)
        low, high = ascending[first - 1][0], ascending[first][0]
        assert low * 0.999 <= rate <= high * 1.001


def slo_rows(limits: dict[str, float], rates: tuple[float, ...]) -> list[dict[str, Any]]:
    rows = made.rows(tuple(limits), rates, 3)
    for row in rows:
        cell = row["cell"]
        limit = limits[cell["contender"]["label"]] * (1 + 0.02 * cell["workload"]["seed"])
        met = 1.0 if cell["workload"]["rate_per_s"] <= limit else 0.0
        row["slo"] |= {"ttfet": met, "all": met}
    return rows


def test_loads_of_a_search_count_for_the_goodput_of_their_seed() -> None:
    rows = slo_rows({"conserve": 1.2}, (1.0, 1.5))
    extra = made.row(policy="conserve", rate_per_s=1.19, seed=0)
    extra["slo"] |= {"all": 1.0}
    coarse = Context.of(Rows(rows))
    fine = Context.of(Rows([*rows, extra]))
    place = coarse.rows.places()[0]
    before, after = (goodput(c, place, "conserve", SLO_ALL) for c in (coarse, fine))
    assert before is not None
    assert after is not None
    assert after.by_seed[0] > 1.19 > before.by_seed[0]
    assert after.by_seed[1] == before.by_seed[1]
    assert fine.rows.rates(place) == [1.0, 1.5]


def test_a_cluster_is_won_at_equal_hardware_and_lost_at_equal_cost() -> None:
    reference = made.cluster("a100x4", prefill=1, decode=3, profile="a100-qwen3-8b")
    unlike = made.cluster("unlike", profile="a100-qwen3-8b")
    unlike["groups"][0]["profile"] = "h100-qwen3-8b"
    rates = (0.5, 1.0, 1.5, 2.0, 2.5)
    rows = []
    for on, limits in (
        (unlike, {"conserve": 2.1, "collocated": 1.6}),
        (reference, {"conserve": 1.1, "collocated": 2.1}),
    ):
        for row in slo_rows(limits, rates):
            row["cell"] |= {"cluster": on, "reference": reference}
            rows.append(row)
    verdicts, economy, _ = tables(tiers.section(Context.of(Rows(rows)), {}))[:3]
    gany = verdicts.columns.index("Gany (conversations/s)")
    by_cluster = {row[0].text: row for row in verdicts.rows}
    assert by_cluster["unlike"][gany].text.startswith("win +")
    assert by_cluster["unlike"][gany].tone is Tone.GOOD
    assert by_cluster["a100x4"][gany].text.startswith("loss −")
    cost = {row[0].text: row[economy.columns.index("at equal cost")] for row in economy.rows}
    # 2.1 on 8.26 USD an hour against 2.1 on 6.36: the same work for more money.
    spec, control = cluster_dollars(unlike), cluster_dollars(reference)
    assert f"{100 * (control / spec - 1):+.1f} %".replace("-", "−") in cost["unlike"].text
    assert cost["unlike"].tone is Tone.BAD
    assert cost["a100x4"].text == "no other equal tiers in these rows"


def cluster_dollars(told: dict[str, Any]) -> float:
    return msgspec.convert(told, ClusterSpec).dollars_per_hour


def test_clusters_held_to_different_slos_are_not_compared_at_equal_cost() -> None:
    rows = []
    for name in ("one", "two"):
        rows += made.rows(("conserve", "collocated"), (1.0, 2.0), 2, on=made.cluster(name))
    economy = tables(tiers.section(Context.of(Rows(rows)), {}))[1]
    cells = {row[economy.columns.index("at equal cost")].text for row in economy.rows}
    assert cells == {"equal tiers were held to another SLO: run all with one --reference"}


def test_capacities_are_drawn_as_counted_and_named_in_the_reasons() -> None:
    spec = cluster("paper")
    workload = WorkloadSpec(source="generated:swebench", max_turns=5, conversations=50)
    counted = capacity(spec.engines(), Demand.of(Pool.load(workload).stream(workload)))
    cell = LabCell(cluster=spec, contender=contender("conserve"), workload=workload).to_json()
    rows = made.rows(("conserve", "collocated"), (1.0, 2.0), 2)
    for row in rows:
        row["cell"]["cluster"] = cell["cluster"]
    context = Context.of(Rows(rows))
    place = context.rows.places()[0]
    section = tiers.section(context, {(place.cluster, place.workload): counted})
    why = tables(section)[0].rows[0][-1].text
    assert f"{counted.dedicated_per_s:.3g}/s" in why
    assert f"{counted.hosting_per_s:.3g}/s" in why
    figure = next(block for block in section.blocks if isinstance(block, Figure))
    assert figure.data is not None
    told = [one.text for one in figure.data.rows[0]]
    assert told[2:5] == [
        f"{value:.3g}"
        for value in (counted.prefill_per_s, counted.decode_per_s, counted.link_per_s)
    ]


def test_what_nothing_limits_is_said_so_in_the_table_and_in_the_picture() -> None:
    context = Context.of(Rows(made.rows(("conserve", "collocated"), (1.0, 2.0), 2)))
    place = context.rows.places()[0]
    counted = ClusterCapacity(
        prefill_per_s=3.0,
        decode_per_s=math.inf,
        link_per_s=math.inf,
        dedicated_per_s=3.0,
        bottleneck="prefill",
        valve_per_s=3.0,
        hosting_per_s=4.0,
        engines=(),
    )
    section = tiers.section(context, {(place.cluster, place.workload): counted})
    figure = next(block for block in section.blocks if isinstance(block, Figure))
    assert figure.data is not None
    told = [one.text for one in figure.data.rows[0]]
    assert told[2:] == ["3", "no limit", "no limit", "3", "4"]
    assert figure.panels[0].count("no limit →") == 2


def test_parts_of_a_short_trace_with_recorded_arrivals_are_counted(tmp_path: Path) -> None:
    trace = tmp_path / "shop.jsonl"
    first = {"turn": 0, "input_tokens": 4000, "output_tokens": 1}
    trace.write_text(
        "".join(
            json.dumps(first | {"conversation_id": str(n), "arrival_s": n}) + "\n" for n in range(3)
        )
    )
    rows = []
    for source in (trace, tmp_path / "gone.jsonl", tmp_path / "lost.jsonl"):
        workload = WorkloadSpec(source=str(source), arrivals=Arrivals.RECORDED, rate_per_s=None)
        cell = LabCell(cluster=cluster("paper"), contender=contender("conserve"), workload=workload)
        row = made.row()
        row["cell"] = cell.to_json()
        rows.append(row)
    context = Context.of(Rows(rows))
    capacities, uncounted = carried(context.rows)
    assert [workload for _, workload in capacities] == ["shop, recorded arrivals"]
    assert math.isinf(capacities["paper", "shop, recorded arrivals"].decode_per_s)
    notes = [
        b.text for b in tiers.section(context, capacities, uncounted).blocks if isinstance(b, Note)
    ]
    said = next(text for text in notes if "could not be counted" in text)
    assert "gone" in said and "lost" in said
    assert ".;" not in said and said.endswith(".") and not said.endswith("..")


# --- sensitivity ----------------------------------------------------------------------------------


def test_each_swept_assumption_has_its_figures_and_the_others_are_named() -> None:
    rows = made.rows(("conserve", "collocated"), (1.0, 1.5), 3)
    rows += made.rows(("conserve", "collocated"), (1.5,), 3, mixed_slowdown=1.5)
    two = made.cluster("paper@2p2d", prefill=2, decode=2)
    rows += made.rows(("conserve", "collocated"), (1.5,), 3, on=two)
    context = Context.of(Rows(rows))
    section = sensitivity.section(context)
    titles = [block.title for block in section.blocks if isinstance(block, Figure)]
    assert any(title.startswith("What moves the difference") for title in titles)
    assert any(title.startswith("Interference of prefill") for title in titles)
    assert any(title.startswith("Prefill to decode engines") for title in titles)
    assert any(title.startswith("Power model") for title in titles)
    note = next(block for block in section.blocks if isinstance(block, Note))
    assert note.text == "Not swept in these rows: link, prediction error."
    swept = next(t for t in tables(section) if t.columns[0].startswith("interference"))
    assert {row[0].text for row in swept.rows} == {"none", "+50 %"}


def test_links_are_told_apart_whether_in_the_cell_or_in_the_cluster() -> None:
    named = made.cluster("paper@pcie4") | {"link": "pcie4"}
    rows = [made.row(), made.row(link="eth25"), made.row(on=named)]
    places = Rows(rows).places()
    assert {place.cluster for place in places} == {"paper"}
    assert [place.setting.link for place in places] == ["own", "eth25", "pcie4"]


def test_workloads_are_named_by_what_was_changed() -> None:
    base = made.workload(1.0, 0)
    assert workload_name(base) == "swebench, 1,000 conversations, ≤ 5 turns (generated)"
    base |= {"conversations": None}
    changed = base | {"source": "/traces/tau.jsonl.gz", "max_turns": None, "max_gap_s": 2.0}
    assert workload_name(changed) == "tau, gaps ≤ 2 s"
    assert workload_name(changed | {"split": "test", "arrivals": "bursty"}) == (
        "tau, gaps ≤ 2 s, test half, bursty arrivals"
    )


def test_recorded_arrivals_are_named_once_with_their_load() -> None:
    (row,) = made.as_recorded([made.row(shared_prefix="warm")])
    (place,) = Rows([row]).places()
    name = "shop, 1,000 conversations, ≤ 5 turns"
    assert place.title == f"{name}, recorded arrivals, warm prefixes on paper"
    assert place.at(0.0) == f"{name}, warm prefixes on paper at recorded arrivals"
    assert place.at(1.634) == f"{place.title} at 1.634 conversations/s"


# --- places of labels -----------------------------------------------------------------------------


@given(st.lists(st.floats(0, 200), max_size=12))
def test_labels_keep_their_order_their_distance_and_the_limits(wanted: list[float]) -> None:
    wanted.sort()
    placed = lines.spread(wanted, gap=10, low=0, high=200)
    assert placed == sorted(placed)
    assert all(-1e-6 <= y <= 200 + 1e-6 for y in placed)
    assert all(b - a >= 10 - 1e-6 for a, b in itertools.pairwise(placed))


def test_verdicts_that_are_given_stand_instead_of_the_report_s_own() -> None:
    context = Context.of(Rows(made.rows(("conserve", "collocated"), (1.0, 2.0), 2)))
    own = Table(columns=("verdict",), rows=((Cell("wins"),),), caption="given")
    captions = [table.caption for table in tables(tiers.section(context, {}, verdicts=[own]))]
    assert captions == ["given", "The figures"]


def test_latencies_are_compared_at_a_load_that_all_were_run_at() -> None:
    rows = slo_rows({"conserve": 2.1, "collocated": 2.1}, (1.0, 1.5, 2.0, 2.5))
    searched = [made.row(policy="conserve", rate_per_s=1.6, seed=seed) for seed in range(2)]
    context = Context.of(Rows([*rows, *searched]))
    assert 1.6 in context.rows.rates(context.rows.places()[0])
    verdicts = tables(tiers.section(context, {}))[0]
    assert verdicts.rows[0][verdicts.columns.index("load")].text == "1.5"
