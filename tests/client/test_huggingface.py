"""The local counter, with a small real tokenizer that is trained here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conserve_agents import Conversation, TokenCounter, TokenCountError, wire
from conserve_agents.huggingface import HuggingFaceTokenCounter

tokenizers = pytest.importorskip("tokenizers", reason="only in the development extra")

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text("utf-8")
ASK: list[Any] = [{"role": "user", "content": TEXT[:400]}]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look at a file."}}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def test_texts_and_schemas_are_counted_with_it(tokenizer: Any) -> None:
    counter = HuggingFaceTokenCounter(tokenizer, name="tiny")
    assert isinstance(counter, TokenCounter) and counter.name == "hf:tiny"
    length = len(tokenizer.encode(TEXT[:400]).ids)
    assert counter.count(TEXT[:400], None) == length
    assert counter.count(ASK, None) == length + 5
    assert counter.count([*ASK, *ASK], None) == 2 * (length + 5)
    assert counter.count(ASK, TOOLS) > length + 15
    picture = {"type": "image_url", "image_url": {"url": "data:…"}}
    assert counter.count([{"role": "user", "content": [picture]}], None) == 765 + 5


def test_it_says_so_in_the_header_and_is_asked_once(tokenizer: Any) -> None:
    talk = Conversation(counter=HuggingFaceTokenCounter(tokenizer, name="Qwen/Qwen3-0.6B"))
    tags = talk.headers_for(ASK)
    assert tags[wire.TOKEN_COUNTER] == "hf:Qwen/Qwen3-0.6B"
    later = talk.headers_for([*ASK, *ASK])
    assert later[wire.FIRST_TURN_TOKENS] == tags[wire.FIRST_TURN_TOKENS]
    odd = HuggingFaceTokenCounter(tokenizer, name="naïve" * 99).name
    assert wire.is_legal_id(odd) and odd.startswith("hf:")


def test_a_chat_template_is_exact() -> None:
    class Transformers:
        """What ``transformers`` has of a tokenizer."""

        def __init__(self) -> None:
            self.asked: list[tuple[Any, Any]] = []

        def apply_chat_template(self, messages: Any, *, tools: Any, **kwargs: Any) -> list[int]:
            assert kwargs == {"add_generation_prompt": True, "tokenize": True}
            self.asked.append((messages, tools))
            return [1] * 77

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [1] * len(text)

    whole = Transformers()
    counter = HuggingFaceTokenCounter(whole, name="t")
    flat = [{"type": "function", "name": "look", "description": "Look."}]
    items = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}]
    assert counter.count(items, flat) == 77
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    function = {"name": "look", "description": "Look."}
    assert whole.asked == [(messages, [{"type": "function", "function": function}])]
    assert counter.count("abc", None) == 3


def test_it_is_read_from_a_models_folder(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    counter = HuggingFaceTokenCounter.from_file(folder)
    assert counter.name == "hf:my-model"
    assert counter.count("policy", None) == len(tokenizer.encode("policy").ids)
    with pytest.raises(TokenCountError, match="not a tokenizer"):
        HuggingFaceTokenCounter.from_file(tmp_path)
