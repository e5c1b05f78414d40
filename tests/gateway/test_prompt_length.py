"""A prompt is refused for its length only when it has been counted."""

from __future__ import annotations

from typing import Any


async def test_an_estimate_alone_refuses_nothing(
    make_cluster: Any, fake_engine: Any, reply: Any
) -> None:
    """A tail turn's length is estimated, from what its conversation's text was like so far."""
    decoder = fake_engine(max_context_tokens=2000)
    counts = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
    decoder.replies.append(reply(counts=counts))  # text of few bytes a token
    cluster = await make_cluster(0, [decoder])
    assert (await cluster.chat("c", "short")).status == 200
    assert (await cluster.chat("c", "short", "a", "x" * 4000)).status == 200  # 1,000 tokens
    too_long = await cluster.chat("c", "short", "a", "x" * 4000, "b", "y" * 5000)
    assert (too_long.status, too_long.code) == (400, "context_length_exceeded")
    assert len(decoder.bodies("/v1/tokenize")) == 2
    cluster.settled()
