"""Tagging single HTTP requests: an OpenAI client that somebody else has made, through httpx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from conserve_agents import Conversation, conversation, wire
from conserve_agents.hooks import HttpTagger

httpx = pytest.importorskip("httpx2" if openai.__version__ >= "3" else "httpx")
ASK: list[Any] = [{"role": "user", "content": "hi"}]
CALL: dict[str, Any] = {"model": "m", "messages": ASK}
AT_ONCE = {"retry-after-ms": "1"}


def hooked(server: Any, tagger: HttpTagger) -> openai.OpenAI:
    hooks = {"request": [tagger.tag], "response": [tagger.observe]}
    return openai.OpenAI(
        base_url=server.base_url, api_key="k", http_client=httpx.Client(event_hooks=hooks)
    )


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with hooked(server, HttpTagger()) as made:
        yield made


def tags(server: Any, name: str) -> list[str | None]:
    return [call.tag(name) for call in server.calls]


def test_calls_are_tagged_and_answers_taken_in(server: Any, client: openai.OpenAI) -> None:
    with conversation("c") as talk:
        client.chat.completions.create(**CALL)
        list(client.chat.completions.create(**CALL, stream=True))
        client.responses.create(model="m", input="hi")
        client.models.list()
        assert talk.turns == 3 and talk.last_report is not None
    client.chat.completions.create(**CALL)
    assert tags(server, wire.TURN_INDEX) == ["1", "2", "3", None]
    assert tags(server, wire.PLACEMENT) == [None, "place-1", "place-2", None]
    assert server.ended == ["c"]
    assert server.seen[-2].headers["authorization"] == "Bearer k"  # the end's


def test_the_sdks_retries_and_the_applications_keep_the_tag(
    server: Any, client: openai.OpenAI, reply: Any
) -> None:
    server.script.extend([reply(status=503, headers=AT_ONCE), reply(status=400)])
    with conversation("c"):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**CALL)
        client.chat.completions.create(**CALL)
        client.chat.completions.create(**CALL)
    assert tags(server, wire.TURN_INDEX) == ["1", "1", "1", "2"]
    assert len(set(tags(server, wire.TURN_ID))) == 2


def test_a_connection_that_broke_keeps_it_too(server: Any) -> None:
    tagger = HttpTagger()

    with conversation("c", end_on_exit=False) as talk:
        request = httpx.Request("POST", f"{server.base_url}/chat/completions", json=CALL)
        tagger.tag(request)
        with hooked(server, tagger) as client:
            client.chat.completions.create(**CALL)
        assert talk.turns == 1
    assert tags(server, wire.TURN_ID) == [request.headers[wire.TURN_ID]]


def test_a_conversation_of_its_own_and_tags_by_hand(server: Any) -> None:
    with hooked(server, HttpTagger(Conversation("own"))) as client:
        client.chat.completions.create(**CALL)
        mine = {wire.CONVERSATION_ID: "mine"}
        client.chat.completions.create(**CALL, extra_headers=mine)
        with conversation("c", end_on_exit=False):
            client.chat.completions.create(**CALL)
    assert tags(server, wire.CONVERSATION_ID) == ["own", "mine", "c"]


def test_a_request_it_cannot_read_is_sent_untagged(caplog: pytest.LogCaptureFixture) -> None:
    request = httpx.Request("POST", "http://g/v1/chat/completions", content=b"not JSON")
    with conversation("c", end_on_exit=False) as talk:
        HttpTagger().tag(request)
    assert wire.CONVERSATION_ID not in request.headers and talk.turns == 0
    assert "untagged" in caplog.text
