"""Lineage by itself: long histories decoded only where they are new, forks, rewrites, bounds."""

from __future__ import annotations

import json
import random
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_serving.core.types import ConversationId
from conserve_serving.gateway import lineage as module
from conserve_serving.gateway.lineage import Lineage, Match, PrefixMark, Relation
from conserve_serving.gateway.request import Api, TurnRequest, parse_turn

SYSTEM = {"role": "system", "content": "You are an agent."}


def request(messages: list[Any], **fields: Any) -> TurnRequest:
    body = json.dumps({"model": "m", "messages": messages, **fields})
    return parse_turn(Api.CHAT, body.encode())


def look(lineage: Lineage, messages: list[Any], **fields: Any) -> Match:
    asked = request(messages, **fields)
    return lineage.match(asked, PrefixMark(asked), salt="s")


def send(lineage: Lineage, name: str, messages: list[Any], **fields: Any) -> Match:
    match = look(lineage, messages, **fields)
    lineage.remember(ConversationId(name), match)
    return match


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def result(id: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": text}


def talk(turns: int, size: int = 10, name: str = "") -> list[Any]:
    """A prompt of so many turns, each of about ``size`` bytes."""
    messages: list[Any] = [SYSTEM, user(f"{name} task " + "x" * size)]
    for number in range(turns - 1):
        messages += [said(f"{name} a{number} " + "y" * size), user(f"u{number} " + "z" * size)]
    return messages


@pytest.mark.parametrize("size", [10, 3000])
def test_every_turn_extends_the_one_before(size: int) -> None:
    lineage = Lineage(1000)
    for turns in range(1, 60):
        match = send(lineage, "a", talk(turns, size))
        assert match.relation is (Relation.NEW if turns == 1 else Relation.EXTEND)
    assert look(lineage, talk(59, size)).relation is Relation.REPLAY


@pytest.mark.parametrize("size", [10, 3000])
def test_fork_rewrite_and_what_is_neither(size: int) -> None:
    lineage = Lineage(1000)
    for turns in range(1, 30):
        send(lineage, "a", talk(turns, size))
    whole = [*talk(29, size), said("latest"), user("next")]
    fork = look(lineage, [*talk(20, size), said("another way"), user("go")])
    assert (fork.relation, fork.conversation) == (Relation.FORK, "a")
    again = look(lineage, talk(20, size))
    assert (again.relation, again.conversation) == (Relation.FORK, "a")
    for kept in (4, 10):
        rewrite = look(lineage, [SYSTEM, user("summary"), *whole[-kept:]])
        assert (rewrite.relation, rewrite.conversation) == (Relation.REWRITE, "a")
    # A condenser that keeps the beginning as well begins like a fork, and is none.
    condensed = look(lineage, [*talk(3, size), user("summary"), *whole[-4:]])
    assert (condensed.relation, condensed.conversation) == (Relation.REWRITE, "a")
    other_system = {"role": "system", "content": "You are somebody else."}
    assert look(lineage, [other_system, *whole[2:]]).relation is Relation.NEW
    assert look(lineage, [SYSTEM, user("summary")]).relation is Relation.NEW
    assert look(lineage, [SYSTEM, user("s"), *whole[-4:]], tools=[{}]).relation is Relation.NEW


def test_what_users_say_to_everybody_is_no_evidence() -> None:
    lineage = Lineage(100)
    send(lineage, "a", [SYSTEM, user("solve it"), said("one"), user("continue")])
    other = look(lineage, [SYSTEM, user("prove it"), said("two"), user("continue")])
    assert other.relation is Relation.NEW
    sampled_again = look(lineage, [SYSTEM, user("solve it"), said("other"), user("continue")])
    assert sampled_again.relation is Relation.NEW  # [system, task] was never a prompt here


def test_the_result_of_a_tool_is_evidence_alone() -> None:
    lineage = Lineage(100)
    history = [user("task"), said("call"), result("call_7f3a", "a.py")]
    send(lineage, "a", [SYSTEM, *history])
    kept = [SYSTEM, user("summary"), history[-1], said("so"), user("and?")]
    match = look(lineage, kept)
    assert (match.relation, match.conversation) == (Relation.REWRITE, "a")


def test_only_the_latest_exchange_is_evidence() -> None:
    lineage = Lineage(100)
    for turns in range(1, 10):
        send(lineage, "a", talk(turns))
    old = talk(5)
    assert look(lineage, [SYSTEM, user("summary"), *old[-2:], said("x")]).relation is Relation.NEW
    assert len(lineage._by_evidence) == 1


def test_concurrent_continuations_part() -> None:
    lineage = Lineage(100)
    send(lineage, "a", talk(3))
    first = send(lineage, "a", [*talk(3), said("x"), user("left")])
    assert first.relation is Relation.EXTEND
    second = look(lineage, [*talk(3), said("x"), user("right")])
    assert (second.relation, second.conversation) == (Relation.FORK, "a")


@pytest.mark.parametrize("size", [10, 3000])
def test_samples_of_one_prompt_are_each_continued(size: int) -> None:
    """Rollouts: one prompt many times at once, each answer continued. No conversation is lost."""
    running: set[str] = set()
    lineage = Lineage(1000, running.__contains__)
    prompt = talk(20, size)
    names = [f"c{number}" for number in range(20)]
    for name in names:
        match = look(lineage, prompt)
        assert match.relation is (Relation.REPLAY if running else Relation.NEW)
        assert match.conversation is None or match.conversation in running
        lineage.remember(ConversationId(name), match)  # as the gateway does: they all run
        running.add(name)
    found = []
    for number, name in enumerate(names):
        running.discard(name)  # its answer has come, and only it can be continued
        match = look(lineage, [*prompt, said(f"sample {number}"), user("go on")])
        assert (match.relation, match.conversation) == (Relation.EXTEND, name)
        lineage.remember(ConversationId(name), match)
        found.append(match.conversation)
        running.add(name)
    assert found == names
    assert look(lineage, [*prompt, said("late"), user("go on")]).relation is Relation.FORK
    running.clear()
    assert look(lineage, prompt).relation is Relation.FORK


def test_ended_conversations_lead_nowhere() -> None:
    lineage = Lineage(100)
    send(lineage, "a", talk(40, 1000))
    lineage.forget(ConversationId("a"))
    assert look(lineage, [*talk(40, 1000), said("x"), user("y")]).relation is Relation.NEW
    assert not lineage._by_evidence


def test_many_prompts_that_differ_late_are_told_apart() -> None:
    """A long document, then a question of each user's: more than are kept by block."""
    lineage = Lineage(1000)
    base = [SYSTEM, user("document " + "x" * 50_000)]
    for number in range(30):
        send(lineage, f"c{number}", [*base, user(f"question {number}")])
    for number in (0, 7, 29):
        match = look(lineage, [*base, user(f"question {number}"), said("a"), user("and?")])
        assert (match.relation, match.conversation) == (Relation.EXTEND, f"c{number}")


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_blocks_find_what_decoding_everything_finds(seed: int) -> None:
    """The quick way over long prompts against the plain one, over random families of prompts."""
    rng = random.Random(seed)
    quick, plain = Lineage(50), Lineage(50)
    plain._anchored = lambda *_: None  # type: ignore[method-assign] -- the plain way
    prompts = [[SYSTEM, user("start " + "s" * rng.choice((10, 40_000)))]]
    for step in range(25):
        messages = list(rng.choice(prompts))
        messages += [
            rng.choice((said, user))(f"{step} " * rng.choice((1, 400, 3000)))
            for _ in range(rng.randrange(4))
        ]
        if rng.random() < 0.2:
            del messages[rng.randrange(1, len(messages)) :]
            messages.append(user("cut"))
        found, wanted = look(quick, messages), look(plain, messages)
        assert (found.relation, found.conversation) == (wanted.relation, wanted.conversation)
        assert found.prompt.links == wanted.prompt.links
        assert found.prompt.evidence == wanted.prompt.evidence
        name = found.conversation or ConversationId(f"c{step}")
        if found.relation is Relation.FORK:
            name = ConversationId(f"c{step}")
        quick.remember(name, found)
        plain.remember(name, wanted)
        if rng.random() < 0.1:
            quick.forget(name)
            plain.forget(name)
        prompts.append(messages)


def test_long_prompts_are_decoded_only_where_they_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    lineage = Lineage(100)
    send(lineage, "a", talk(100, 5000))
    asked = request([*talk(100, 5000), said("new"), user("newer")])
    decoded: list[int] = []

    class Watched:
        def decode(self, data: Any) -> Any:
            decoded.append(len(data))
            return json_messages.decode(data)

    json_messages = module._MESSAGES
    monkeypatch.setattr(module, "_MESSAGES", Watched())
    monkeypatch.setattr(TurnRequest, "messages", lambda self: pytest.fail("decoded it all"))
    match = lineage.match(asked, PrefixMark(asked), salt="s")
    assert match.relation is Relation.EXTEND
    assert len(asked.content) > 900_000
    assert sum(decoded) < 200


def test_the_same_prompt_for_ever_is_looked_up_at_once() -> None:
    lineage = Lineage(10_000)
    for number in range(2000):  # as if all of them had ended
        send(lineage, f"c{number}", talk(2))
        lineage.forget(ConversationId(f"c{number}"))
    assert len(lineage) <= 256
    assert len(lineage._latest) == 0


def test_memory_is_bounded_whatever_comes() -> None:
    limit = 200
    lineage = Lineage(limit)
    tracemalloc.start()
    try:
        for number in range(limit * 3):
            turns = number % 40 + 1
            send(lineage, f"c{number // 40}", talk(turns, 2000, name=str(number // 40)))
            if number == limit * 2:
                before = tracemalloc.get_traced_memory()[0]
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(lineage) == limit
    assert after < before * 1.1
    assert after < limit * 1500
    assert sum(map(len, lineage._by_anchor.values())) <= limit
    assert len(lineage._by_evidence) <= 2 * len(lineage._latest) <= 2 * limit
