"""Numbers of turns and first-turn lengths, whatever an application does with its calls."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_agents import ArgumentError, Conversation, HandoverError, resume, wire
from conserve_agents.conversation import conversation_of
from conserve_agents.handover import Handover, decode
from conserve_agents.turns import MAX_OPEN, TurnNumbers, fingerprint, opening, prompt_of

ASK: list[Any] = [{"role": "user", "content": "x" * 400}]
ANSWER = {"role": "assistant", "content": "y" * 400}
TOOL = {"role": "tool", "tool_call_id": "1", "content": "z"}


def index(tags: dict[str, str]) -> int:
    return int(tags[wire.TURN_INDEX])


# --- one process ----------------------------------------------------------------------------


def test_a_failed_call_made_again_is_the_same_turn() -> None:
    talk = Conversation()
    first = talk.headers_for(ASK)
    talk.failed(first[wire.TURN_ID], ASK)
    again = talk.headers_for(ASK)
    assert again == first
    talk.observe({}, turn_id=again[wire.TURN_ID])
    # Answered: the same prompt once more is another turn (a second sample).
    assert index(talk.headers_for(ASK)) == 2
    assert talk.turns == 2


def test_parallel_calls_that_fail_each_get_their_own_back() -> None:
    talk = Conversation()
    prompts = [[{"role": "user", "content": str(n)}] for n in range(4)]
    sent = [talk.headers_for(prompt) for prompt in prompts]
    for prompt, tags in zip(prompts[:3], sent, strict=False):
        talk.failed(tags[wire.TURN_ID], prompt)
    talk.observe({}, turn_id=sent[3][wire.TURN_ID])
    again = [talk.headers_for(prompt) for prompt in reversed(prompts[:3])]
    assert [t[wire.TURN_ID] for t in again] == [t[wire.TURN_ID] for t in sent[2::-1]]
    assert index(talk.headers_for(prompts[3])) == 5


def test_as_many_calls_may_fail_at_once_as_an_application_makes() -> None:
    talk = Conversation()
    prompts = [[{"role": "user", "content": str(n)}] for n in range(100)]
    sent = [talk.headers_for(prompt) for prompt in prompts]
    for prompt, tags in zip(prompts, sent, strict=True):
        talk.failed(tags[wire.TURN_ID], prompt)
    assert [talk.headers_for(p)[wire.TURN_ID] for p in prompts] == [t[wire.TURN_ID] for t in sent]
    assert talk.turns == 100


def test_calls_that_fail_in_many_threads_are_tagged_all_the_same() -> None:
    talk = Conversation()

    def calls(thread: int) -> None:
        for n in range(300):
            prompt = [{"role": "user", "content": f"{thread} {n % 11}"}]
            talk.failed(talk.headers_for(prompt)[wire.TURN_ID], prompt)

    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(calls, range(8)))
    finally:
        sys.setswitchinterval(switch_s)
    assert talk.turns == 8 * 11  # every other call was a failed one made again


def test_a_history_that_has_grown_since_a_failure_is_not_digested() -> None:
    numbers = TurnNumbers()
    assert not numbers.may_repeat(ASK)
    turn_id, _ = numbers.begin(ASK, None, lambda: "t")
    numbers.fail(turn_id, ASK, fingerprint(ASK))
    assert numbers.may_repeat([{"role": "user", "content": "as long"}])
    assert not numbers.may_repeat([*ASK, ANSWER]) and not numbers.may_repeat(None)


def test_equal_calls_in_flight_are_turns_of_their_own() -> None:
    talk = Conversation()
    one, two = talk.headers_for(ASK), talk.headers_for(ASK)
    assert (index(one), index(two)) == (1, 2)
    talk.failed(one[wire.TURN_ID], ASK)
    assert talk.headers_for(ASK)[wire.TURN_ID] == one[wire.TURN_ID]


def test_a_failure_is_news_once_and_only_of_an_open_turn() -> None:
    talk = Conversation()
    tags = talk.headers_for(ASK)
    talk.observe({}, turn_id=tags[wire.TURN_ID])
    talk.failed(tags[wire.TURN_ID], ASK)  # answered after all: the client broke later
    talk.failed("somebody else's", ASK)
    assert index(talk.headers_for(ASK)) == 2


def test_a_first_turn_that_failed_leaves_the_length_to_the_next() -> None:
    talk = Conversation()
    long = [{"role": "user", "content": "x" * 4000}]
    tags = talk.headers_for(long)
    assert tags[wire.FIRST_TURN_TOKENS] == "1004"
    talk.failed(tags[wire.TURN_ID], long)  # too long for the model, say
    shorter = talk.headers_for(ASK)
    assert (index(shorter), shorter[wire.FIRST_TURN_TOKENS]) == (2, "104")
    talk.observe({}, turn_id=shorter[wire.TURN_ID])
    later = talk.headers_for(long)
    talk.failed(later[wire.TURN_ID], long)
    assert talk.headers_for(long)[wire.FIRST_TURN_TOKENS] == "104"


def test_a_last_turn_that_failed_is_still_the_last() -> None:
    talk = Conversation()
    tags = talk.headers_for(ASK, final=True)
    talk.failed(tags[wire.TURN_ID], ASK)
    again = talk.headers_for(ASK)
    assert again[wire.FINAL] == "1" and again[wire.TURN_ID] == tags[wire.TURN_ID]
    talk.observe({}, turn_id=again[wire.TURN_ID])
    assert wire.FINAL not in talk.headers_for(ASK)


def test_rewriting_and_forking_inside_do_not_change_the_count_or_the_length() -> None:
    talk = Conversation()
    history = list(ASK)
    for expected in range(1, 6):
        tags = talk.headers_for(history)
        assert index(tags) == expected
        talk.observe({}, turn_id=tags[wire.TURN_ID])
        history += [ANSWER, TOOL]
    compacted = [{"role": "user", "content": "summary"}]
    forked = [*ASK, {"role": "assistant", "content": "another answer"}, TOOL]
    for expected, prompt in enumerate((compacted, forked), start=6):
        tags = talk.headers_for(prompt)
        assert (index(tags), tags[wire.FIRST_TURN_TOKENS]) == (expected, "104")


def test_a_fork_is_a_conversation_whose_first_turn_is_all_it_begins_with(server: Any) -> None:
    talk = Conversation("trunk", gateway=server.base_url)
    talk.headers_for(ASK)
    branch = talk.fork()
    tags = branch.headers_for([*ASK, ANSWER, *ASK])
    assert branch.id != "trunk"
    assert (index(tags), tags[wire.PARENT_ID]) == (1, "trunk")
    assert tags[wire.FIRST_TURN_TOKENS] == str(3 * 104)
    assert wire.PLACEMENT not in tags
    assert talk.fork("named").id == "named"
    talk.end()
    assert server.ended == [branch.id, "trunk"]  # "named" was never used


def test_an_id_of_ones_own_may_be_new_in_spite_of_examples() -> None:
    examples = [*ASK, ANSWER, *ASK, ANSWER, *ASK]
    assert index(Conversation("told").headers_for(examples)) == 3
    talk = Conversation("new", turns=0)
    tags = talk.headers_for(examples)
    assert (index(tags), tags[wire.FIRST_TURN_TOKENS]) == (1, str(5 * 104))
    assert index(Conversation("known", turns=7).headers_for(examples)) == 8


def test_the_gateway_knows_better_when_others_have_gone_on() -> None:
    talk = Conversation("c")
    tags = talk.headers_for(ASK)
    talk.observe({wire.TURN_INDEX: "17"}, turn_id=tags[wire.TURN_ID])
    assert index(talk.headers_for(ASK)) == 18
    talk.observe({wire.TURN_INDEX: "2"})
    assert index(talk.headers_for(ASK)) == 19


@given(st.lists(st.sampled_from(["new", "same", "fail", "answer"]), max_size=60))
def test_numbers_are_dense_and_retries_keep_theirs(steps: list[str]) -> None:
    numbers, ids = TurnNumbers(), iter(range(1000))
    last: tuple[bytes, str, int] | None = None
    given_out: dict[str, int] = {}
    failed: dict[bytes, tuple[str, int]] = {}
    for n, step in enumerate(steps):
        if step in ("new", "same"):
            key = last[0] if step == "same" and last else str(n).encode()
            turn = numbers.begin(ASK, key, lambda: str(next(ids)))
            if key in failed:
                assert turn == failed.pop(key)
            else:
                assert turn[1] == len(given_out) + 1
            given_out[turn[0]] = turn[1]
            last = (key, *turn)
        elif last is not None and step == "fail":
            if numbers.fail(last[1], ASK, last[0]):
                failed[last[0]] = last[1:]
                while len(failed) > 8:
                    failed.pop(next(iter(failed)))
        elif last is not None:
            numbers.end(last[1], gateway_index=None)
            failed = {key: turn for key, turn in failed.items() if turn[0] != last[1]}
    assert numbers.turns == len(given_out)


# --- several processes ----------------------------------------------------------------------


def test_a_token_carries_everything_on() -> None:
    talk = Conversation(parent_id="p")
    talk.headers_for(ASK)
    sent = talk.headers_for([*ASK, ANSWER, *ASK])
    talk.observe({wire.PLACEMENT: "here", wire.TURN_INDEX: "2"}, turn_id=sent[wire.TURN_ID])
    token = talk.handover()
    assert wire.is_legal_id(token[:200]) and "\n" not in token
    there = resume(token)
    # Compacted in the meantime: nothing in the history tells what has been.
    tags = there.headers_for([{"role": "user", "content": "summary"}])
    assert (there.id, there.parent_id) == (talk.id, "p")
    assert index(tags) == 3
    assert tags[wire.FIRST_TURN_TOKENS] == "104"
    assert tags[wire.TOKEN_COUNTER] == "bytes/4"
    assert tags[wire.PLACEMENT] == "here"


def test_two_processes_may_take_turns() -> None:
    here = Conversation()
    examples = [*ASK, ANSWER]
    history: list[Any] = [*examples, *ASK]
    assert index(here.headers_for(history)) == 1
    there = pickle.loads(pickle.dumps(here))  # noqa: S301 - made one line above
    for expected, side in enumerate([there, there, here, there, here, here], start=2):
        history += [ANSWER, *ASK]
        assert index(side.headers_for(history)) == expected
    assert here.first_turn_tokens == there.first_turn_tokens == 3 * 104


def test_who_resumes_does_not_end_it_unless_asked(server: Any) -> None:
    token = Conversation("c").handover()
    with resume(token, gateway=server.base_url) as there:
        there.headers_for(ASK)
    assert server.ended == []
    with resume(token, gateway=server.base_url, end_on_exit=True) as there:
        there.headers_for(ASK)
    assert server.ended == ["c"]


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_real_process_takes_over(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from talk_on_in_another_process import talk_on  # noqa: PLC0415 - importable only here

    context: Any = multiprocessing.get_context(method)
    talk = Conversation()
    first = talk.headers_for(ASK)
    queue = context.Queue()
    process = context.Process(target=talk_on, args=(talk, [*ASK, ANSWER, *ASK], queue))
    process.start()
    pid, tags, token = queue.get(timeout=60)
    process.join(timeout=60)
    assert pid != os.getpid()
    assert tags[wire.CONVERSATION_ID] == talk.id
    assert index(tags) == 2 and tags[wire.TURN_ID] != first[wire.TURN_ID]
    assert tags[wire.FIRST_TURN_TOKENS] == first[wire.FIRST_TURN_TOKENS]
    assert decode(token).turns == 2


def test_a_forked_copy_neither_hangs_on_a_lock_nor_ends_it(server: Any) -> None:
    held, let_go = threading.Event(), threading.Event()

    class Slow:
        name = "slow"
        blocking = True

        def count(self, prompt: Any, tools: Any) -> int:
            held.set()
            let_go.wait(60)
            return 7

    talk = Conversation("c", counter=Slow(), gateway=server.base_url)
    counting = threading.Thread(target=talk.headers_for, args=(ASK,))
    counting.start()
    held.wait(60)  # the counting lock is held by another thread now
    read, write = os.pipe()
    with talk:
        pid = os.fork()
        if pid == 0:  # pragma: no cover - the child
            let_go.set()
            with os.fdopen(write, "w") as out:
                out.write(talk.headers_for(ASK)[wire.FIRST_TURN_TOKENS])
                talk.__exit__(None, None, None)
                out.write(" ended" if talk.ended else " open")
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as said:
            assert said.read() == "7 open"
        os.waitpid(pid, 0)
        assert server.ended == []
        let_go.set()
        counting.join(60)
    assert server.ended == ["c"]


@given(
    st.builds(
        Handover,
        id=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=200),
        turns=st.integers(0, 10**6),
        examples=st.none() | st.integers(0, 99),
        first_turn_tokens=st.none() | st.integers(0, 10**6),
        placement=st.none() | st.text(st.characters(min_codepoint=33, max_codepoint=126)),
    )
)
def test_tokens_come_back_as_they_went(given_over: Handover) -> None:
    token = given_over.encode()
    assert token.isascii() and token.isprintable() and " " not in token
    assert decode(token) == given_over


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "conserve1.",
        "conserve1.!!!",
        "conserve1.e30",  # {}
        "conserve1.W10",  # []
        "x",
        7,
        Handover(id="a", turns=-1).encode(),
        Handover(id="a b").encode(),
        Handover(id="a", placement="x\ny").encode() + "\n",
        Handover(id="a", counter="ü").encode(),
    ],
)
def test_what_is_no_token_is_refused(bad: Any) -> None:
    with pytest.raises(HandoverError, match="hand-over token"):
        resume(bad)


# --- prompts --------------------------------------------------------------------------------


def test_answers_in_a_row_are_one() -> None:
    items = [
        {"role": "user", "content": "q"},
        {"type": "reasoning", "id": "r"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "1"},
        {"type": "function_call_output", "call_id": "2", "output": "2"},
        {"type": "message", "role": "assistant", "content": []},
        {"role": "user", "content": "q2"},
    ]
    assert opening(items) == (2, items[:1])
    assert opening("text") == (0, "text")
    assert opening(items[:1]) == (0, items[:1])


def test_instructions_are_part_of_a_responses_prompt() -> None:
    assert prompt_of({"input": "hi"}) == "hi"
    told = {"role": "system", "content": "be brief"}
    user = {"role": "user", "content": "hi"}
    assert prompt_of({"input": "hi", "instructions": "be brief"}) == [told, user]
    assert prompt_of({"input": [user], "instructions": "be brief"}) == [told, user]
    assert prompt_of({"messages": [user], "input": "other"}) == [user]
    assert prompt_of({"model": "m"}) is None


def test_fingerprints_follow_the_content() -> None:
    assert fingerprint(ASK) == fingerprint([dict(ASK[0])])
    assert fingerprint(ASK) != fingerprint([*ASK, ANSWER])
    assert fingerprint("a") != fingerprint(["a"])
    assert fingerprint(None) is None
    assert fingerprint([{"content": object}, {1: {2}}]) is not None
    itself: list[Any] = []
    itself.append(itself)
    assert fingerprint(itself) is None


def test_turns_that_nobody_says_were_answered_are_forgotten_in_the_end() -> None:
    talk = Conversation()
    ids = [talk.headers_for("text")[wire.TURN_ID] for _ in range(MAX_OPEN + 2)]
    assert conversation_of(ids[0]) is None and conversation_of(ids[1]) is None
    assert conversation_of(ids[2]) is talk


def test_an_odd_number_of_turns_is_refused() -> None:
    for odd in (-1, "3"):
        with pytest.raises(ArgumentError, match="turns"):
            Conversation("c", turns=odd)  # type: ignore[arg-type] # what is tested
