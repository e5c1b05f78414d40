"""Telling conversations apart by their messages, and by where in a graph they are sent."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from conserve_agents import Conversation, conversation, wire
from langchain_conserve.identity import CallSite, Conversations
from langchain_conserve.lineage import MAX_BRANCHES, Chain, Lineage, Place

LONG = "a long question with plenty of context " * 20


def said(*texts: str) -> list[BaseMessage]:
    return [(HumanMessage, AIMessage)[i % 2](text) for i, text in enumerate(texts)]


def at(
    node: str,
    task: str = "t",
    step: int | None = 1,
    namespace: str = "",
    origin: str | None = None,
) -> Place:
    return Place(
        namespace=namespace,
        node=node,
        task=task,
        step=step,
        supersteps=(None if step is None else f"step {step}",),
        origin=origin,
    )


def resolved(lineage: Lineage, main_id: str, place: Place, chain: Chain) -> str:
    id_, _, _ = lineage.resolve(main_id, place, chain, main_is_free=main_id not in lineage)
    return id_


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
    system = SystemMessage(LONG)

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


def test_instructions_alone_make_no_edit_of_another_nodes_conversation() -> None:
    lineage = Lineage()
    system = SystemMessage(LONG)
    resolved(lineage, "T", at("planner", "1", 1), Chain([system, *said("plan")]))
    writer = resolved(lineage, "T", at("writer", "2", 2), Chain([system, *said("write")]))
    assert writer != "T"
    assert resolved(lineage, "T", at("planner", "3", 3), Chain([system, *said("re-plan")])) == "T"


def test_a_run_from_an_earlier_checkpoint_is_a_fork() -> None:
    lineage = Lineage()
    resolved(lineage, "T", at("model", "1", 1), Chain(said("q")))
    resolved(lineage, "T", at("model", "2", 4), Chain(said("q", "a", "r")))

    def fork(step: int, task: str, origin: str, *texts: str) -> tuple[str, str | None]:
        place = at("model", task, step, origin=origin)
        id_, _, source = lineage.resolve("T", place, Chain(said(*texts)), main_is_free=False)
        return id_, source

    first, source = fork(2, "3", "c1", "q")
    assert first.startswith("T~") and source == "T"
    assert fork(5, "4", "c1", "q", "b", "s") == (first, None)  # goes on
    assert fork(7, "5", "c1", "summary", "s") == (first, None)  # rewrites its own
    again, source = fork(2, "6", "c1", "q")
    assert again not in ("T", first) and source == "T"  # once more from the same checkpoint
    edited, source = fork(2, "7", "c2", "other q")
    assert edited not in ("T", first, again) and source is None  # nothing is shared with anything
    # The thread goes on at the fork, and so does what is left of the trunk.
    assert resolved(lineage, "T", at("model", "8", 9), Chain(said("summary", "s", "c", "t"))) == (
        first
    )
    assert resolved(lineage, "T", at("model", "9", 9), Chain(said("q", "a", "r", "d", "u"))) == "T"


def test_equal_calls_under_way_at_once_are_apart_in_a_graph() -> None:
    lineage = Lineage()
    here = at("model", "1", 1)
    first, branch, _ = lineage.resolve("T", here, Chain(said("q")), main_is_free=True)
    branch.running = 1
    second = resolved(lineage, "T", here, Chain(said("q")))
    assert second != first
    branch.running = 0
    assert resolved(lineage, "T", here, Chain(said("q"))) in (first, second)
    # outside of a graph the thread's id was given with the call
    outside = Lineage()
    _, branch, _ = outside.resolve("T", Place(), Chain(said("q")), main_is_free=True)
    branch.running = 1
    assert resolved(outside, "T", Place(), Chain(said("other q"))) == "T"


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
    namespace: str,
    *,
    thread: str | None = "T",
    step: int = 1,
    above: tuple[str, ...] = (),
    explicit: Conversation | None = None,
    origin: str | None = None,
) -> CallSite:
    """A call's site; ``above``: the steps of the agents above it, where those matter."""
    unknown = (None,) * (namespace.count("|") - len(above))
    return CallSite(
        explicit=explicit,
        thread_id=thread,
        namespace=namespace,
        step=step,
        supersteps=(*above, *unknown, f"step {step}"),
        origin=origin,
    )


def resolve(known: Conversations, where: CallSite, *texts: str) -> Conversation:
    """The conversation of a call that comes back before the next is made."""
    call = known.begin(where, said(*texts), gateway="g")
    assert call is not None
    call.end()
    return call.conversation


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


def test_parallel_sub_agents_with_one_question_are_apart() -> None:
    known = Conversations()
    resolve(known, site("model:1"), "q")
    ids = set()
    for task in "abc":
        for step, texts in enumerate((("sub q",), ("sub q", task, "r"))):
            where = site(f"tools:{task}|model:{step}", step=step, above=("checkpoint 1",))
            ids.add(resolve(known, where, *texts).id)
    assert ids == {"T|tools:a", "T|tools:b", "T|tools:c"}
    # a call of the tool in a later step is a sub-agent of its own, too
    later = resolve(known, site("tools:d|model:1", above=("checkpoint 2",)), "another sub q")
    assert later.id == "T|tools:d"


def test_who_started_it_is_who_called_the_tool() -> None:
    known = Conversations()
    resolve(known, site("model:1"), "q")
    resolve(known, site("model:2", step=3), "q", "a", "r")
    fork = resolve(known, site("model:3", step=2, origin="c1"), "q")
    assert (fork.id[:2], fork.parent_id) == ("T~", "T")
    leaf = resolve(known, site("leaf:6|model:7", origin="c1"), "leaf q")
    deeper = resolve(known, site("leaf:6|tools:8|model:9", origin="c1"), "deep q")
    assert (leaf.parent_id, deeper.parent_id) == (fork.id, leaf.id)
    aside = resolve(known, site("tools:4", step=3, origin="c1"), "rephrase")
    child = resolve(known, site("tools:4|model:5", origin="c1"), "sub q")
    assert aside.parent_id == child.parent_id == fork.id


def test_a_conversation_made_here_counts_from_its_own_first_turn() -> None:
    known = Conversations()
    resolve(known, site("model:1"), "q", "a", "r")
    fork = resolve(known, site("model:3", step=2, origin="c1"), "q", "b", "s")
    prompt = [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]
    assert fork.headers_for(prompt)[wire.TURN_INDEX] == "1"
    resumed = resolve(known, site("model:1", thread="of another process"), "q", "a", "r")
    assert resumed.headers_for(prompt)[wire.TURN_INDEX] == "2"


def test_threads_are_apart_and_nothing_is_tagged_without_one() -> None:
    known = Conversations()
    assert known.begin(site("model:1", thread=None), said("q"), gateway="g") is None
    one = resolve(known, site("", thread="one"), "q")
    assert one is not resolve(known, site("", thread="two"), "q")
    elsewhere = known.begin(site("", thread="one"), said("q"), gateway="elsewhere")
    assert elsewhere is not None and elsewhere.conversation is not one


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


def test_a_forked_process_gets_a_lock_of_its_own() -> None:
    known = Conversations()
    known._lock.acquire()  # as another thread did, when the process was forked
    known.after_fork()
    assert resolve(known, site("model:1"), "q").id == "T"
