"""LiteLLM in every way of calling, through the real gateway, some attempts refused."""

from __future__ import annotations

from typing import Any

import pytest

litellm = pytest.importorskip("litellm", reason="LiteLLM has its own environment: test-litellm")

from conserve_agents import ServerTokenCounter, conversation, wire  # noqa: E402 - as above
from litellm_conserve import end_session, register  # noqa: E402

#: Two tools called one after the other, an answer, a second answer.
TURNS = 4


def completion(**call: Any) -> Any:
    return litellm.completion(**call, num_retries=2).choices[0].message


def stream(**call: Any) -> Any:
    chunks = list(litellm.completion(**call, num_retries=2, stream=True))
    return litellm.stream_chunk_builder(chunks).choices[0].message


def routed(*, model: str, api_base: str, **call: Any) -> Any:
    deployment = {"model": model, "api_base": api_base}
    router = litellm.Router(
        [{"model_name": "agent", "litellm_params": deployment}],
        num_retries=2,
        disable_cooldowns=True,
    )
    return router.completion("agent", **call).choices[0].message


def fallen_back(*, model: str, api_base: str, **call: Any) -> Any:
    """To another name of the same deployment."""
    deployment = {"model": model, "api_base": api_base}
    names = ("agent", "spare")
    router = litellm.Router(
        [{"model_name": name, "litellm_params": deployment} for name in names],
        num_retries=0,
        disable_cooldowns=True,
        fallbacks=[{"agent": ["spare"]}],
    )
    return router.completion("agent", **call).choices[0].message


@pytest.mark.parametrize("ask", [completion, stream, routed, fallen_back])
def test_sync(ask: Any, case: Any, session: str, schemas: Any, results: Any) -> None:
    case.proxy.refuse(1, 3)
    messages: list[Any] = [{"role": "user", "content": case.question}]
    for _ in range(TURNS):
        message = ask(
            model=f"conserve/{case.model}",
            api_base=case.proxy.base_url,
            messages=messages,
            tools=schemas(case.tools),
            metadata={"session_id": session},
        )
        messages += results(message, case.tools)
        if not message.tool_calls:
            messages.append({"role": "user", "content": case.follow_up})
    assert case.served_as_one(turns=TURNS).id == session
    assert end_session(session, api_base=case.proxy.base_url)
    assert case.gateway.conversation(session)["state"] == "ended"


async def acompletion(**call: Any) -> Any:
    return (await litellm.acompletion(**call, num_retries=2)).choices[0].message


async def astream(**call: Any) -> Any:
    answer = await litellm.acompletion(**call, num_retries=2, stream=True)
    chunks = [chunk async for chunk in answer]
    return litellm.stream_chunk_builder(chunks).choices[0].message


@pytest.mark.parametrize("ask", [acompletion, astream])
async def test_async(ask: Any, case: Any, aprovider: Any, schemas: Any, results: Any) -> None:
    case.proxy.refuse(2, 3)
    messages: list[Any] = [{"role": "user", "content": case.question}]
    async with conversation() as talk:
        for _ in range(TURNS):
            message = await ask(
                model=f"conserve/{case.model}",
                api_base=case.proxy.base_url,
                messages=messages,
                tools=schemas(case.tools),
            )
            messages += results(message, case.tools)
            if not message.tool_calls:
                messages.append({"role": "user", "content": case.follow_up})
        assert talk.last_report is not None and talk.last_report.transfers == 1
    assert case.served_as_one(turns=TURNS).id == talk.id


def test_the_servers_own_count(case: Any, session: str) -> None:
    register(case.model, token_counter=ServerTokenCounter(case.gateway, model=case.model))
    messages = [{"role": "user", "content": case.question}]
    completion(
        model=f"conserve/{case.model}",
        api_base=case.proxy.base_url,
        messages=messages,
        litellm_session_id=session,
    )
    (call,) = case.proxy.calls
    exact = case.gateway.count_tokens(messages, model=case.model)
    assert call.tag(wire.FIRST_TURN_TOKENS) == str(exact)
