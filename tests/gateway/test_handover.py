"""What may be handed over: prompts that are their token ids, and nothing besides."""

from __future__ import annotations

from typing import Any

import pytest

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


@pytest.mark.parametrize(
    "more",
    [
        {"cache_salt": "mine"},
        {"extra_key": "mine"},
        {"lora_path": "adapter"},
        {"messages": [{"role": "user", "content": [PICTURE, {"type": "text", "text": "What?"}]}]},
    ],
    ids=lambda more: next(iter(more)),
)
async def test_a_prompt_that_is_more_than_its_token_ids_is_not_handed_over(
    make_cluster: Any, long_text: str, more: dict[str, Any]
) -> None:
    """With ``input_ids`` SGLang drops pictures; page keys would lack the salt or the adapter."""
    cluster = await make_cluster()
    if "messages" in more:
        more["messages"][0]["content"][1]["text"] = long_text
    answer = await cluster.chat("c", long_text, **more)
    assert answer.status == 200
    assert answer.headers["x-conserve-transfers"] == "0"
    assert cluster.prefillers[0].bodies("/generate") == []
    (sent,) = (
        body for engine in cluster.decoders for body in engine.bodies("/v1/chat/completions")
    )
    assert "input_ids" not in sent
    counters = (await cluster.ask("GET", "/conserve/v1/cluster")).json()["counters"]
    assert counters["fallbacks_by_reason"] == {"not_only_tokens": 1}
    cluster.settled()


async def test_text_in_parts_is_handed_over(make_cluster: Any, long_text: str) -> None:
    cluster = await make_cluster()
    parts = [{"type": "text", "text": long_text}]
    messages = [{"role": "user", "content": parts}]
    answer = await cluster.chat("c", long_text, messages=messages, cache_salt=None)
    assert answer.headers["x-conserve-prefill-engine"] == "p0"
    assert answer.headers["x-conserve-transfers"] == "1"
    cluster.settled()
