"""The test bed itself: that what it says of an answer can be believed."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.sglang


def generate(engine: Any, ids: list[int], tokens: int = 24) -> list[int]:
    """Greedy token ids of one engine."""
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    reply = engine.post("/generate", {"input_ids": ids, "sampling_params": sampling})
    answer: list[int] = reply["output_ids"]
    return answer


def test_text_depends_on_pages_far_back(bed: Any, random_ids: Any) -> None:
    ids = random_ids(600)
    asked = generate(bed.decoders[0], ids)
    assert asked == generate(bed.decoders[1], ids)
    for at in (16, 160, 320, 480):
        other = [*ids[:at], *random_ids(16), *ids[at + 16 :]]
        assert generate(bed.decoders[0], other) != asked, at


def test_an_answer_is_found_in_the_cache_when_it_comes_back(bed: Any) -> None:
    engine = bed.decoders[0]
    messages = [{"role": "user", "content": "What is a hand-off?"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 64, "ignore_eos": True}
    first = engine.post("/v1/chat/completions", body)
    messages += [first["choices"][0]["message"], {"role": "user", "content": "And a turn?"}]
    second = engine.post("/v1/chat/completions", body)
    known = first["usage"]["total_tokens"]
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert known - bed.page_tokens - 1 <= cached <= known


def test_a_killed_engine_comes_back(bed: Any, random_ids: Any) -> None:
    ids = random_ids(100)
    before = generate(bed.decoders[1], ids)
    bed.decoders[1].kill()
    bed.revive()
    assert generate(bed.decoders[1], ids) == before
