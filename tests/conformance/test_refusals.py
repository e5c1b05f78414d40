"""What is refused, with which status and in which of SGLang's error shapes."""

from __future__ import annotations

from typing import Any

import pytest

from conserve_serving.engines.client_wire import error_message
from conserve_serving.engines.http_errors import EngineRefused

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
USER = {"role": "user", "content": "hi there"}
TOO_LONG = [300] * 19_999  # fits the context, not the pool
BEYOND = [300] * 140_000  # fits neither


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [USER], "max_tokens": 4, **fields}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        pytest.param(CHAT, b"{", "JSON", id="chat-json"),
        pytest.param(CHAT, b"", "", id="chat-empty"),
        pytest.param(CHAT, {"model": "tiny"}, "messages", id="chat-no-messages"),
        pytest.param(CHAT, chat(messages=[]), "Messages cannot be empty", id="chat-none"),
        pytest.param(CHAT, chat(messages=[{"role": "x", "content": "a"}]), "role", id="chat-role"),
        pytest.param(CHAT, chat(max_tokens="many"), "max_tokens", id="chat-type"),
        pytest.param(CHAT, chat(max_tokens=-1), "max_new_tokens", id="chat-negative"),
        pytest.param(CHAT, chat(max_tokens=999_999), "token", id="chat-overflow"),
        pytest.param(CHAT, chat(input_ids=TOO_LONG), "maximum allowed length", id="chat-pool"),
        pytest.param(CHAT, chat(input_ids=BEYOND), "context length", id="chat-context"),
        pytest.param(
            CHAT, chat(input_ids=BEYOND, stream=True), "context length", id="chat-context-stream"
        ),
        pytest.param(
            CHAT,
            chat(messages=[{"role": "user", "content": "word " * 150_000}], stream=True),
            "length",
            id="chat-text-too-long",
        ),
        pytest.param(COMPLETE, b"{", "JSON", id="completion-json"),
        pytest.param(COMPLETE, {"prompt": ""}, "Prompt cannot be empty", id="completion-empty"),
        pytest.param(COMPLETE, {"prompt": []}, "Prompt cannot be empty", id="completion-none"),
        pytest.param(COMPLETE, {"prompt": BEYOND}, "context length", id="completion-context"),
        pytest.param(COMPLETE, {"prompt": TOO_LONG}, "maximum allowed length", id="pool"),
        pytest.param("/v1/tokenize", {}, "Exactly one of", id="tokenize-nothing"),
        pytest.param("/v1/tokenize", {"messages": []}, "Messages cannot be empty", id="tokenize"),
        pytest.param("/v1/tokenize", b"{", "JSON", id="tokenize-json"),
    ],
)
async def test_openai_endpoints_refuse_with_an_error_object(
    engine: Any, path: str, body: Any, message: str
) -> None:
    answer = await engine.ask("POST", path, body)
    assert answer.status == 400
    assert answer.headers["content-type"].startswith("application/json")
    error = answer.json()
    assert {"object", "message", "type", "param", "code"} <= error.keys()
    assert error["object"] == "error"
    assert error["code"] == 400
    assert isinstance(error["type"], str)
    assert message in error["message"]
    assert error_message(answer.body) == error["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param({}, "input_ids", id="nothing"),
        pytest.param({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "", id="negative"),
        pytest.param(
            {"input_ids": TOO_LONG, "sampling_params": {"max_new_tokens": 0}},
            "maximum allowed length",
            id="pool",
        ),
        pytest.param(
            {"input_ids": BEYOND, "sampling_params": {"max_new_tokens": 0}},
            "context length",
            id="context",
        ),
        pytest.param({"text": "a", "session_params": {"id": "never"}}, "never", id="session"),
    ],
)
async def test_generate_refuses_with_an_error_of_its_own_shape(
    engine: Any, body: dict[str, Any], message: str
) -> None:
    answer = await engine.ask("POST", "/generate", body)
    assert answer.status == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert error_message(answer.body) == error["message"]


async def test_the_driver_tells_a_prompt_too_long_from_other_failures(engine: Any) -> None:
    with pytest.raises(EngineRefused, match="context length") as caught:
        await engine.driver.prefill(BEYOND, rid="too-long")
    assert caught.value.status == 400


async def test_unknown_routes_and_methods(engine: Any) -> None:
    for path in ("/nope", "/v1/nope"):
        answer = await engine.ask("POST", path, {})
        assert (answer.status, answer.json()) == (404, {"detail": "Not Found"})
    for path in (CHAT, COMPLETE, "/v1/tokenize", "/abort_request"):
        answer = await engine.ask("GET", path)
        assert (answer.status, answer.json()) == (405, {"detail": "Method Not Allowed"})


async def test_the_content_type_must_be_json(engine: Any) -> None:
    answer = await engine.ask("POST", CHAT, b"{}", content_type="text/plain")
    assert answer.status == 400
    assert "application/json" in answer.json()["message"]


async def test_another_model_s_name_is_served_all_the_same(engine: Any) -> None:
    # The gateway checks names: an engine answers under whatever name it is called by.
    reply = await engine.ok(CHAT, chat(model="nope"))
    assert reply["model"] == "nope"


async def test_unknown_fields_are_ignored(engine: Any) -> None:
    await engine.ok(CHAT, chat(conserve_unheard_of=1))


async def test_nothing_refused_leaves_anything_behind(engine: Any) -> None:
    for body in (chat(input_ids=BEYOND), chat(messages=[])):
        assert (await engine.ask("POST", CHAT, body)).status == 400
    loads = await engine.driver.loads()
    assert (loads.running_requests, loads.waiting_requests) == (0, 0)
