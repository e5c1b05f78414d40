"""The proxy's hook, called as the proxy calls it; ``test_proxy`` has it in a real one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

litellm = pytest.importorskip("litellm", reason="LiteLLM has its own environment: test-litellm")

from conserve_agents import Gateway, ServerTokenCounter, wire  # noqa: E402 - as above
from litellm_conserve import ConServeProxyHook  # noqa: E402

Come = Callable[..., Any]
_call_ids = count(1)


@pytest.fixture
def hook() -> Any:
    return ConServeProxyHook()


@pytest.fixture
def come(hook: Any, session: str) -> Come:
    """A request comes to the proxy; what goes on from there."""

    async def request(call_type: str = "acompletion", **given: Any) -> dict[str, Any]:
        data = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        data |= {"metadata": {"session_id": session}, "litellm_call_id": f"call-{next(_call_ids)}"}
        data |= given
        await hook.async_pre_call_hook(None, None, data, call_type)
        return data

    return request


def turn(data: dict[str, Any]) -> tuple[str, str]:
    headers = data["extra_headers"]
    return headers[wire.TURN_ID], headers[wire.TURN_INDEX]


async def test_a_request_is_tagged_once(come: Come, session: str) -> None:
    data = await come(extra_headers={"X-Mine": "1"})
    assert data["extra_headers"]["X-Mine"] == "1"
    assert data["extra_headers"][wire.CONVERSATION_ID] == session
    assert turn(data)[1] == "1" and turn(await come())[1] == "2"


@pytest.mark.parametrize("call_type", ["aembedding", "amoderation", "aimage_generation"])
async def test_other_requests_are_left_alone(come: Come, call_type: str) -> None:
    assert "extra_headers" not in await come(call_type)


@pytest.mark.parametrize(
    ("call_type", "prompt"), [("atext_completion", "prompt"), ("aresponses", "input")]
)
async def test_prompts_of_the_other_apis_are_counted(
    come: Come, call_type: str, prompt: str
) -> None:
    data = await come(call_type, **{"messages": None, prompt: "x" * 400})
    assert data["extra_headers"][wire.FIRST_TURN_TOKENS] == "100"


async def test_only_the_models_it_is_told_of(session: str) -> None:
    hook = ConServeProxyHook(models={"mine"})
    data: dict[str, Any] = {"metadata": {"session_id": session}, "messages": []}
    for model, tagged in (("other", False), ("mine", True)):
        request = {**data, "model": model}
        await hook.async_pre_call_hook(None, None, request, "acompletion")
        assert ("extra_headers" in request) is tagged


@pytest.mark.parametrize(
    "odd", [{"metadata": "text"}, {"messages": 7}, {"headers": ["x"]}, {"proxy_server_request": 1}]
)
async def test_odd_requests_pass(come: Come, odd: dict[str, Any]) -> None:
    """What is wrong with them, LiteLLM or the gateway will say."""
    assert (await come(**odd))["model"] == "m"


async def test_a_request_that_failed_and_comes_again_is_the_same_turn(
    hook: Any, come: Come
) -> None:
    first = await come()
    await hook.async_post_call_failure_hook(first, RuntimeError("no engine"), None)
    again = await come()
    assert turn(again) == turn(first)


async def test_a_request_that_came_right_after_all_is_over(
    hook: Any, come: Come, ask: dict[str, Any], refuse: Any, aprovider: Any
) -> None:
    """The provider has seen its first attempt fail, in the same process."""
    data = await come()
    refuse(1)
    answer = await litellm.acompletion(**ask, extra_headers=data["extra_headers"], num_retries=2)
    headers = await hook.async_post_call_response_headers_hook(data, None, answer)
    assert headers[wire.TURN_INDEX.lower()] == "1"
    following = await come()
    assert turn(following)[0] != turn(data)[0] and turn(following)[1] == "2"
    assert following["extra_headers"][wire.PLACEMENT] == "place-2"


async def test_a_streams_answer_is_heard_when_it_comes(
    hook: Any, come: Come, ask: dict[str, Any], aprovider: Any
) -> None:
    """The proxy says that a stream goes out before it is opened."""
    data = await come(stream=True)
    answer = await litellm.acompletion(**ask, extra_headers=data["extra_headers"], stream=True)
    await hook.async_post_call_response_headers_hook(data, None, answer)
    assert [chunk async for chunk in answer]
    assert (await come())["extra_headers"][wire.PLACEMENT] == "place-1"


async def test_a_stream_that_cannot_be_opened_and_comes_again_is_the_same_turn(
    hook: Any, come: Come
) -> None:
    first = await come(stream=True)
    await hook.async_post_call_response_headers_hook(first, None, object())
    await hook.async_post_call_failure_hook(first, RuntimeError("no engine"), None)
    assert turn(await come(stream=True)) == turn(first)


async def test_an_answer_without_a_gateway_behind_it_says_nothing(hook: Any, come: Come) -> None:
    data = await come()
    assert await hook.async_post_call_response_headers_hook(data, None, object()) is None
    assert await hook.async_post_call_response_headers_hook(data, None, None) is None


async def test_a_counter_may_ask_the_server(server: Any, session: str) -> None:
    hook = ConServeProxyHook(token_counter=ServerTokenCounter(Gateway(server.base_url)))
    data: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "litellm_session_id": session,
    }
    await hook.async_pre_call_hook(None, None, data, "acompletion")
    assert data["extra_headers"][wire.FIRST_TURN_TOKENS] == "4242"
