"""Loaders: what they read, and what they refuse, by line and field."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.replay.errors import TraceError
from conserve_serving.replay.traces import TraceFormat, load_trace
from conserve_serving.replay.workload import (
    Caps,
    poisson_arrivals,
    recorded_arrivals,
    scaled,
    select,
)


def row(conversation: str = "a", turn: int = 0, **fields) -> dict:
    return {
        "conversation_id": conversation,
        "turn": turn,
        "gap_s": None,
        "input_tokens": 100,
        "new_input_tokens": 100,
        "output_tokens": 10,
        **fields,
    }


def jsonl(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def load(path: Path, trace_format: TraceFormat | None = None) -> list[Conversation]:
    return list(load_trace(path, trace_format))


TWO_TURNS = (
    row(),
    row(turn=1, gap_s=2.5, input_tokens=130, new_input_tokens=20, output_tokens=7, source="x"),
)
EXPECTED = Conversation(
    id="a",
    turns=(
        Turn(input_tokens=100, new_input_tokens=100, output_tokens=10),
        Turn(input_tokens=130, new_input_tokens=20, output_tokens=7, gap_s=2.5),
    ),
)


def test_rows_become_conversations(tmp_path: Path) -> None:
    (conversation,) = load(jsonl(tmp_path / "t.jsonl", *TWO_TURNS))
    assert conversation == EXPECTED
    assert conversation.turns[1].kept_tokens == 110


def test_gzip_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in TWO_TURNS).encode()))
    assert load(path) == [EXPECTED]


def test_csv_with_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "conversation_id,turn,input_tokens,output_tokens,new_input_tokens,gap_s,arrival_s,note\n"
        'a,0,100,10,,,1.5,"first, quoted"\n'
        "a,1,130,7,20,2.5,,\n"
    )
    (conversation,) = load(path)
    assert conversation.turns == EXPECTED.turns
    assert conversation.arrival_s == 1.5


def test_without_new_input_the_whole_context_is_kept(tmp_path: Path) -> None:
    second = row(turn=1, input_tokens=130, new_input_tokens=None)
    (conversation,) = load(jsonl(tmp_path / "t", row(), second))
    assert conversation.turns[1].new_input_tokens == 20


def test_kept_is_clipped_to_the_previous_context(tmp_path: Path) -> None:
    second = row(turn=1, input_tokens=200, new_input_tokens=0)
    (conversation,) = load(jsonl(tmp_path / "t", row(), second))
    assert conversation.turns[1].kept_tokens == 110


def test_interleaved_conversations_keep_their_order(tmp_path: Path) -> None:
    rows = [row("a"), row("a/agent"), TWO_TURNS[1], row("b")]
    assert [c.id for c in load(jsonl(tmp_path / "t", *rows))] == ["a", "a/agent", "b"]


def test_a_shared_prefix_is_named_by_kind_model_and_length(tmp_path: Path) -> None:
    shared = {"shared_prefix_tokens": 60, "kind": "main", "model": "m-1"}
    rows = [row("a", **shared), row("b", **shared), row("c", **{**shared, "model": "m-2"})]
    rows += [row("d", shared_prefix_tokens=60), row("e", shared_prefix_tokens=0), row("f")]
    found = [
        (c.shared_prefix_name, c.shared_prefix_tokens) for c in load(jsonl(tmp_path / "t", *rows))
    ]
    assert found == [
        ("main/m-1/60 tokens", 60),
        ("main/m-1/60 tokens", 60),
        ("main/m-2/60 tokens", 60),
        ("60 tokens", 60),
        ("", 0),
        ("", 0),
    ]


def test_a_shared_prefix_is_at_most_the_first_prompt(tmp_path: Path) -> None:
    (conversation,) = load(jsonl(tmp_path / "t", row(shared_prefix_tokens=400)))
    assert conversation.shared_prefix_tokens == 100


def test_sub_agents_know_who_called_them_and_when(tmp_path: Path) -> None:
    rows = [
        row("a", t_s=5.0),
        row("a", turn=1, input_tokens=130, t_s=9.0),
        row("a/agent_1", t_s=9.0),
        row("a", turn=2, input_tokens=150, t_s=30.0),
        row("a/agent_1/deeper", t_s=11.0),
        row("elsewhere/agent_1", t_s=9.0),
        row("b"),
        row("b/agent_1", t_s=7.0),
    ]
    found = {c.id: c for c in load(jsonl(tmp_path / "t", *rows))}
    called = {i: (c.parent, c.parent_turns, c.offset_s) for i, c in found.items()}
    assert called == {
        "a": (None, 0, 0.0),
        "a/agent_1": ("a", 2, 4.0),
        "a/agent_1/deeper": ("a/agent_1", 1, 2.0),
        "elsewhere/agent_1": (None, 0, 0.0),
        "b": (None, 0, 0.0),
        "b/agent_1": ("b", 0, 0.0),
    }


@pytest.mark.parametrize(
    ("rows", "line", "says"),
    [
        ([row(shared_prefix_tokens=-1)], 1, "shared_prefix_tokens"),
        ([row(turn=1)], 1, "turn is 1 where 0 is due"),
        ([row(), row(turn=2)], 2, "Number each conversation's turns"),
        ([row(input_tokens="many")], 1, "input_tokens"),
        ([row(), row("b", output_tokens=0)], 2, "output_tokens"),
        ([row(gap_s=-1)], 1, "gap_s"),
        ([row(new_input_tokens=101)], 1, "new_input_tokens is 101, more than input_tokens"),
        ([row(), row(turn=1, input_tokens=50, new_input_tokens=None)], 2, "Give new_input_tokens"),
        ([{"conversation_id": "a"}], 1, "missing required field `turn`"),
        ([[1, 2]], 1, "list where an object belongs"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list, line: int, says: str) -> None:
    path = jsonl(tmp_path / "t.jsonl", *rows)
    with pytest.raises(TraceError) as error:
        load(path)
    assert error.value.line == line
    assert says in str(error.value)
    assert f"{path}, line {line}: " in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.jsonl", b"", "empty"),
        ("t.csv", b"", "empty"),
        ("t.csv", b"conversation_id,turn\n", "no column input_tokens, output_tokens"),
        ("t.csv", b"conversation_id,turn,input_tokens,output_tokens\na,0,x,1\n", "input_tokens"),
        ("t.csv", b"conversation_id,turn,input_tokens,output_tokens\na,0,9,1,7\n", "more cells"),
        ("t.jsonl", b"{broken\n", "not JSON"),
        ("t.jsonl", b"\x1f\x8bnot really gzip", "cannot be read"),
        ("t.jsonl", b'{"conversation_id": "\xff"}', "UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TraceError, match=says):
        load(path)


def test_a_missing_file_is_a_trace_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        load(tmp_path / "nothing")


# --- Mooncake ---------------------------------------------------------------------------------


def test_mooncake_prefixes_are_shared_as_far_as_another_first_prompt_goes(tmp_path: Path) -> None:
    rows = [
        request(0, 3 * 512, [7, 8, 9]),
        request(10, 3 * 512, [7, 8, 10]),
        request(20, 2 * 512 + 1, [7, 11, 12]),
        request(30, 2 * 512, [20, 21]),
        request(40, 3 * 512, [20, 21, 22]),  # goes on with the conversation before
    ]
    found = [
        (len(c.turns), c.shared_prefix_name, c.shared_prefix_tokens)
        for c in load(jsonl(tmp_path / "t", *rows))
    ]
    assert found == [(1, "block 7", 1024), (1, "block 7", 1024), (1, "block 7", 512), (2, "", 0)]


def request(at_ms: int, length: int, blocks: list[int], output: int = 100) -> dict:
    return {
        "timestamp": at_ms,
        "input_length": length,
        "output_length": output,
        "hash_ids": blocks,
    }


def test_mooncake_requests_join_by_their_blocks(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "m.jsonl",
        request(1000, 1500, [0, 1, 2]),  # two full blocks and a partial one
        request(1500, 1400, [0, 7, 8]),  # shares the system prompt only
        request(9000, 2100, [0, 1, 3, 4, 5]),  # continues the first: 1,600 kept
        request(20_000, 2000, [0, 7, 9, 10]),  # continues the second
        request(30_000, 2600, [0, 1, 3, 4, 11, 12]),  # continues the first again
    )
    first, second = load(path)
    assert [t.input_tokens for t in first.turns] == [1500, 2100, 2600]
    assert [t.new_input_tokens for t in first.turns] == [1500, 500, 400]
    assert [t.at_s for t in first.turns] == [None, 8.0, 29.0]
    assert (first.arrival_s, second.arrival_s) == (1.0, 1.5)
    assert [t.new_input_tokens for t in second.turns] == [1400, 500]


def test_mooncake_answer_that_was_not_sent_back_is_not_kept(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "m.jsonl",
        request(0, 1500, [0, 1, 2], output=4000),
        request(1000, 1700, [0, 1, 3, 4]),
    )
    (conversation,) = load(path)
    assert conversation.turns[1].kept_tokens == 1024


def test_mooncake_system_prompt_alone_joins_nothing(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "m.jsonl", request(0, 600, [0, 1]), request(1, 1200, [0, 2, 3]))
    assert [len(c.turns) for c in load(path)] == [1, 1]


def test_mooncake_same_prompt_twice_is_two_conversations_sharing_nothing_open(
    tmp_path: Path,
) -> None:
    path = jsonl(
        tmp_path / "m.jsonl",
        request(0, 1500, [0, 1, 2]),
        request(5, 2100, [0, 1, 3, 4, 5]),
        request(6, 2200, [0, 1, 6, 7, 8]),  # a fork: the first is continued already
    )
    assert [len(c.turns) for c in load(path)] == [2, 1]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([request(0, 1500, [0])], "makes 3 blocks"),
        ([request(9, 100, [0]), request(3, 100, [1])], "Sort the rows by timestamp"),
        ([{**request(0, 100, [0]), "output_length": 0}], "output_length"),
    ],
)
def test_mooncake_errors(tmp_path: Path, rows: list[dict], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        load(jsonl(tmp_path / "m.jsonl", *rows))


# --- caps and arrivals ------------------------------------------------------------------------


def conversation(name: str, *contexts: int, arrival_s: float | None = None) -> Conversation:
    turns = tuple(
        Turn(input_tokens=c - 10, new_input_tokens=5, output_tokens=10, gap_s=30.0)
        for c in contexts
    )
    return Conversation(id=name, turns=turns, arrival_s=arrival_s)


def test_caps_cut_and_say_so() -> None:
    made = [
        conversation("long", 100, 200, 300, 400),
        conversation("grows", 100, 5000),
        conversation("huge", 5000),
        conversation("fits", 100),
        conversation("never read", 100),
    ]
    caps = Caps(conversations=3, max_turns=3, max_context_tokens=1000, max_gap_s=10.0)
    workload = select(iter(made), caps, name="t")
    assert [(c.id, len(c.turns)) for c in workload.conversations] == [
        ("long", 3),
        ("grows", 1),
        ("fits", 1),
    ]
    assert workload.cut_by_max_turns == 1
    assert workload.cut_by_context == 1
    assert workload.dropped_by_context == 1
    assert workload.turns_cut == 3
    assert workload.gaps_shortened == 5
    assert {t.gap_s for c in workload.conversations for t in c.turns} == {10.0}


@given(
    counts=st.lists(
        st.tuples(st.integers(1, 9000), st.integers(1, 3000), st.floats(0, 1)),
        min_size=1,
        max_size=6,
    ),
    factor=st.floats(0.001, 3.0),
)
def test_scaled_conversations_keep_their_shape(
    counts: list[tuple[int, int, float]], factor: float
) -> None:
    turns: list[Turn] = []
    for new, output, share in counts:
        context = turns[-1].context_tokens if turns else 0
        kept = context if share > 0.5 else int(context * share)
        turns.append(Turn(input_tokens=kept + new, new_input_tokens=new, output_tokens=output))
    small = scaled(Conversation(id="a", turns=tuple(turns)), factor).turns
    assert len(small) == len(turns)
    context = 0
    for turn, one in zip(turns, small, strict=True):
        assert one.new_input_tokens == max(1, round(turn.new_input_tokens * factor))
        assert one.output_tokens == max(1, round(turn.output_tokens * factor))
        assert 0 <= one.kept_tokens <= context
        context = one.context_tokens
    for before, after, small_before, small_after in zip(
        turns, turns[1:], small, small[1:], strict=False
    ):
        if after.kept_tokens == before.context_tokens:
            assert small_after.kept_tokens == small_before.context_tokens


def test_a_scaled_workload_fits_where_the_trace_did_not_and_says_so() -> None:
    huge = conversation("huge", 5000)
    workload = select([huge], Caps(max_context_tokens=1000, scale=0.1), name="t")
    assert workload.scale == 0.1
    assert workload.dropped_by_context == 0
    assert workload.conversations[0].turns[0].input_tokens == 499


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(TraceError, match="1 exceed the context of 1000"):
        select([conversation("huge", 5000)], Caps(max_context_tokens=1000), name="t")


def test_poisson_arrivals() -> None:
    times = poisson_arrivals(20_000, rate_per_s=4.0, seed=1)
    assert times[0] == 0.0 and list(times) == sorted(times)
    assert len(times) / times[-1] == pytest.approx(4.0, rel=0.03)
    assert poisson_arrivals(100, rate_per_s=4.0, seed=1) == times[:100]
    assert poisson_arrivals(3, rate_per_s=4.0, seed=2) != times[:3]
    with pytest.raises(ValueError, match="above 0"):
        poisson_arrivals(3, rate_per_s=0.0, seed=1)


def test_recorded_arrivals_need_every_conversation() -> None:
    known = [conversation("a", 100, arrival_s=7.0), conversation("b", 100, arrival_s=5.0)]
    assert recorded_arrivals(known) == (2.0, 0.0)
    assert recorded_arrivals([*known, conversation("c", 100)]) is None


@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.integers(0, 500), st.integers(1, 50)),
        min_size=1,
        max_size=8,
    )
)
def test_every_row_that_loads_can_be_replayed(tmp_path_factory, counts) -> None:
    rows = [
        row(turn=i, input_tokens=total, new_input_tokens=min(new, total), output_tokens=out)
        for i, (total, new, out) in enumerate(counts)
    ]
    (made,) = load(jsonl(tmp_path_factory.mktemp("t") / "t", *rows))
    context = 0
    for turn in made.turns:
        assert 0 <= turn.kept_tokens <= context
        assert turn.kept_tokens + turn.new_input_tokens == turn.input_tokens
        context = turn.context_tokens
