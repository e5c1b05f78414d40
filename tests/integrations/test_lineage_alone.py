"""Conversations without any key, through a real gateway: recognised by their messages alone."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from conserve_agents import Gateway

CONVERSATION = "x-conserve-conversation-id"
RELATION = "x-conserve-relation"
DECODER = "x-conserve-decode-engine"


class Client:
    """The plainest client there is: JSON over one connection, and no id anywhere."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc)

    def chat(self, key: str, **body: Any) -> tuple[Any, Any]:
        """One chat completion: its headers, and the message in it."""
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        data = json.dumps(body)
        self._connection.request("POST", "/v1/chat/completions", data, headers)
        response = self._connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        message = answer["choices"][0]["message"]
        return response.headers, {name: message[name] for name in ("role", "content")}

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def client(cluster: str) -> Iterator[Client]:
    with contextlib.closing(Client(cluster)) as made:
        yield made


class Agent:
    """A plain client: no header, no id, the whole history every time."""

    def __init__(self, client: Client, model: str, task: str, *, key: str = "conserve") -> None:
        self._client = client
        self._model = model
        self._key = key
        self._task = task[:60]
        self.messages: list[Any] = [
            {"role": "system", "content": "You are an agent without a session key."},
            {"role": "user", "content": task},
        ]

    def turn(self, messages: list[Any] | None = None) -> tuple[Any, Any]:
        """One turn, of the given messages or its own; returns headers and the answer's message."""
        sent = self.messages if messages is None else messages
        return self._client.chat(self._key, model=self._model, messages=sent, max_tokens=2)

    def step(self, number: int) -> Any:
        """One turn, after which a tool has answered."""
        headers, message = self.turn()
        self.messages += [message, {"role": "user", "content": f"{self._task}: {number}"}]
        return headers


def test_two_hundred_turns_stay_on_one_decoder(
    client: Client, gateway: Gateway, model_name: str
) -> None:
    agent = Agent(client, model_name, "explore, two hundred times. " * 100)
    seen = [agent.step(number) for number in range(200)]
    assert {h["x-conserve-identity-source"] for h in seen} == {"lineage"}
    assert [h[RELATION] for h in seen] == ["new", *["extend"] * 199]
    assert len({h[CONVERSATION] for h in seen}) == 1
    assert [h["x-conserve-turn-index"] for h in seen] == [str(n) for n in range(1, 201)]
    assert len({h[DECODER] for h in seen}) == 1
    known = gateway.conversation(seen[0][CONVERSATION])
    assert known["turns"] == 200
    assert known["transfers"] == 1
    assert known["cached_token_shortfall_tokens"] == 0


def test_a_fork_is_recognised_as_a_fork(client: Client, gateway: Gateway, model_name: str) -> None:
    agent = Agent(client, model_name, "a task with two ways on")
    trunk = [agent.step(number) for number in range(5)][-1]
    # Back to the third turn, and on from there in another way.
    other = [*agent.messages[:7], {"role": "user", "content": "try something else"}]
    branch, _ = agent.turn(other)
    assert branch[RELATION] == "fork"
    assert branch[CONVERSATION] != trunk[CONVERSATION]
    assert gateway.conversation(branch[CONVERSATION])["parent"] == trunk[CONVERSATION]
    on = agent.step(5)  # the trunk is not disturbed
    assert (on[RELATION], on[CONVERSATION]) == ("extend", trunk[CONVERSATION])
    assert on["x-conserve-turn-index"] == "6"


@pytest.mark.parametrize("kept", [4, 8])
def test_a_compaction_is_recognised_as_a_rewrite(
    client: Client, model_name: str, kept: int
) -> None:
    """As LangChain's and OpenHands' do it: a summary, and the latest messages as they were."""
    agent = Agent(client, model_name, f"a long task, of which {kept} messages are kept")
    before = [agent.step(number) for number in range(8)][-1]
    system, *history = agent.messages
    summary = {"role": "user", "content": "Summary of the conversation so far: all went well."}
    agent.messages = [system, summary, *history[-kept:]]
    after = agent.step(8)
    assert after[RELATION] == "rewrite"
    assert after[CONVERSATION] == before[CONVERSATION]
    assert after["x-conserve-turn-index"] == "9"
    on = agent.step(9)
    assert (on[RELATION], on[CONVERSATION]) == ("extend", before[CONVERSATION])


def test_a_retry_is_recognised_as_a_replay(client: Client, model_name: str) -> None:
    agent = Agent(client, model_name, "a task whose second call is repeated")
    agent.step(0)
    first, _ = agent.turn()
    again, _ = agent.turn()
    assert again[RELATION] == "replay"
    assert again["x-conserve-turn-index"] == first["x-conserve-turn-index"] == "2"
    assert again[CONVERSATION] == first[CONVERSATION]


def test_another_key_is_another_conversation(client: Client, model_name: str) -> None:
    agent = Agent(client, model_name, "told apart by key")
    mine = agent.step(0)
    stranger = Agent(client, model_name, "told apart by key", key="somebody else")
    theirs, _ = stranger.turn(agent.messages)
    assert theirs[RELATION] == "new"
    assert theirs[CONVERSATION] != mine[CONVERSATION]
