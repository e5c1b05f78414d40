"""Engines that answer nonsense: what they say is checked before it is believed or passed on."""

from __future__ import annotations

import json
from typing import Any

import pytest

CHAT = "/v1/chat/completions"


def _usage(prompt: Any, output: Any, cached: Any) -> dict[str, Any]:
    details = {"cached_tokens": cached}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "prompt_tokens_details": details,
    }


# --- counts ----------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "counts",
    [
        _usage(-50, 3, 0),
        _usage(50, -3, 0),
        _usage(99_999_999_999, 99_999_999_999, 999_999_999_999),
        _usage(49_999, 2, 0),  # together beyond the engine's context length
        {},
    ],
)
async def test_impossible_counts_are_missing_counts(
    make_cluster: Any, reply: Any, counts: dict[str, Any], stream: bool
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    cluster.decoders[0].replies.append(reply(counts=counts))
    answer = await cluster.chat("c", "x" * 400, stream=stream)
    assert answer.status == 200
    assert cluster.gateway.metrics.usage_missing == 1
    seen = (await cluster.ask("GET", "/conserve/v1/conversations/c")).json()
    assert 80 < seen["prompt_tokens"] < 140
    assert 0 <= seen["output_tokens"] < 10
    cluster.settled()
    assert (await cluster.chat("c", "x" * 400, "a", "b")).status == 200
    cluster.settled()


@pytest.mark.parametrize(("claimed", "taken"), [(-7, 0), (10**12, 100), (60, 60)])
async def test_cached_tokens_are_at_most_the_prompt(
    make_cluster: Any, reply: Any, claimed: int, taken: int
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    cluster.decoders[0].replies.append(reply(counts=_usage(100, 3, claimed)))
    answer = await cluster.chat("c", "x" * 400)
    assert answer.headers["x-conserve-cached-tokens"] == str(taken)
    assert cluster.gateway.metrics.cached_tokens == taken
    assert cluster.gateway.metrics.usage_missing == 0


async def test_several_choices_may_exceed_the_context_together(
    make_cluster: Any, reply: Any
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    cluster.decoders[0].replies.append(reply(counts=_usage(100, 90_000, 0)))
    assert (await cluster.chat("c", "x" * 400, n=2)).status == 200
    assert cluster.gateway.metrics.usage_missing == 0


# --- replies ---------------------------------------------------------------------------------
def _http(body: bytes, status: bytes = b"200 OK", kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (
        status,
        kind,
        len(body),
        body,
    )


GARBAGE = [
    _http(b"<html>oops</html>", kind=b"text/html"),
    _http(b""),
    _http(b"[1, 2]"),
    _http(b'{"choices": ['),
    _http(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    b"HTTP/1.1 204 No Content\r\n\r\n",
    _http(b"", status=b"302 Found"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("raw", GARBAGE)
async def test_garbage_is_tried_elsewhere(
    make_cluster: Any, reply: Any, raw: bytes, stream: bool
) -> None:
    cluster = await make_cluster(prefillers=0)
    for decoder in cluster.decoders:
        decoder.replies.append(reply(raw=raw))
    answer = await cluster.chat("c", "hi", stream=stream)  # three attempts: the third is well
    assert answer.status == 200
    assert b"choices" in answer.body
    assert b"oops" not in answer.body
    cluster.settled()


async def test_garbage_everywhere_is_502(make_cluster: Any, reply: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    cluster.decoders[0].replies += [reply(raw=GARBAGE[0])] * 3
    answer = await cluster.chat("c", "hi")
    assert (answer.status, answer.code) == (502, "upstream_failed")
    assert "JSON object" in answer.json()["error"]["message"]
    cluster.settled()


async def test_cookies_of_an_engine_are_not_passed_on(make_cluster: Any, reply: Any) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    raw = b"HTTP/1.1 200 OK\r\nset-cookie: a=b\r\nx-engine: e\r\ncontent-length: 14\r\n\r\n"
    cluster.decoders[0].replies.append(reply(raw=raw + b'{"choices":[]}'))
    answer = await cluster.chat("c", "hi")
    assert answer.status == 200
    assert answer.headers["x-engine"] == "e"
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("include_usage", [False, True])
async def test_stream_without_its_end_is_a_failed_turn(
    make_cluster: Any, reply: Any, include_usage: bool
) -> None:
    cluster = await make_cluster(prefillers=0, decoders=1)
    cluster.decoders[0].replies.append(reply(done=False))
    options = {"include_usage": include_usage}
    answer = await cluster.chat("c", "hi", stream=True, stream_options=options)
    assert answer.status == 200
    last = [event for event in answer.body.split(b"\n\n") if event][-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_failed"
    counters = (await cluster.ask("GET", "/conserve/v1/cluster")).json()["counters"]
    assert counters["turns_by_outcome"] == {"failed": 1}
    cluster.settled()


@pytest.mark.parametrize("include_usage", [False, True])
async def test_end_of_a_stream_is_found_however_it_is_cut(
    make_cluster: Any, reply: Any, include_usage: bool
) -> None:
    text = b'data: {"choices":[],"usage":null}\n\ndata: [DONE]\n\n'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in text)
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    cluster = await make_cluster(prefillers=0, decoders=1)
    cluster.decoders[0].replies.append(reply(raw=head + chunks + b"0\r\n\r\n"))
    options = {"include_usage": include_usage}
    answer = await cluster.chat("c", "hi", stream=True, stream_options=options)
    assert answer.body == text
    cluster.settled()


async def test_model_that_speaks_of_the_end_does_not_end(make_cluster: Any, reply: Any) -> None:
    words = b'data: {"choices":[{"text":"say data: [DONE] now"}],"usage":null}\n\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    cluster = await make_cluster(prefillers=0, decoders=1)
    cluster.decoders[0].replies.append(reply(raw=head + words))
    answer = await cluster.chat("c", "hi", stream=True)
    assert answer.body.startswith(words)
    assert b"upstream_failed" in answer.body
    cluster.settled()
