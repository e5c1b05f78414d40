"""The provider ``conserve/<model>`` against a scripted server: what goes out, what comes back."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

litellm = pytest.importorskip("litellm", reason="LiteLLM has its own environment: test-litellm")

import pydantic  # noqa: E402 - as above

import litellm_conserve  # noqa: E402
from conserve_agents import Gateway, ServerTokenCounter, conversation, wire  # noqa: E402
from conserve_agents.openai import AsyncConServeOpenAI, ConServeOpenAI  # noqa: E402

Tags = Callable[[str], list[str | None]]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
    }
]


class City(pydantic.BaseModel):
    name: str


# --- the request ----------------------------------------------------------------------------


def test_parameters_go_where_the_api_has_them(server: Any, ask: dict[str, Any]) -> None:
    litellm.completion(
        **ask,
        temperature=0.25,
        tools=TOOLS,
        tool_choice="auto",
        response_format=City,
        extra_headers={"X-Mine": "1"},
        extra_body={"min_p": 0.1},
        top_k=7,
        chat_template_kwargs={"enable_thinking": False},
        max_retries=5,
        user="somebody",
    )
    (call,) = server.calls
    assert call.path == "/v1/chat/completions"
    assert call.headers["x-mine"] == "1"
    schema = call.body.pop("response_format")
    assert schema["type"] == "json_schema"
    assert schema["json_schema"]["schema"]["required"] == ["name"]
    assert call.body == {
        "model": "fake-model",
        "messages": ask["messages"],
        "temperature": 0.25,
        "tools": TOOLS,
        "tool_choice": "auto",
        "min_p": 0.1,
        "top_k": 7,
        "chat_template_kwargs": {"enable_thinking": False},
    }


def test_litellms_own_objects_may_stand_in_a_history(
    server: Any, ask: dict[str, Any], reply: Any
) -> None:
    server.script.append(reply(tool_calls=(("look", {"at": "Zürich"}),)))
    answer = litellm.completion(**ask, tools=TOOLS).choices[0].message
    history = [
        litellm.Message(role="user", content="hi"),
        {"role": "assistant", "content": None, "tool_calls": list(answer.tool_calls)},
        {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "seen"},
    ]
    litellm.completion(**(ask | {"messages": history}), tools=TOOLS)
    sent = server.calls[1].body["messages"]
    assert sent[0]["content"] == "hi"
    assert json.loads(sent[1]["tool_calls"][0]["function"]["arguments"]) == {"at": "Zürich"}
    assert sent[2]["tool_call_id"] == "call-0"


@pytest.mark.parametrize("with_v1", [True, False])
def test_the_address_is_the_gateways_with_or_without_v1(
    server: Any, ask: dict[str, Any], monkeypatch: pytest.MonkeyPatch, with_v1: bool
) -> None:
    address = server.base_url if with_v1 else server.root
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-another-host")
    litellm.completion(**(ask | {"api_base": address}), api_key="given")
    monkeypatch.setenv("CONSERVE_BASE_URL", address)
    monkeypatch.setenv("CONSERVE_API_KEY", "from-env")
    del ask["api_base"]
    litellm.completion(**ask)
    keys = [call.headers["authorization"] for call in server.calls]
    assert keys == ["Bearer given", "Bearer from-env"]


def test_a_client_of_ones_own_is_used_and_never_retries(
    server: Any, ask: dict[str, Any], reply: Any
) -> None:
    server.script.append(reply(status=503))
    with ConServeOpenAI(base_url=server.base_url, api_key="mine", max_retries=4) as client:
        with pytest.raises(litellm.ServiceUnavailableError):
            litellm.completion(**ask, client=client)
        litellm.completion(**ask, client=client)
    assert [call.headers["authorization"] for call in server.calls] == ["Bearer mine"] * 2


def test_what_cannot_be_used_is_named(ask: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match=r"api_base.*expected http://"):
        litellm.completion(**(ask | {"api_base": "gateway:8000"}))
    with pytest.raises(litellm.BadRequestError, match=r"client: .*pass a ConServeOpenAI"):
        litellm.completion(**ask, client=AsyncConServeOpenAI())


# --- the answer -----------------------------------------------------------------------------


def test_the_answer_is_whole_and_says_where_it_was_made(
    server: Any, ask: dict[str, Any], reply: Any
) -> None:
    server.script.append(
        reply(tool_calls=(("look", {}),), headers={wire.DECODE_ENGINE: "d1", wire.TRANSFERS: "1"})
    )
    answer = litellm.completion(**ask, tools=TOOLS)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.tool_calls[0].function.name == "look"
    assert (answer.model, answer.usage.total_tokens) == ("fake-model", 9)
    upstream = answer._hidden_params["additional_headers"]
    assert upstream["llm_provider-x-conserve-decode-engine"] == "d1"
    assert upstream["llm_provider-x-conserve-transfers"] == "1"


def _assert_whole(chunks: list[Any]) -> None:
    calls = [c for chunk in chunks for c in (chunk.choices[0].delta.tool_calls or [])]
    assert [(c.id, c.index, c.function.name, c.function.arguments) for c in calls] == [
        ("call-0", 0, "look", '{"at": "here"}')
    ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "so"
    assert {chunk.id for chunk in chunks} == {"r"}
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason]
    assert ends == ["tool_calls"]
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.tool_calls[0].function.arguments == '{"at": "here"}'
    # The server's own count: LiteLLM would have to guess one.
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, 2)


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_keeps_tool_calls_and_usage(
    server: Any, ask: dict[str, Any], reply: Any, usage: bool
) -> None:
    server.script.append(reply(text="so", tool_calls=(("look", {"at": "here"}),)))
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(litellm.completion(**ask, tools=TOOLS, stream=True, **options))
    if usage:
        _assert_whole(chunks)
        assert chunks[-1].usage.total_tokens == 9
    else:
        assert not any(getattr(chunk, "usage", None) for chunk in chunks)
        assert chunks[-1]._hidden_params["usage"].total_tokens == 9
    assert server.calls[0].body["stream_options"] == {"include_usage": True}


async def test_an_async_stream_does_too(
    server: Any, aprovider: Any, ask: dict[str, Any], reply: Any
) -> None:
    server.script.append(reply(text="so", tool_calls=(("look", {"at": "here"}),)))
    stream = await litellm.acompletion(
        **ask, tools=TOOLS, stream=True, stream_options={"include_usage": True}
    )
    _assert_whole([chunk async for chunk in stream])


async def test_a_stream_that_is_left_early_lets_go_of_its_connection(
    aprovider: Any, ask: dict[str, Any]
) -> None:
    for read_first in (True, False):
        wrapper = litellm.completion(**ask, stream=True)
        if read_first:
            next(wrapper)
        chunks = wrapper.completion_stream
        chunks.close()
        assert chunks._stream.response.is_closed and next(chunks, None) is None
    wrapper = await litellm.acompletion(**ask, stream=True)
    await anext(wrapper)
    achunks = wrapper.completion_stream
    await wrapper.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(achunks)


async def test_structured_output_and_text_completions(
    server: Any, aprovider: Any, ask: dict[str, Any], reply: Any
) -> None:
    server.script.append(reply(text='{"name": "Bern"}'))
    answer = await litellm.acompletion(**ask, response_format=City)
    assert City.model_validate_json(answer.choices[0].message.content) == City(name="Bern")
    plain = litellm.text_completion(
        model=ask["model"], prompt="once", api_base=ask["api_base"], max_tokens=3
    )
    assert plain.choices[0].text == "hello"


# --- whose call it is -----------------------------------------------------------------------

PROXIED = {"proxy_server_request": {"headers": {"x-claude-code-session-id": "claude-123"}}}
BAGGAGE = {"proxy_server_request": {"headers": {"baggage": "user=47,session.id=in%20baggage;x=y"}}}


@pytest.mark.parametrize(
    ("given", "id_"),
    [
        ({"litellm_session_id": "by-name"}, "by-name"),
        ({"metadata": {"session_id": "by-metadata"}}, "by-metadata"),
        ({"litellm_metadata": {"session_id": "by-litellm-metadata"}}, "by-litellm-metadata"),
        ({"metadata": {"session_id": 42}}, "42"),
        ({"litellm_session_id": "two words"}, wire.safe_id("two words")),
        ({"metadata": {"trace_id": "one-request"}}, None),
        ({"litellm_trace_id": "one-request"}, None),
        (
            {"metadata": {"session_id": "x", "litellm_session_id_generated": True}},
            None,
        ),
        ({"user": "a-person"}, None),
        ({}, None),
        ({**PROXIED, "litellm_session_id": "claude-123"}, None),
        ({**PROXIED, "litellm_session_id": "said-in-the-body"}, "said-in-the-body"),
        ({**BAGGAGE, "litellm_session_id": "in baggage"}, None),
        ({**BAGGAGE, "litellm_session_id": "7"}, "7"),
    ],
)
def test_sessions_as_litellm_names_them(
    ask: dict[str, Any], tags: Tags, given: dict[str, Any], id_: str | None
) -> None:
    litellm.completion(**ask, **given)
    assert tags(wire.CONVERSATION_ID) == [id_]


def test_a_sub_agents_session_has_its_parent_and_ends_with_it(
    server: Any, ask: dict[str, Any], tags: Tags, session: str
) -> None:
    litellm.completion(**ask, litellm_session_id=session)
    helper = {"session_id": f"{session}-helper", "parent_session_id": session}
    litellm.completion(**ask, metadata=helper)
    assert tags(wire.CONVERSATION_ID) == [session, f"{session}-helper"]
    assert tags(wire.PARENT_ID) == [None, session]
    assert litellm_conserve.end_session(session, api_base=server.base_url)
    assert server.ended == [f"{session}-helper", session]


async def test_a_session_of_another_process_can_be_ended(
    server: Any, ask: dict[str, Any], tags: Tags, session: str
) -> None:
    assert await litellm_conserve.aend_session("never seen", api_base=server.base_url)
    assert server.ended == [wire.safe_id("never seen")]
    server.end_status = 404
    assert await litellm_conserve.aend_session(session, api_base=server.base_url) is True
    server.end_status = 500
    assert await litellm_conserve.aend_session(session, api_base=server.base_url) is False


def test_a_session_that_was_ended_begins_anew(
    server: Any, ask: dict[str, Any], tags: Tags, session: str
) -> None:
    for _ in range(2):
        litellm.completion(**ask, litellm_session_id=session)
        litellm_conserve.end_session(session, api_base=server.base_url)
    assert tags(wire.TURN_INDEX) == ["1", "1"]


def test_a_current_conversation_is_meant_first(
    server: Any, ask: dict[str, Any], tags: Tags, session: str
) -> None:
    with conversation("mine") as talk:
        litellm.completion(**ask, litellm_session_id=session)
        stream = litellm.completion(**ask, stream=True)
        assert talk.turns == 2 and talk.last_report is not None
    list(stream)  # read elsewhere
    assert tags(wire.CONVERSATION_ID) == ["mine", "mine"]
    assert tags(wire.PLACEMENT) == [None, "place-1"]
    assert server.ended == ["mine"]


async def test_an_async_stream_belongs_to_where_it_was_asked_for(
    aprovider: Any, ask: dict[str, Any], tags: Tags
) -> None:
    async with conversation("mine", end_on_exit=False):
        stream = await litellm.acompletion(**ask, stream=True)
    async with conversation("other"):
        assert [chunk async for chunk in stream]
        await litellm.acompletion(**ask)
    assert tags(wire.CONVERSATION_ID) == ["mine", "other"]


def test_a_tag_given_by_hand_is_left_alone(turn: dict[str, Any], tags: Tags) -> None:
    by_hand = {wire.CONVERSATION_ID.lower(): "by-hand"}
    with conversation("mine"):
        litellm.completion(**turn, extra_headers=by_hand)
    assert tags(wire.CONVERSATION_ID) == ["by-hand"]
    assert tags(wire.TURN_ID) == [None]


def test_a_proxied_clients_headers_are_passed_on(server: Any, ask: dict[str, Any]) -> None:
    headers = {
        "authorization": "Bearer of-the-client",
        "user-agent": "claude-cli",
        "cookie": "session=secret",
        "x-stainless-lang": "js",
        "x-claude-code-session-id": "claude-123",
        "x-claude-code-agent-id": "agent-1",
        "x-forwarded-for": "10.0.0.1",
        "x-some-session-token": "secret",
    }
    litellm.completion(**ask, proxy_server_request={"headers": headers}, litellm_call_id="the-call")
    (call,) = server.calls
    assert call.headers["x-claude-code-session-id"] == "claude-123"
    assert call.headers["x-claude-code-agent-id"] == "agent-1"
    assert call.tag(wire.TURN_ID) == "the-call"
    assert call.tag(wire.CONVERSATION_ID) is None
    assert call.headers["authorization"] == "Bearer conserve"
    assert not {"cookie", "x-forwarded-for", "x-some-session-token"} & set(call.headers)

    ours = {"X-ConServe-Conversation-ID": "c", "X-ConServe-Turn-ID": "t"}
    litellm.completion(
        **ask, proxy_server_request={"headers": ours}, litellm_call_id="2", litellm_session_id="s"
    )
    assert (server.calls[1].tag(wire.CONVERSATION_ID), server.calls[1].tag(wire.TURN_ID)) == (
        "c",
        "t",
    )


def test_a_stock_provider_with_a_header(cluster: str, gateway: Any, session: str) -> None:
    """The recipe without any code of ours, in the SDK."""
    litellm.completion(
        f"openai/{gateway.models()[0]}",
        messages=[{"role": "user", "content": "hi"}],
        api_base=cluster,
        api_key="conserve",
        extra_headers={wire.CONVERSATION_ID: session},
    )
    assert gateway.conversation(session)["source"] == "conserve"


# --- turns and retries ----------------------------------------------------------------------


def _assert_one_turn(tags: Tags, attempts: int) -> None:
    """So many attempts of turn 1, then turn 2."""
    turn_ids = tags(wire.TURN_ID)
    assert len(turn_ids) == attempts + 1
    assert len(set(turn_ids[:attempts])) == 1 and turn_ids[attempts] != turn_ids[0]
    assert tags(wire.TURN_INDEX) == ["1"] * attempts + ["2"]
    assert len(set(tags(wire.FIRST_TURN_TOKENS))) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_num_retries_is_one_turn(
    turn: dict[str, Any], tags: Tags, refuse: Any, stream: bool
) -> None:
    refuse(2)
    list(litellm.completion(**turn, num_retries=3, stream=stream))
    litellm.completion(**turn)
    _assert_one_turn(tags, 3)


@pytest.mark.parametrize("stream", [False, True])
async def test_async_num_retries_is_one_turn(
    aprovider: Any, turn: dict[str, Any], tags: Tags, refuse: Any, stream: bool
) -> None:
    refuse(2)
    answer = await litellm.acompletion(**turn, num_retries=3, stream=stream)
    if stream:
        assert [chunk async for chunk in answer]
    await litellm.acompletion(**turn)
    _assert_one_turn(tags, 3)


@pytest.fixture
def router(server: Any) -> Any:
    """One deployment, and one to fall back on."""
    deployment = {"model": "conserve/fake-model", "api_base": server.base_url}
    return litellm.Router(
        model_list=[
            {"model_name": "agent", "litellm_params": deployment},
            {"model_name": "spare", "litellm_params": {**deployment, "api_key": "spare"}},
        ],
        num_retries=1,
        retry_after=0,
        disable_cooldowns=True,
        fallbacks=[{"agent": ["spare"]}],
    )


@pytest.fixture
def routed(session: str) -> dict[str, Any]:
    """A call for the router."""
    messages = [{"role": "user", "content": "hi"}]
    return {"model": "agent", "messages": messages, "metadata": {"session_id": session}}


def _assert_fell_back(server: Any) -> None:
    keys = [call.headers["authorization"] for call in server.calls]
    assert keys == ["Bearer conserve"] * 2 + ["Bearer spare"] * 2 + ["Bearer conserve"]


async def test_a_routers_retries_and_fallbacks_are_one_turn(
    server: Any, router: Any, routed: dict[str, Any], refuse: Any, aprovider: Any
) -> None:
    refuse(3)  # twice the one, once the other
    await router.acompletion(**routed)
    await router.acompletion(**routed)
    _assert_one_turn(lambda name: [call.tag(name) for call in server.calls], 4)
    _assert_fell_back(server)


async def test_of_a_routers_async_stream_too(
    router: Any, routed: dict[str, Any], refuse: Any, tags: Tags, aprovider: Any
) -> None:
    refuse(1)
    answer = await router.acompletion(**routed, stream=True)
    assert [chunk async for chunk in answer]
    await router.acompletion(**routed)
    _assert_one_turn(tags, 2)


def test_a_sync_router_too(
    server: Any, router: Any, routed: dict[str, Any], refuse: Any, tags: Tags
) -> None:
    refuse(3)
    router.completion(**routed)
    router.completion(**routed)
    _assert_one_turn(tags, 4)
    _assert_fell_back(server)


def test_fallbacks_of_a_call_are_one_turn(
    server: Any, turn: dict[str, Any], tags: Tags, refuse: Any
) -> None:
    refuse(1)
    litellm.completion(**turn, fallbacks=["conserve/other-model"])
    litellm.completion(**turn)
    _assert_one_turn(tags, 2)
    assert [call.body["model"] for call in server.calls] == [
        *("fake-model", "other-model", "fake-model"),
    ]


async def test_parallel_calls_are_turns_of_their_own(
    server: Any, aprovider: Any, ask: dict[str, Any], tags: Tags, session: str
) -> None:
    calls = (litellm.acompletion(**ask, litellm_session_id=session) for _ in range(4))
    await asyncio.gather(*calls)
    assert sorted(map(str, tags(wire.TURN_INDEX))) == ["1", "2", "3", "4"]


async def test_many_sessions_at_once_never_mix(
    server: Any, aprovider: Any, ask: dict[str, Any], session: str
) -> None:
    """Ten threads and forty tasks; every call says whose it is in its text.

    In one event loop: LiteLLM's own logging does not bear several at once.
    """

    def call(name: str, turn: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": f"{name} {turn}"}]
        return {**ask, "messages": messages, "litellm_session_id": name}

    def in_thread(thread: int) -> None:
        for turn in range(3):
            litellm.completion(**call(f"{session}-thread-{thread}", turn))

    async def in_task(task: int) -> None:
        for turn in range(3):
            await litellm.acompletion(**call(f"{session}-task-{task}", turn))

    server._server.socket.listen(100)  # http.server lets five wait
    with ThreadPoolExecutor(10) as pool:
        threads = [pool.submit(in_thread, thread) for thread in range(10)]
        await asyncio.gather(*(in_task(task) for task in range(40)))
    for thread in threads:
        thread.result()
    assert len(server.calls) == 150
    for seen in server.calls:
        name, turn = seen.body["messages"][0]["content"].split()
        assert seen.tag(wire.CONVERSATION_ID) == name
        assert seen.tag(wire.TURN_INDEX) == str(int(turn) + 1)


def test_event_loops_may_come_and_go(server: Any, ask: dict[str, Any], session: str) -> None:
    async def once() -> None:
        await litellm.acompletion(**ask, litellm_session_id=session)
        await litellm_conserve.provider.aclose()

    for _ in range(3):
        asyncio.run(once())
    assert [call.tag(wire.TURN_INDEX) for call in server.calls] == ["1", "2", "3"]


async def test_a_counter_that_asks_the_server_does_not_block_the_loop(
    server: Any, aprovider: Any, ask: dict[str, Any], tags: Tags, session: str
) -> None:
    threads: list[int] = []

    class Counter(ServerTokenCounter):
        def count(self, prompt: Any, tools: Any) -> int:
            threads.append(threading.get_ident())
            return super().count(prompt, tools)

    counter = Counter(Gateway(server.base_url))
    litellm_conserve.register("fake-model", token_counter=counter)
    for _ in range(2):
        await litellm.acompletion(**ask, litellm_session_id=session)
    async with conversation("mine"):
        await litellm.acompletion(**ask)
    assert len(threads) == 2 and threading.get_ident() not in threads
    assert tags(wire.FIRST_TURN_TOKENS) == ["4242"] * 3
    assert tags(wire.TOKEN_COUNTER) == ["server"] * 3


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        (400, "BadRequestError", 400),
        (401, "AuthenticationError", 401),
        (403, "PermissionDeniedError", 403),
        (404, "NotFoundError", 404),
        (408, "Timeout", 408),
        (409, "APIError", 409),
        (413, "BadRequestError", 413),
        (422, "BadRequestError", 422),
        (429, "RateLimitError", 429),
        (500, "InternalServerError", 500),
        (502, "BadGatewayError", 502),
        (503, "ServiceUnavailableError", 503),
        (504, "Timeout", 504),
        (529, "APIError", 529),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_litellms(
    server: Any, ask: dict[str, Any], refuse: Any, case: tuple[int, str, int], stream: bool
) -> None:
    status, expected, mapped_status = case
    refuse(status=status, **{"retry-after": "7"})
    with pytest.raises(getattr(litellm, expected), match="scripted") as caught:
        litellm.completion(**ask, stream=stream)
    error = caught.value
    assert (error.status_code, error.llm_provider, error.model) == (
        *(mapped_status, "conserve", "fake-model"),
    )
    assert error.litellm_response_headers["retry-after"] == "7"
    assert len(server.calls) == 1


async def test_async_streams_raise_them_when_read(
    server: Any, aprovider: Any, ask: dict[str, Any], reply: Any
) -> None:
    server.script.append(reply(status=400))
    stream = await litellm.acompletion(**ask, stream=True)
    with pytest.raises(litellm.BadRequestError, match="scripted"):
        await anext(stream)


async def test_nobody_there(aprovider: Any, ask: dict[str, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        ask["api_base"] = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(litellm.InternalServerError, match="Connection error"):
            litellm.completion(**ask)
        with pytest.raises(litellm.InternalServerError, match="Connection error"):
            await litellm.acompletion(**ask)


@pytest.mark.parametrize("stream", [False, True])
def test_no_answer_in_time(
    server: Any, turn: dict[str, Any], tags: Tags, reply: Any, stream: bool
) -> None:
    released = threading.Event()
    server.script.append(reply(after=lambda: released.wait(20)))
    try:
        with pytest.raises(litellm.Timeout) as caught:
            litellm.completion(**turn, timeout=0.2, stream=stream)
    finally:
        released.set()
    assert caught.value.status_code == 408
    litellm.completion(**turn)
    assert tags(wire.TURN_INDEX) == ["1", "1"]  # sent again after its deadline: the same turn


def test_httpxs_timeouts_are_understood(server: Any, ask: dict[str, Any]) -> None:
    import httpx  # noqa: PLC0415 - LiteLLM's, whatever the SDK's is

    timeout = httpx.Timeout(30.0, connect=5.0)
    assert litellm.completion(**ask, timeout=timeout).choices


def test_a_prompt_that_no_engine_can_hold(cluster: str, model_name: str) -> None:
    """LiteLLM has fallbacks of their own for these."""
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(
            model=f"conserve/{model_name}",
            messages=[{"role": "user", "content": "word " * 400_000}],
            api_base=cluster,
        )


def test_a_server_that_is_no_gateway(ask: dict[str, Any]) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer  # noqa: PLC0415 - only here

    class Web(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Web) as web:
        threading.Thread(target=web.handle_request, daemon=True).start()
        ask["api_base"] = f"http://127.0.0.1:{web.server_port}"
        with pytest.raises(litellm.APIError, match="not a chat completion: is api_base"):
            litellm.completion(**ask)


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_stream_that_breaks_off(
    aprovider: Any, ask: dict[str, Any], asynchronous: bool
) -> None:
    """The connection ends within a chunk: never a short answer that looks whole."""
    from http.server import BaseHTTPRequestHandler, HTTPServer  # noqa: PLC0415 - only here

    class Breaking(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            delta = {"role": "assistant", "content": "half of it"}
            chunk = {"id": "r", "created": 1, "model": "m", "object": "chat.completion.chunk"}
            data = json.dumps(chunk | {"choices": [{"index": 0, "delta": delta}]}).encode()
            event = b"data: " + data + b"\n\n"
            self.wfile.write(b"%x\r\n%s\r\nff\r\nda" % (len(event), event))
            self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Breaking) as web:
        threading.Thread(target=web.handle_request, daemon=True).start()
        ask["api_base"] = f"http://127.0.0.1:{web.server_port}"
        text = ""
        with pytest.raises(litellm.exceptions.MidStreamFallbackError, match="ConServe") as caught:
            if asynchronous:
                async for chunk in await litellm.acompletion(**ask, stream=True):
                    text += chunk.choices[0].delta.content or ""
            else:
                for chunk in litellm.completion(**ask, stream=True):
                    text += chunk.choices[0].delta.content or ""
    assert text == "half of it" == caught.value.generated_content
    assert isinstance(caught.value.original_exception, litellm.InternalServerError)


def test_a_router_cools_a_refusing_deployment_down(server: Any, reply: Any) -> None:
    with type(server)() as full:
        full.script.extend([reply(status=429)] * 50)
        router = litellm.Router(
            model_list=[
                {
                    "model_name": "agent",
                    "litellm_params": {
                        "model": "conserve/fake-model",
                        "api_base": each.base_url,
                        "order": order,
                    },
                }
                for order, each in ((1, full), (2, server))
            ],
            num_retries=2,
            retry_after=0,
            allowed_fails=0,
            cooldown_time=600,
        )
        for _ in range(5):
            router.completion("agent", [{"role": "user", "content": "hi"}])
        assert len(full.calls) <= 2
        assert len(server.calls) == 5


# --- what LiteLLM is told -------------------------------------------------------------------


def test_registering_tells_litellm_what_models_can_do(
    server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(litellm, "model_cost", dict(litellm.model_cost))
    litellm_conserve.register(api_base=server.base_url, supports_vision=True)
    assert litellm.supports_function_calling("conserve/fake-model")
    assert litellm.supports_response_schema("conserve/fake-model")
    assert litellm.supports_vision("conserve/fake-model")
    assert [item["provider"] for item in litellm.custom_provider_map].count("conserve") == 1
    assert server.seen[-1].path == "/v1/models"

    litellm_conserve.register(api_base="http://127.0.0.1:9/v1")
    assert "was not told of the gateway's models" in caplog.text


def test_another_provider_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"provider": "other", "custom_handler": litellm.CustomLLM()}
    monkeypatch.setattr(litellm, "custom_provider_map", [other])
    litellm_conserve.register("m")
    assert litellm.custom_provider_map[0] is other
    assert len(litellm.custom_provider_map) == 2
