"""Telling conversations apart by their messages, and by where in a graph they are sent."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_agents import Conversation, conversation
from langchain_conserve.identity import CallSite, Conversations
from langchain_conserve.lineage import MAX_BRANCHES, Chain, Lineage, Place

LONG = "a long question with plenty of context " * 20


def said(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def at(node: str, task: str = "t", step: int | None = 1, namespace: str = "") -> Place:
    return Place(namespace=namespace, node=node, task=task, step=step)


def resolved(lineage: Lineage, main_id: str, place: Place, chain: Chain) -> str:
    return lineage.resolve(main_id, place, chain, main_is_free=main_id not in lineage)


def test_a_conversation_extends_what_was_sent() -> None:
    lineage = Lineage()
    assert resolved(lineage, "T", at("model", "1", 1), Chain(said("q"))) == "T"
    assert resolved(lineage, "T", at("model", "2", 3), Chain(said("q", "a", "r"))) == "T"
    # another node may go on in it, and so may a replay
    assert resolved(lineage, "T", at("act", "3", 4), Chain(said("q", "a", "r", "b", "s"))) == "T"
    assert resolved(lineage, "T", at("act", "4", 5), Chain(said("q", "a", "r", "b", "s"))) == "T"


def test_another_nodes_unrelated_call_is_a_conversation_of_its_own() -> None:
    lineage = Lineage()
    resolved(lineage, "T", at("model", "1", 1), Chain(said("q")))
    aside = resolved(lineage, "T", at("tools", "2", 2), Chain(said("summarize this")))
    assert aside.startswith("T~")
    assert resolved(lineage, "T", at("model", "3", 3), Chain(said("q", "a", "r"))) == "T"
    # the same node asking something else goes on in its own, not in the agent's
    assert resolved(lineage, "T", at("tools", "4", 4), Chain(said("and this"))) == aside


def test_the_same_node_may_rewrite_its_history() -> None:
    lineage = Lineage()
    resolved(lineage, "T", at("model", "1", 1), Chain(said(LONG, "a", LONG)))
    assert resolved(lineage, "T", at("model", "2", 3), Chain(said("summary", "a", "r"))) == "T"
    # outside of a graph there is one place: the caller's thread_id is what counts
    outside = Lineage()
    assert resolved(outside, "T", Place(), Chain(said("one"))) == "T"
    assert resolved(outside, "T", Place(), Chain(said("two"))) == "T"


def test_tasks_of_one_step_run_beside_each_other() -> None:
    lineage = Lineage()
    system = {"role": "system", "content": LONG}

    def leaves(step: int, *topics: str) -> list[str]:
        return [
            resolved(lineage, "T", at("leaf", f"{step}{t}", step), Chain([system, *said(t)]))
            for t in topics
        ]

    first = leaves(1, "a", "b", "c")
    assert first[0] == "T" and len(set(first)) == 3
    # in a later step the same conversations are free again
    assert set(leaves(2, "d", "e", "f")) == set(first)
    assert len(set(leaves(3, "g", "h", "i", "j"))) == 4


def test_an_edited_history_stays_where_enough_of_it_is_kept() -> None:
    lineage = Lineage()
    resolved(lineage, "T", at("model", "1", 1), Chain(said(LONG, "a", "r")))
    edited = Chain(said(LONG, "a", "another question"))
    assert resolved(lineage, "T", at("retry", "2", 2), edited) == "T"
    unrelated = Chain(said("short", "a", "another question"))
    assert resolved(lineage, "T", at("other", "3", 3), unrelated) != "T"


@settings(max_examples=30)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=4), min_size=1, max_size=30))
def test_whatever_is_sent_gets_one_conversation_and_memory_is_bounded(
    calls: list[list[str]],
) -> None:
    lineage = Lineage()
    for step, texts in enumerate(calls):
        found = resolved(lineage, "T", at("n", str(step), step), Chain(said(*texts)))
        assert found == "T" or found.startswith("T~")
        assert resolved(lineage, "T", at("n", str(step), step), Chain(said(*texts))) == found


def test_branches_are_bounded() -> None:
    lineage = Lineage()
    for n in range(3 * MAX_BRANCHES):
        resolved(lineage, "T", at("leaf", str(n), 1), Chain(said(f"topic {n}")))
    assert len(lineage._branches) == MAX_BRANCHES


# --- threads, sub-agents, explicit conversations ----------------------------------------------


def site(
    namespace: str, *, thread: str | None = "T", step: int = 1, explicit: Conversation | None = None
) -> CallSite:
    return CallSite(explicit=explicit, thread_id=thread, namespace=namespace, step=step)


def resolve(known: Conversations, where: CallSite, *texts: str) -> Conversation:
    found = known.resolve(where, said(*texts), gateway="g")
    assert found is not None
    return found


def test_sub_agents_are_children_named_by_their_namespace() -> None:
    known = Conversations()
    root = resolve(known, site("model:1"), "q")
    child = resolve(known, site("tools:2|model:3"), "sub q")
    again = resolve(known, site("tools:2|model:4", step=3), "sub q", "a", "r")
    grandchild = resolve(known, site("tools:2|tools:5|model:6"), "deep q")
    other = resolve(known, site("tools:7|model:8"), "sub q 2")
    assert (root.id, root.parent_id) == ("T", None)
    assert child is again
    assert (child.id, child.parent_id) == ("T|tools:2", "T")
    assert (grandchild.id, grandchild.parent_id) == ("T|tools:2|tools:5", "T|tools:2")
    assert (other.id, other.parent_id) == ("T|tools:7", "T")
    ended = [c.id for c in known.forget("T", gateway="g")]
    assert ended[-1] == "T" and len(ended) == 4
    assert known.forget("T", gateway="g") == []


def test_an_agent_that_is_a_node_goes_on_from_run_to_run() -> None:
    known = Conversations()
    first = resolve(known, site("researcher:1|model:2"), "q")
    second = resolve(known, site("researcher:3|model:4"), "q", "a", "r")
    assert first is second
    assert (first.id, first.parent_id) == ("T", None)
    fresh = resolve(known, site("researcher:5|model:6"), "something else")
    assert (fresh.id, fresh.parent_id) == ("T|researcher:5", "T")
    writer = resolve(known, site("writer:7|model:8"), "write")
    assert (writer.id, writer.parent_id) == ("T|writer:7", "T")
    late_root = resolve(known, site("model:9"), "the root's own, and late")
    assert late_root.id.startswith("T~")


def test_threads_are_apart_and_nothing_is_tagged_without_one() -> None:
    known = Conversations()
    assert known.resolve(site("model:1", thread=None), said("q"), gateway="g") is None
    one = resolve(known, site("", thread="one"), "q")
    assert one is not resolve(known, site("", thread="two"), "q")
    assert one is not known.resolve(site("", thread="one"), said("q"), gateway="elsewhere")


def test_an_explicit_conversation_takes_the_threads_place() -> None:
    known = Conversations()
    talk = conversation("mine")
    assert resolve(known, site("model:1", explicit=talk), "q") is talk
    child = resolve(known, site("tools:2|model:3", explicit=talk), "sub q")
    assert (child.id, child.parent_id) == ("mine|tools:2", "mine")
    aside = resolve(known, site("tools:2", step=2, explicit=talk), "a tool's own")
    assert aside.id.startswith("mine~") and aside.parent_id == "mine"
    talk.end()
    assert aside.ended and child.ended
    assert resolve(known, site("tools:9|model:1", explicit=talk), "late") is talk
