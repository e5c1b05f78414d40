"""The test bed itself: that what it says of an answer can be believed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from conserve_serving.engines.pages import page_keys


def generate(engine: Any, ids: list[int], tokens: int = 24) -> list[int]:
    """Greedy token ids of one engine."""
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    reply = engine.post("/generate", {"input_ids": ids, "sampling_params": sampling})
    answer: list[int] = reply["output_ids"]
    return answer


@pytest.mark.sglang
def test_text_depends_on_pages_far_back(bed: Any, random_ids: Any) -> None:
    ids = random_ids(600)
    asked = generate(bed.decoders[0], ids)
    assert asked == generate(bed.decoders[1], ids)
    for at in (16, 160, 320, 480):
        other = [*ids[:at], *random_ids(16), *ids[at + 16 :]]
        assert generate(bed.decoders[0], other) != asked, at


@pytest.mark.sglang
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


@pytest.mark.sglang
def test_a_killed_engine_comes_back(bed: Any, random_ids: Any) -> None:
    ids = random_ids(100)
    before = generate(bed.decoders[1], ids)
    bed.decoders[1].kill()
    bed.revive()
    assert generate(bed.decoders[1], ids) == before


def test_page_hashes_without_a_compiler_are_the_same() -> None:
    path = Path(__file__).with_name("stand_ins") / "cpu_hicache.py"
    spec = importlib.util.spec_from_file_location("cpu_hicache", path)
    assert spec is not None and spec.loader is not None
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    ids = list(range(64))
    keys = [key.hex() for key in page_keys(ids, 16)]
    assert stand_in.page_hashes(ids, None, 16) == keys
    assert stand_in.page_hashes(ids[32:], bytes.fromhex(keys[1]), 16) == keys[2:]
    assert stand_in.page_hashes(ids[:16], None, None) == keys[0]
