"""LiteLLM's proxy, started as its users start it, before a real gateway; called by SDKs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("litellm", reason="LiteLLM has its own environment: test-litellm")

import openai

from conserve_agents import Gateway, conversation, wire
from conserve_agents.openai import ConServeOpenAI

TURNS = 4
HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]


def talk_through(case: Any, ask: Callable[..., Any], schemas: Any, results: Any) -> None:
    """The matrix' conversation."""
    messages: list[Any] = [{"role": "user", "content": case.question}]
    for _ in range(TURNS):
        message = ask(messages=messages, tools=schemas(case.tools))
        messages += results(message, case.tools)
        if not message.tool_calls:
            messages.append({"role": "user", "content": case.follow_up})


@pytest.fixture
def client(ready_proxy: str, key: str) -> Any:
    with openai.OpenAI(base_url=ready_proxy, api_key=key, max_retries=0) as made:
        yield made


# --- the ready configuration ------------------------------------------------------------------


@pytest.mark.parametrize("proxied_case", ["english", "code"], indirect=True)
def test_a_session_in_the_body(
    client: Any, proxied_case: Any, session: str, schemas: Any, results: Any
) -> None:
    case = proxied_case
    case.proxy.refuse(1, 3)  # the proxy's Router tries again

    def ask(**call: Any) -> Any:
        call["extra_body"] = {"metadata": {"session_id": session}}
        call["model"] = f"conserve/{case.model}"
        return client.chat.completions.create(**call).choices[0].message

    talk_through(case, ask, schemas, results)
    assert case.served_as_one(turns=TURNS).id == session


def test_streams_through_the_proxy(
    client: Any, proxied_case: Any, session: str, schemas: Any, results: Any
) -> None:
    case = proxied_case
    case.proxy.refuse(1)

    def ask(**call: Any) -> Any:
        call["extra_body"] = {"litellm_session_id": session}
        call["model"] = f"conserve/{case.model}"
        with client.chat.completions.stream(**call) as events:
            return events.get_final_completion().choices[0].message

    talk_through(case, ask, schemas, results)
    assert case.served_as_one(turns=TURNS).id == session


def test_our_own_client_behind_the_proxy(
    ready_proxy: str, key: str, proxied_case: Any, schemas: Any, results: Any
) -> None:
    """Its tags pass through as they are, and the gateway's answers to it."""
    case = proxied_case
    case.proxy.refuse(2)
    with ConServeOpenAI(base_url=ready_proxy, api_key=key, max_retries=0) as ours:

        def ask(**call: Any) -> Any:
            call["model"] = f"conserve/{case.model}"
            return ours.chat.completions.create(**call).choices[0].message

        with conversation(end_on_exit=False) as talk:
            talk_through(case, ask, schemas, results)
            report = talk.last_report
    served = case.served_as_one(turns=TURNS)
    assert served.id == talk.id
    assert report is not None and report.conversation_id == talk.id
    assert (report.transfers, report.turn_index) == (1, TURNS)
    assert report.decode_engine == served.seen["decode_engine"]
    assert case.proxy.calls[-1].tag(wire.PLACEMENT)  # echoed


def test_a_known_agents_headers_reach_the_gateway(
    client: Any, between: Any, gateway: Gateway, model_name: str, session: str
) -> None:
    """And its sub-agent is told apart: LiteLLM alone would take both for one session."""
    for agent in ({}, {"x-claude-code-agent-id": "helper"}):
        client.chat.completions.create(
            model=f"conserve/{model_name}",
            messages=HELLO,
            extra_headers={"x-claude-code-session-id": session, **agent},
        )
    assert [call.conversation for call in between.calls] == [None, None]
    assert all(call.turn_id for call in between.calls)
    root, helper = (gateway.conversation(id_) for id_ in (session, f"{session}/helper"))
    assert (root["turns"], helper["turns"], helper["parent"]) == (1, 1, session)
    assert root["source"] == "header:x-claude-code-session-id"


def test_a_proxied_retry_of_an_untagged_client_is_one_turn(
    client: Any, between: Any, gateway: Gateway, model_name: str, session: str
) -> None:
    between.refuse(1)
    for _ in range(2):
        client.chat.completions.create(
            model=f"conserve/{model_name}",
            messages=HELLO,
            extra_headers={"x-session-affinity": session},
        )
    first, again, second = between.calls
    assert first.turn_id == again.turn_id != second.turn_id
    assert gateway.conversation(session)["turns"] == 2


def test_the_gateways_headers_come_through(client: Any, model_name: str, session: str) -> None:
    call = {"model": f"conserve/{model_name}", "messages": HELLO}
    call["extra_body"] = {"litellm_session_id": session}
    raw = client.chat.completions.with_raw_response.create(**call)
    assert raw.headers[wire.CONVERSATION_ID] == session
    assert raw.headers[wire.TURN_INDEX] == "1" and raw.headers[wire.DECODE_ENGINE]


def test_errors_keep_their_status(client: Any, between: Any, model_name: str) -> None:
    between.refuse(*range(1, 9), status=429)
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model=f"conserve/{model_name}", messages=HELLO)
    between.forgive()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="conserve/no-such-model", messages=HELLO)


def test_the_other_apis_of_the_proxy(
    client: Any, between: Any, gateway: Gateway, model_name: str, session: str
) -> None:
    """LiteLLM translates them; the conversation stays what it was."""
    model = f"conserve/{model_name}"
    answer = client.responses.create(
        model=model, input="Say hello.", extra_body={"litellm_session_id": session}
    )
    assert answer.output_text
    raw = client.post(
        "/messages",
        body={"model": model, "max_tokens": 20, "messages": HELLO},
        options={"headers": {"x-claude-code-session-id": f"{session}-c"}},
        cast_to=object,
    )
    assert raw["content"][0]["text"]
    assert gateway.conversation(session)["turns"] == 1
    assert gateway.conversation(f"{session}-c")["turns"] == 1


# --- without any code of ours -----------------------------------------------------------------


@pytest.fixture
def stock(zero_code_proxy: str, key: str) -> Any:
    with openai.OpenAI(base_url=zero_code_proxy, api_key=key, max_retries=0) as made:
        yield made


def _one_conversation(seen: dict[str, Any], *, source: str) -> None:
    assert seen["source"] == source
    assert seen["turns"] == TURNS
    assert (seen["transfers"], seen["transfers_by_reason"]) == (1, {"first_turn": 1})
    assert len({turn["decode_engine"] for turn in seen["recent_turns"]}) == 1


def _settled(gateway: Gateway, id_: str) -> dict[str, Any]:
    seen = gateway.conversation(id_)
    while seen["running_turns"]:
        seen = gateway.conversation(id_)
    return seen


def test_a_clients_session_header_is_forwarded(
    stock: Any, proxied_case: Any, session: str, schemas: Any, results: Any
) -> None:
    """``forward_client_headers_to_llm_api``."""

    def ask(**call: Any) -> Any:
        call["extra_headers"] = {"x-session-id": session}
        return stock.chat.completions.create(model="as-it-is", **call).choices[0].message

    talk_through(proxied_case, ask, schemas, results)
    _one_conversation(_settled(proxied_case.gateway, session), source="header:x-session-id")


def test_litellms_session_becomes_a_header(
    stock: Any, proxied_case: Any, session: str, schemas: Any, results: Any
) -> None:
    """``provider_affinity_header``: the session that LiteLLM knows, wherever it stood."""

    def ask(**call: Any) -> Any:
        call["extra_body"] = {"metadata": {"session_id": session}}
        return stock.chat.completions.create(model="affine", **call).choices[0].message

    talk_through(proxied_case, ask, schemas, results)
    _one_conversation(_settled(proxied_case.gateway, session), source="header:x-session-id")


def test_without_anything_the_messages_tell(
    stock: Any, proxied_case: Any, session: str, schemas: Any, results: Any
) -> None:
    case = proxied_case
    seen: list[dict[str, str]] = []

    def ask(**call: Any) -> Any:
        call["messages"] = [{"role": "system", "content": session}, *call["messages"]]
        raw = stock.chat.completions.with_raw_response.create(model="as-it-is", **call)
        seen.append({k.removeprefix("llm_provider-"): v for k, v in raw.headers.items()})
        return raw.parse().choices[0].message

    talk_through(case, ask, schemas, results)
    (id_,) = {headers[wire.CONVERSATION_ID.lower()] for headers in seen}
    _one_conversation(_settled(case.gateway, id_), source="lineage")


def test_the_hook_without_the_provider(
    stock: Any, proxied_case: Any, session: str, schemas: Any, results: Any
) -> None:
    """For the models it is told of; a stock provider carries the tag, and the Router repeats it."""
    case = proxied_case
    case.proxy.refuse(1, 4)
    last: dict[str, str] = {}

    def ask(**call: Any) -> Any:
        call["extra_body"] = {"metadata": {"session_id": session}}
        call["model"] = "tagged-by-hook"
        raw = stock.chat.completions.with_raw_response.create(**call)
        last.update({name.lower(): value for name, value in raw.headers.items()})
        return raw.parse().choices[0].message

    talk_through(case, ask, schemas, results)
    served = case.served_as_one(turns=TURNS)
    assert served.id == session == last[wire.CONVERSATION_ID.lower()]
    assert case.proxy.calls[-1].tag(wire.PLACEMENT)  # the hook has read the answers


def test_the_provider_without_the_hook(
    stock: Any, proxied_case: Any, session: str, schemas: Any, results: Any
) -> None:
    """It reads the session itself, and the client layer knows its retries."""
    case = proxied_case
    case.proxy.refuse(2)

    def ask(**call: Any) -> Any:
        call["extra_body"] = {"litellm_session_id": session}
        answer = stock.chat.completions.create(model="provider-without-hook", **call)
        return answer.choices[0].message

    talk_through(case, ask, schemas, results)
    assert case.served_as_one(turns=TURNS).id == session
