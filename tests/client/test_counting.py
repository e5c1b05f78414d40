"""Token counters, and the gateway's small API they use."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_agents import (
    BytesTokenCounter,
    Conversation,
    Gateway,
    GatewayResponseError,
    GatewayUnreachableError,
    ServerTokenCounter,
    TokenCounter,
    TokenCountError,
    wire,
)
from conserve_agents.counting import count_first_turn

ASK = [{"role": "user", "content": "question"}]


def count(prompt: Any, tools: Any = None) -> int:
    return BytesTokenCounter().count(prompt, tools)


def test_bytes_over_four_counts_texts_and_schemas() -> None:
    assert count("x" * 40) == 10
    assert count("x" * 41) == 11
    assert count("") == 1
    assert count([{"role": "user", "content": "é" * 32}]) == (64 + 16) // 4
    parts = [{"type": "text", "text": "x" * 64}, {"type": "text", "text": "x" * 64}]
    assert count([{"role": "user", "content": parts}]) == (128 + 16) // 4
    assert count(ASK, [{"name": "n"}]) == count(ASK) + len('[{"name":"n"}]') // 4 + 1


def test_a_tool_call_counts_its_name_and_arguments_but_not_its_id() -> None:
    call = {"id": "x" * 400, "type": "function", "function": {"name": "abcd", "arguments": "{}ab"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert count([message]) == (16 + 8) // 4


def test_a_picture_has_a_price_of_its_own_whatever_its_bytes() -> None:
    def picture(size: int) -> list[dict[str, Any]]:
        url = {"url": "data:image/png;base64," + "A" * size}
        return [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]

    assert count(picture(10)) == count(picture(1_000_000)) == 765 + 4


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    )
)
def test_bytes_over_four_takes_anything(message: Any) -> None:
    assert count([message], [message]) >= 1
    assert count([{"type": message, "content": message}]) >= 1


def test_token_ids_need_no_counter() -> None:
    assert count_first_turn([5, 6, 7], None, None) == (3, "token-ids")
    assert count_first_turn([], None, None) == (1, "bytes/4")


def test_the_server_counts_exactly(server: Any) -> None:
    counter = ServerTokenCounter(Gateway(server.base_url), model="m")
    assert isinstance(counter, TokenCounter)
    talk = Conversation("c", counter=counter)
    assert talk.needs_blocking_count()
    tags = talk.headers_for(messages=ASK, tools=[{"type": "function"}])
    assert tags[wire.FIRST_TURN_TOKENS] == "4242"
    assert tags[wire.TOKEN_COUNTER] == "server"
    assert not talk.needs_blocking_count()
    talk.headers_for(messages=ASK)
    (asked,) = server.seen
    assert asked.body == {"messages": ASK, "tools": [{"type": "function"}], "model": "m"}


def test_a_server_that_cannot_count_costs_accuracy_not_the_call(
    server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server.tokenize_status = 503
    counter = ServerTokenCounter(Gateway(server.base_url))
    with pytest.raises(TokenCountError, match="HTTP 503"):
        counter.count("text", None)
    tags = Conversation("c", counter=counter).headers_for(messages=ASK)
    assert tags[wire.TOKEN_COUNTER] == "bytes/4"
    assert "bytes/4" in caplog.text and "503" in caplog.text


def test_anybodys_counter_may_fail_in_any_way(caplog: pytest.LogCaptureFixture) -> None:
    class OddError(Exception):
        pass

    class Broken:
        name = "hf:broken"
        blocking = False

        def count(self, prompt: Any, tools: Any) -> int:
            raise OddError("no vocabulary")

    tags = Conversation("c", counter=Broken()).headers_for(messages=ASK)
    assert tags[wire.TOKEN_COUNTER] == "bytes/4"
    assert "no vocabulary" in caplog.text


@pytest.mark.parametrize(("said", "name"), [(-1, "n"), (1.5, "n"), (10**12, "n"), (3, "naïve")])
def test_a_counter_cannot_make_a_tag_the_gateway_would_refuse(said: Any, name: str) -> None:
    class Odd:
        blocking = False

        def count(self, prompt: Any, tools: Any) -> Any:
            return said

    counter: Any = Odd()
    counter.name = name
    assert count_first_turn(ASK, None, counter) == (6, "bytes/4")


def test_the_gateway_says_what_went_wrong() -> None:
    def answer(body: bytes) -> Gateway:
        return Gateway("http://g/v1/", send=lambda request, timeout_s: body)

    assert answer(b'{"count": 3}').count_tokens("x") == 3
    assert answer(b'{"data": [{"id": "m"}, {}, 1]}').models() == ["m"]
    for body in (b"<html>", b"[]", b'{"count": "3"}'):
        with pytest.raises(GatewayResponseError, match="http://g/v1/tokenize"):
            answer(body).count_tokens("x")
    with pytest.raises(GatewayResponseError, match="'data'"):
        answer(b"{}").models()

    def silent(request: Any, timeout_s: float) -> bytes:
        raise TimeoutError("timed out")

    with pytest.raises(GatewayUnreachableError, match="CONSERVE_BASE_URL"):
        Gateway("http://g", send=silent).conversation("c")


def test_the_gateway_is_asked_with_the_callers_key_and_a_quoted_id() -> None:
    asked: list[Any] = []

    def remember(request: Any, timeout_s: float) -> bytes:
        asked.append((request, timeout_s))
        return b"{}"

    gateway = Gateway("http://g", headers={"Authorization": "Bearer k"}, send=remember)
    assert gateway.conversation("a/b?c d") == {}
    assert gateway.end_conversation("x") is True
    request, timeout_s = asked[0]
    assert request.full_url == "http://g/conserve/v1/conversations/a%2Fb%3Fc%20d"
    assert request.get_header("Authorization") == "Bearer k"
    assert timeout_s == 2.0
    assert asked[1][0].get_method() == "DELETE"
