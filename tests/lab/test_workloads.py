"""Pools and streams: what is drawn, when it arrives, and what the seed decides."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_serving.lab.cuts import Answers, Split, in_split, is_reset, returned
from conserve_serving.lab.errors import WorkloadError
from conserve_serving.lab.pool import Pool
from conserve_serving.lab.workloads import Arrivals, SharedPrefix, WorkloadSpec
from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.simulator.conversation import SimulatedConversation


def row(conversation: str = "a", turn: int = 0, **fields: object) -> dict[str, object]:
    counts = {"input_tokens": 100, "new_input_tokens": 100, "output_tokens": 10}
    return {"conversation_id": conversation, "turn": turn, **counts, **fields}


def trace(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def three(tmp_path: Path) -> str:
    """Three conversations of one, two and three turns, recorded 0, 4 and 10 s after the first."""
    rows = []
    for number, (name, arrival_s) in enumerate((("a", 50.0), ("b", 54.0), ("c", 60.0))):
        rows.append(row(name, arrival_s=arrival_s, input_tokens=100 + number))
        for turn in range(1, number + 1):
            rows.append(row(name, turn, input_tokens=200 * turn, gap_s=300.0 * turn))
            del rows[-1]["new_input_tokens"]
    return trace(tmp_path / "three.jsonl", *rows)


@pytest.fixture
def agents(tmp_path: Path) -> str:
    """A session that calls sub-agents at its second and fourth turn, 100 s and 400 s after."""
    times = (0.0, 90.0, 200.0, 350.0)
    rows = [
        row("a", n, t_s=at, gap_s=80.0 * n, input_tokens=100 * (n + 1), new_input_tokens=90)
        for n, at in enumerate(times)
    ]
    rows += [row("a/early", t_s=100.0), row("a/late", t_s=400.0), row("b", t_s=0.0)]
    rows[0]["new_input_tokens"] = 100
    return trace(tmp_path / "agents.jsonl", *rows)


def stream(spec: WorkloadSpec) -> list[SimulatedConversation]:
    return list(Pool.load(spec).stream(spec))


def names(spec: WorkloadSpec) -> list[str]:
    return [str(c.id).rpartition("~")[0] for c in stream(spec)]


def test_what_is_drawn_is_what_the_trace_says(three: str) -> None:
    spec = WorkloadSpec(source=three, conversations=20)
    pool = Pool.load(spec)
    for drawn in pool.stream(spec):
        recorded = pool.conversation(drawn.id)
        assert [(t.prompt_tokens, t.new_tokens, t.output_tokens, t.gap_s) for t in drawn.turns] == [
            (t.input_tokens, t.new_input_tokens, t.output_tokens, t.gap_s) for t in recorded.turns
        ]
        assert drawn.parent is None and drawn.shared_prefix is None
    with pytest.raises(KeyError):
        pool.conversation("d~0")


def test_draws_are_with_replacement_and_every_id_is_its_own(three: str) -> None:
    made = stream(WorkloadSpec(source=three, conversations=3000))
    assert len({c.id for c in made}) == 3000
    drawn = Counter(str(c.id).partition("~")[0] for c in made)
    assert set(drawn) == {"a", "b", "c"}
    # Multinomial: a standard deviation is 26 of 1,000.
    assert max(abs(n - 1000) for n in drawn.values()) < 5 * 26
    assert made[17].id.endswith("~17")


def test_without_a_number_as_many_come_as_the_pool_has(three: str) -> None:
    assert len(stream(WorkloadSpec(source=three))) == 3


def test_a_stream_is_made_as_it_is_asked_for(three: str) -> None:
    spec = WorkloadSpec(source=three, conversations=10**12)
    first = list(itertools.islice(Pool.load(spec).stream(spec), 5))
    assert first == stream(dataclasses.replace(spec, conversations=5))
    # What is drawn often is made once, so that memory does not grow with the stream.
    assert len({id(c.turns) for c in itertools.islice(Pool.load(spec).stream(spec), 500)}) == 3


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rates=st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
    arrivals=st.sampled_from([Arrivals.POISSON, Arrivals.BURSTY]),
)
def test_rates_are_paired(seed: int, rates: tuple[float, float], arrivals: Arrivals) -> None:
    specs = [
        WorkloadSpec(
            source="generated:swebench",
            pool_size=20,
            conversations=200,
            rate_per_s=rate,
            arrivals=arrivals,
            seed=seed,
        )
        for rate in rates
    ]
    slow, fast = (stream(spec) for spec in specs)
    assert [c.id for c in slow] == [c.id for c in fast]
    assert [c.arrival_s * rates[0] for c in slow] == pytest.approx(
        [c.arrival_s * rates[1] for c in fast]
    )
    assert slow[0].arrival_s == 0.0
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(slow))


def test_seeds_draw_differently_and_the_pool_stays(three: str) -> None:
    spec = WorkloadSpec(source=three, conversations=50)
    other = dataclasses.replace(spec, seed=1)
    assert names(spec) != names(other)
    assert Pool.load(spec) is Pool.load(other)
    assert Pool.load(spec) is not Pool.load(dataclasses.replace(spec, max_turns=1))


def test_recorded_arrivals_start_at_zero_and_can_be_stretched(three: str) -> None:
    spec = WorkloadSpec(source=three, arrivals=Arrivals.RECORDED, rate_per_s=None)
    assert [(c.id, c.arrival_s) for c in stream(spec)] == [
        ("a~0", 0.0),
        ("b~1", 4.0),
        ("c~2", 10.0),
    ]
    # Two arrivals after the first in ten seconds are 0.2 per second.
    stretched = stream(dataclasses.replace(spec, rate_per_s=0.4))
    assert [c.arrival_s for c in stretched] == pytest.approx([0.0, 2.0, 5.0])


def test_caps_cut_and_are_counted(three: str) -> None:
    pool = Pool.load(WorkloadSpec(source=three, max_turns=2, max_gap_s=120.0, scale=0.5))
    assert [len(c.turns) for c in pool.conversations] == [1, 2, 2]
    assert {t.gap_s for c in pool.conversations for t in c.turns} == {0.0, 120.0}
    assert pool.workload.cut_by_max_turns == 1
    assert pool.workload.gaps_shortened == 2
    assert pool.conversations[0].turns[0].input_tokens == 50
    assert len(Pool.load(WorkloadSpec(source=three, max_context_tokens=111)).conversations) == 2


def test_halves_are_told_by_name_and_make_the_whole() -> None:
    def ids(split: Split) -> set[str]:
        spec = WorkloadSpec(source="generated:swebench", pool_size=400, split=split)
        return {c.id for c in Pool.load(spec).conversations}

    assert ids(Split.TUNE) | ids(Split.TEST) == ids(Split.ALL)
    assert not ids(Split.TUNE) & ids(Split.TEST)
    assert 160 < len(ids(Split.TUNE)) < 240
    # A trace that gains conversations must not move the others to the other half.
    assert in_split("swebench-0", Split.TUNE) is not in_split("swebench-0", Split.TEST)


def test_sub_agents_come_with_their_parents(agents: str) -> None:
    made = stream(WorkloadSpec(source=agents, conversations=40, rate_per_s=0.02, seed=4))
    arrived = {c.id: c for c in made}
    assert sum(c.parent is None for c in made) == 40
    called = [c for c in made if c.parent is not None]
    assert called
    for c in called:
        offset_s = 100.0 if "early" in c.id else 400.0
        assert c.parent is not None
        assert c.id.endswith(str(c.parent).partition("~")[2])
        assert c.arrival_s == pytest.approx(arrived[c.parent].arrival_s + offset_s)
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(made))


def test_a_cap_on_gaps_brings_sub_agents_forward(agents: str) -> None:
    pool = Pool.load(WorkloadSpec(source=agents, max_gap_s=100.0))
    offsets = {c.id: c.offset_s for c in pool.conversations if c.parent is not None}
    # The parent's gaps are 80, 160 and 240 s; the early one comes after the first of them.
    assert offsets == {"a/early": 100.0, "a/late": 400.0 - 60.0 - 140.0}


def test_sub_agents_are_left_out_where_their_parent_ends_before(agents: str) -> None:
    pool = Pool.load(WorkloadSpec(source=agents, max_turns=2))
    assert [c.id for c in pool.conversations] == ["a", "a/early", "b"]
    assert pool.orphans == 1


def test_families_stay_in_one_half(agents: str) -> None:
    halves = [
        {c.id for c in Pool.load(WorkloadSpec(source=agents, split=split)).conversations}
        for split in (Split.TUNE, Split.TEST)
        if in_split("a", split)
    ]
    assert all({"a", "a/early", "a/late"} <= half for half in halves) and len(halves) == 1


def test_prefixes_are_shared_where_caches_are_to_be_warm(tmp_path: Path) -> None:
    shared = {"shared_prefix_tokens": 60, "model": "m"}
    own = {**shared, "model": "another"}
    rows = [row("a", **shared), row("b", **shared), row("c"), row("d", **own)]
    source = trace(tmp_path / "t.jsonl", *rows)
    warm = stream(WorkloadSpec(source=source, conversations=30, shared_prefix=SharedPrefix.WARM))
    found = {str(c.id).partition("~")[0]: c.shared_prefix for c in warm}
    assert found == {"a": ("m/60 tokens", 60), "b": ("m/60 tokens", 60), "c": None, "d": None}
    cold = stream(WorkloadSpec(source=source, conversations=30))
    assert {c.shared_prefix for c in cold} == {None}


def test_conversations_may_end_before_their_first_reset(tmp_path: Path) -> None:
    source = trace(
        tmp_path / "t.jsonl",
        row("a"),
        row("a", 1, input_tokens=200, new_input_tokens=90),
        row("a", 2, input_tokens=150, new_input_tokens=100),
        row("a", 3, input_tokens=170, new_input_tokens=10),
    )
    pool = Pool.load(WorkloadSpec(source=source, until_reset=True))
    assert [len(c.turns) for c in pool.conversations] == [2]
    assert pool.resets_cut == 2
    assert len(Pool.load(WorkloadSpec(source=source)).conversations[0].turns) == 4


BEFORE = Turn(input_tokens=1000, new_input_tokens=1000, output_tokens=200)


@pytest.mark.parametrize(
    ("input_tokens", "new", "kept"),
    [
        (1500, 540, 1200),  # the whole prompt but for part of a block, and room for the answer
        (1500, 500, 1200),
        (1500, 300, 1200),  # recorded as kept
        (1500, 400, 1200),  # part of the answer kept
        (1199, 239, 960),  # no room for the answer
        (1500, 604, 896),  # something before the answer was changed
        (1500, 1500, 0),
    ],
)
def test_answers_are_returned_where_they_can_be(input_tokens: int, new: int, kept: int) -> None:
    turn = Turn(input_tokens=input_tokens, new_input_tokens=new, output_tokens=7, gap_s=3.0)
    found = returned(turn, BEFORE)
    assert found.kept_tokens == kept
    assert dataclasses.replace(found, new_input_tokens=new) == turn


def test_answers_stay_as_recorded_where_that_is_asked(tmp_path: Path) -> None:
    source = trace(
        tmp_path / "t.jsonl", row("a"), row("a", 1, input_tokens=130, new_input_tokens=40)
    )
    new = {
        answers: Pool.load(WorkloadSpec(source=source, answers=answers))
        .conversations[0]
        .turns[1]
        .new_input_tokens
        for answers in Answers
    }
    assert new == {Answers.RECORDED: 40, Answers.RETURNED: 20}


def test_a_reset_keeps_less_than_half_of_the_context() -> None:
    half = Turn(input_tokens=700, new_input_tokens=100, output_tokens=1)
    assert not is_reset(half, BEFORE)
    assert is_reset(dataclasses.replace(half, new_input_tokens=101), BEFORE)


def test_where_requests_were_timed_their_distance_is_the_gap(tmp_path: Path) -> None:
    blocks = {"output_length": 10}
    source = trace(
        tmp_path / "m.jsonl",
        {"timestamp": 1000, "input_length": 1024, "hash_ids": [1, 2], **blocks},
        {"timestamp": 4000, "input_length": 1536, "hash_ids": [1, 2, 3], **blocks},
        {"timestamp": 9000, "input_length": 2048, "hash_ids": [1, 2, 3, 4], **blocks},
    )
    spec = WorkloadSpec(source=source)
    assert [t.gap_s for t in stream(spec)[0].turns] == [0.0, 3.0, 5.0]
    assert {t.at_s for c in Pool.load(spec).conversations for t in c.turns} == {None}


def test_a_spec_is_plain_values_and_back(three: str) -> None:
    spec = WorkloadSpec(source=three, split=Split.TUNE, arrivals=Arrivals.BURSTY, max_gap_s=3)
    again = WorkloadSpec(**json.loads(json.dumps(dataclasses.asdict(spec))))
    assert again == spec
    assert isinstance(again.split, Split)
    assert hash(again) == hash(spec)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_turns": 0}, "max_turns is 0: give 1 or more"),
        ({"conversations": 0}, "conversations is 0"),
        ({"scale": 0.0}, "scale is 0.0: give a number above 0"),
        ({"rate_per_s": float("nan")}, "rate_per_s is nan"),
        ({"rate_per_s": None}, "rate_per_s is not given"),
        ({"max_gap_s": -1.0}, "max_gap_s is -1.0"),
        ({"split": "half"}, "split is 'half': give one of all, tune, test"),
        ({"arrivals": "bursty", "burst_share": 0.5}, "Give a burst_factor of at most 2"),
        ({"arrivals": "bursty", "burst_factor": 0.5}, "burst_factor is 0.5"),
        ({"arrivals": "bursty", "burst_share": 1.0}, "burst_share is 1"),
        ({"arrivals": "bursty", "burst_conversations": 0.0}, "burst_conversations is 0"),
    ],
)
def test_impossible_specs_name_the_field(fields: dict[str, object], says: str) -> None:
    with pytest.raises(WorkloadError) as error:
        WorkloadSpec(source="generated:swebench", **fields)  # type: ignore[arg-type]
    assert says in str(error.value)


def test_what_cannot_be_loaded_is_said(tmp_path: Path, three: str) -> None:
    cases = [
        (WorkloadSpec(source=str(tmp_path / "none.jsonl")), "none.jsonl: cannot be read"),
        (WorkloadSpec(source="generated:nope"), "no workload 'nope' to generate"),
        (WorkloadSpec(source=three, max_context_tokens=5), "no conversation is left"),
    ]
    for spec, says in cases:
        with pytest.raises(WorkloadError) as error:
            Pool.load(spec)
        assert says in str(error.value)


def test_recorded_arrivals_that_are_not_there_are_refused(three: str, agents: str) -> None:
    cases = [
        (WorkloadSpec(source=agents, arrivals=Arrivals.RECORDED), "2 of 2 conversations"),
        (WorkloadSpec(source=three, arrivals=Arrivals.RECORDED, conversations=4), "Ask for 3 at"),
    ]
    for spec, says in cases:
        with pytest.raises(WorkloadError) as error:
            stream(spec)
        assert says in str(error.value)


def test_recorded_arrivals_all_at_once_have_no_rate(tmp_path: Path) -> None:
    source = trace(tmp_path / "t", row("a", arrival_s=1.0), row("b", arrival_s=1.0))
    spec = WorkloadSpec(source=source, arrivals=Arrivals.RECORDED)
    with pytest.raises(WorkloadError, match="all arrive at once"):
        stream(spec)
    assert [c.arrival_s for c in stream(dataclasses.replace(spec, rate_per_s=None))] == [0.0, 0.0]


def test_parts_of_a_conversation_are_the_replayers_own(three: str) -> None:
    assert all(
        isinstance(c, Conversation) for c in Pool.load(WorkloadSpec(source=three)).conversations
    )
