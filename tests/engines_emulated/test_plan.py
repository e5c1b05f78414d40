from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.engines.emulated import tokenizer as tk
from conserve_serving.engines.emulated.plan import Limits, Plan, PlanReader, make_plan
from conserve_serving.engines.emulated.script import Reply
from conserve_serving.engines.emulated.template import ChatTemplate

CALLS = (("look", json.dumps({"path": "core/ledger.py"})), ("stop", "{}"))
REPLIES = [
    Reply(content="A short answer."),
    Reply(content="Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 6),
    Reply(calls=CALLS),
    Reply(content="First this.", calls=CALLS[:1]),
]


def plan_of(reply: Reply, **limits: object) -> Plan:
    settings: dict[str, object] = {"max_tokens": None, "room_tokens": 10_000, **limits}
    return make_plan(reply, Limits(**settings), ChatTemplate(), seed=7)  # type: ignore[arg-type] # a test's keywords


@given(st.sampled_from(REPLIES), st.integers(1, 3000))
def test_ignore_eos_gives_exactly_the_tokens_asked_for(reply: Reply, count: int) -> None:
    plan = plan_of(reply, max_tokens=count, ignore_eos=True)
    assert len(plan.ids) == count
    assert plan.finish == {"type": "length", "length": count}
    assert tk.IM_END not in plan.ids


def test_json_stays_json_however_long_it_has_to_be() -> None:
    reply = Reply(content='{"a": 1}', formatted=True)
    for limits in ({"max_tokens": 50, "ignore_eos": True}, {"min_tokens": 50}):
        plan = plan_of(reply, **limits)
        assert json.loads(plan.text) == {"a": 1}
        assert len(plan.ids) >= 50


@given(st.sampled_from(REPLIES), st.integers(1, 400), st.integers(0, 300))
def test_natural_ends_and_limits(reply: Reply, most: int, least: int) -> None:
    plan = plan_of(reply, max_tokens=most, min_tokens=min(least, most))
    assert min(least, most) <= len(plan.ids) <= most
    if plan.finish["type"] == "stop":
        assert plan.ids[-1] == tk.IM_END
        assert plan.finish["matched"] == tk.IM_END
    else:
        assert len(plan.ids) == most


@given(st.sampled_from(REPLIES), st.integers(1, 200), st.lists(st.integers(1, 40), max_size=40))
def test_deltas_add_up_however_the_tokens_come(reply: Reply, most: int, sizes: list[int]) -> None:
    plan = plan_of(reply, max_tokens=most)
    reader, text, calls = PlanReader(plan), "", {}
    seen = 0
    for size in [*sizes, most]:
        seen = min(seen + size, len(plan.ids))
        for delta in reader.upto(seen):
            if delta.text is not None:
                text += delta.text
            elif delta.name is not None:
                assert delta.call not in calls
                calls[delta.call] = [delta.name, ""]
            else:
                calls[delta.call][1] += delta.arguments
    assert text == plan.text
    for index, call in enumerate(plan.calls):
        name, arguments = calls[index]
        assert name == call.name
        if call.complete(len(plan.ids)):
            assert arguments == call.arguments
        else:
            assert call.arguments.startswith(arguments)
    assert len(calls) == len(plan.calls)


@given(st.sampled_from(REPLIES[:2]), st.integers(1, 100))
def test_a_cut_answer_is_found_again_as_history(reply: Reply, most: int) -> None:
    plan = plan_of(reply, max_tokens=most)
    again = ChatTemplate().assistant_body(plan.text, ())
    assert plan.ids[: len(again)] == again


def test_a_whole_reply_is_its_text_its_calls_and_an_end() -> None:
    plan = plan_of(REPLIES[3])
    assert plan.text == "First this."
    assert [(call.name, call.arguments) for call in plan.calls] == list(CALLS[:1])
    assert plan.finish_type == "tool_calls"
    assert plan.ids[:-1] == ChatTemplate().assistant_body("First this.", CALLS[:1])


def test_a_cut_call_is_not_complete() -> None:
    whole = plan_of(REPLIES[2])
    first = whole.calls[0]
    plan = plan_of(REPLIES[2], max_tokens=first.open_at + 1)
    assert plan.finish_type == "length"
    assert [call.complete(len(plan.ids)) for call in plan.calls] == [False]


@pytest.mark.parametrize(("keep", "shown"), [(False, "A short "), (True, "A short answer")])
def test_stop_strings_end_the_output_and_are_trimmed(keep: bool, shown: str) -> None:
    plan = plan_of(REPLIES[0], stop=("nothing", "answer"), keep_stop=keep)
    assert plan.text == shown
    assert plan.finish == {"type": "stop", "matched": "answer"}
    # Tokens up to the one in which the stop string was complete, and no more.
    assert "answer" in tk.decode(plan.ids)
    assert "answer" not in tk.decode(plan.ids[:-1])
    assert "".join(d.text or "" for d in PlanReader(plan).upto(len(plan.ids))) == shown


def test_no_stop_before_the_least_length() -> None:
    plan = plan_of(REPLIES[0], stop=("short",), min_tokens=4)
    assert plan.text == "A short answer."


def test_stop_token_ids() -> None:
    token = tk.encode(REPLIES[0].content)[2]
    plan = plan_of(REPLIES[0], stop_token_ids=(token,))
    assert plan.finish == {"type": "stop", "matched": token}
    assert plan.ids[-1] == token
    assert plan.text == REPLIES[0].content[:8]


def test_no_room_means_prefill_only() -> None:
    for limits in ({"max_tokens": 0}, {"room_tokens": 0}):
        plan = plan_of(REPLIES[0], **limits)
        assert not plan.ids
        assert plan.finish == {"type": "length", "length": 0}
