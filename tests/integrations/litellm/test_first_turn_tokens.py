"""bytes / 4 against real vocabularies: LiteLLM ships two, so that no download is needed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from conserve_agents import BytesTokenCounter
from conserve_agents.huggingface import HuggingFaceTokenCounter

SPEC = importlib.util.find_spec("litellm")
if SPEC is None or SPEC.origin is None:
    pytest.skip("only where litellm is installed", allow_module_level=True)
SHIPPED = Path(SPEC.origin).parent / "litellm_core_utils" / "tokenizers"


def anthropic(text: str) -> int:
    counter = HuggingFaceTokenCounter.from_file(SHIPPED / "anthropic_tokenizer.json", name="a")
    return counter.count(text, None)


def cl100k(text: str) -> int:
    import tiktoken  # noqa: PLC0415 - comes with litellm

    return len(tiktoken.get_encoding("cl100k_base").encode(text))


@pytest.mark.parametrize("count", [anthropic, cl100k])
@pytest.mark.parametrize("kind", ["english", "code"])
def test_prose_and_code_are_counted_within_fifteen_percent(
    kind: str, count: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHIPPED))
    text = request.getfixturevalue(kind)
    counted = count(text)
    assert abs(BytesTokenCounter().count(text, None) - counted) <= 0.15 * counted
