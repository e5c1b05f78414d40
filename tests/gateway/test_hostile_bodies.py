"""Bodies no honest client sends: an answer that names the fault, never a 500, never a 502."""

from __future__ import annotations

import json
from typing import Any

import pytest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def _nest(depth: int, start: bytes, end: bytes) -> bytes:
    return start * depth + b"1" + end * depth


NESTED = [
    _nest(depth, *pair) for depth in (2000, 100_000) for pair in ((b"[", b"]"), (b'{"a":', b"}"))
]


@pytest.mark.parametrize("nested", NESTED, ids=len)
@pytest.mark.parametrize(
    ("path", "field"),
    [
        (CHAT, b"messages"),
        (CHAT, b"metadata"),
        (CHAT, b"stream_options"),
        (CHAT, b"unknown"),
        (COMPLETIONS, b"prompt"),
        ("/conserve/v1/conversations", b"unknown"),
        ("/conserve/v1/handoffs", b"unknown"),
        ("/conserve/v1/engines", b"unknown"),
    ],
)
async def test_deep_nesting_is_invalid_json(
    make_cluster: Any, path: str, field: bytes, nested: bytes
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    rest = b"" if field == b"messages" else b', "messages": [{"role": "user", "content": "hi"}]'
    answer = await cluster.ask(
        "POST", path, b'{"model": "qwen", "%b": %b%b}' % (field, nested, rest)
    )
    assert (answer.status, answer.code) == (400, "invalid_json")
    assert "nest" in answer.json()["error"]["message"]
    assert cluster.gateway.metrics.internal_errors == 0
    assert cluster.decoders[0].bodies(path) == []


@pytest.mark.parametrize("depth", range(100, 1000, 50))
async def test_nesting_of_any_depth_is_taken_or_refused(
    make_cluster: Any, depth: int, long_text: str
) -> None:
    """Decoders stand at different depths of the stack: none of them may fail another way."""
    cluster = await make_cluster()
    nested = _nest(depth, b"[", b"]")
    for path, field in ((CHAT, b"metadata"), (CHAT, b"tools"), (COMPLETIONS, b"x")):
        answer = await cluster.ask(
            "POST",
            path,
            b'{"model": "qwen", "%b": %b, "prompt": "%b", "messages": [{"content": "%b"}]}'
            % (field, nested, long_text.encode(), long_text.encode()),
        )
        assert answer.status in (200, 400)
        if answer.status == 400:
            assert answer.code == "invalid_json"
    assert cluster.gateway.metrics.internal_errors == 0
    cluster.settled()


@pytest.mark.parametrize("size", [0, 2000])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, b'{"model": "qwen", "messages": [{"role": "user", "content": "%b\xff"}]}'),
        (CHAT, b'{"model": "qwen", "messages": [{"role": "\xc3", "content": "%b"}]}'),
        (CHAT, b'{"model": "qwen", "messages": [{"content": "%b"}], "tools": ["\xed\xa0\x80"]}'),
        (COMPLETIONS, b'{"model": "qwen", "prompt": "%b\xff"}'),
        (COMPLETIONS, b'{"model": "qwen", "prompt": "%b", "unknown": "\xff"}'),
    ],
)
async def test_invalid_utf8_is_the_requests_fault(
    make_cluster: Any, path: str, body: bytes, size: int
) -> None:
    cluster = await make_cluster()
    answer = await cluster.ask("POST", path, body % (b"x" * size))
    assert (answer.status, answer.code) == (400, "invalid_json")
    assert "UTF-8" in answer.json()["error"]["message"]
    assert all(not engine.bodies("/v1/tokenize") for engine in cluster.engines.values())
    assert len(cluster.gateway.conversations) == 0


@pytest.mark.parametrize("half", [b"\\ud800", b"\\ud800 and more", b"\\udc00 and more"])
async def test_half_a_surrogate_pair_is_the_requests_fault(make_cluster: Any, half: bytes) -> None:
    cluster = await make_cluster()
    body = b'{"model": "qwen", "prompt": "%b%b"}' % (b"x" * 2000, half)
    answer = await cluster.ask("POST", COMPLETIONS, body)
    assert (answer.status, answer.code) == (400, "invalid_json")
    cluster.settled()


@pytest.mark.parametrize(("refused", "status"), [(400, 400), (422, 400), (404, 200), (500, 200)])
async def test_prompt_the_tokenizer_refuses(
    make_cluster: Any, long_text: str, refused: int, status: int
) -> None:
    cluster = await make_cluster()
    for engine in cluster.engines.values():
        engine.tokenize_status = refused
    answer = await cluster.chat("c", long_text)
    assert answer.status == status
    if status == 400:
        assert answer.json()["error"]["message"] == "no tokenizer"
        assert answer.json()["error"]["param"] == "messages"
        assert all(not engine.bodies(CHAT) for engine in cluster.engines.values())
    cluster.settled()


# --- prompts ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "means"),
    [
        ('["one text"]', "one text"),
        ("[[1, 2, 3]]", [1, 2, 3]),
        ('[ "a" ]', "a"),
        (" [1,2]", [1, 2]),
        ("[" + " " * 99 + "1,2,3]", [1, 2, 3]),
    ],
)
async def test_lists_with_one_prompt_are_taken(
    make_cluster: Any, prompt: str, means: str | list[int]
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    body = f'{{"model": "qwen", "prompt": {prompt}}}'.encode()
    answer = await cluster.ask("POST", COMPLETIONS, body)
    assert answer.status == 200
    (sent,) = cluster.decoders[0].bodies(COMPLETIONS)
    assert sent["prompt"] == means


@pytest.mark.parametrize("listed", [False, True])
async def test_prompt_in_a_list_is_handed_over(
    make_cluster: Any, long_text: str, listed: bool
) -> None:
    cluster = await make_cluster()
    prompt = [long_text] if listed else [list(range(400))]
    answer = await cluster.ask("POST", COMPLETIONS, {"model": "qwen", "prompt": prompt})
    assert answer.status == 200
    assert answer.headers["x-conserve-prefill-engine"] == "p0"


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("[-1]", "token ids"),
        ("[1, -1]", "token ids"),
        ("[4294967296]", "token ids"),
        ("[" + " " * 99 + '1, "a"]', "token ids"),
        ("[[1, -1]]", "token ids"),
        ("[]", "empty"),
        ("[[]]", "empty"),
        ("[[1], [2]]", "several conversations"),
        ('["a", "b"]', "several conversations"),
        ("[{}]", "text or a list of token ids"),
        ("[1.5]", "token ids"),
    ],
)
async def test_prompts_that_are_refused(make_cluster: Any, prompt: str, says: str) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    body = f'{{"model": "qwen", "prompt": {prompt}}}'.encode()
    answer = await cluster.ask("POST", COMPLETIONS, body)
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "prompt"
    assert says in answer.json()["error"]["message"]


# --- names and ids ---------------------------------------------------------------------------
@pytest.mark.parametrize("path", [CHAT, "/v1/models/"])
async def test_unknown_model_is_quoted_in_part(make_cluster: Any, path: str) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    name = "m" * 5000
    if path == CHAT:
        answer = await cluster.ask("POST", CHAT, {"model": name, "messages": [{"content": "hi"}]})
    else:
        answer = await cluster.ask("GET", path + name)
    assert answer.status == 404
    message = answer.json()["error"]["message"]
    assert "m" * 200 in message
    assert "m" * 201 not in message


async def test_two_conversation_ids_are_400(make_cluster: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    name = b"x-conserve-conversation-id"
    data = json.dumps({"model": "qwen", "messages": [{"content": "hi"}]}).encode()
    for second, status in ((b"a", 200), (b"b", 400)):
        response = await cluster.pool.request("POST", CHAT, [(name, b"a"), (name, second)], data)
        answer = await response.read()
        assert response.status == status
    error = json.loads(answer)["error"]
    assert error["param"] == "X-ConServe-Conversation-ID"
    assert "two" in error["message"]


async def test_engine_id_in_use_is_409(make_cluster: Any, fake_engine: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    other = await fake_engine().start()
    try:
        new = {"id": "d0", "url": other.url, "tier": "decode"}
        taken = await cluster.ask("POST", "/conserve/v1/engines", new)
        assert (taken.status, taken.code) == (409, "engine_exists")
        assert '"replace": true' in taken.json()["error"]["message"]
        assert cluster.gateway.fleet.get("d0").url == cluster.decoders[0].url
        slash = await cluster.ask("POST", "/conserve/v1/engines", {**new, "id": "a/b"})
        assert (slash.status, slash.json()["error"]["param"]) == (400, "id")
        forced = await cluster.ask("POST", "/conserve/v1/engines", {**new, "replace": True})
        assert forced.status == 201
        assert cluster.gateway.fleet.get("d0").url == other.url
        await cluster.state("d0", "ready")
        await other.kill()
        await cluster.state("d0", "lost")  # a lost one's id is free
        new["url"] = cluster.decoders[0].url
        assert (await cluster.ask("POST", "/conserve/v1/engines", new)).status == 201
    finally:
        await other.kill()
