from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.engines.emulated import tokenizer as tk

# Whatever a client can send as JSON: no lone surrogates.
TEXT = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=200) | st.text(
    alphabet=st.sampled_from('ab Z09_{}\n\t\r"é你😀\x00\x7f'), max_size=200
)


@given(TEXT)
def test_text_survives(text: str) -> None:
    ids = tk.encode(text)
    assert tk.decode(ids) == text
    assert all(0 <= token < tk.VOCAB_SIZE for token in ids)


@given(TEXT, st.integers(0, 100))
def test_text_cut_after_any_token_encodes_to_the_same_ids(text: str, count: int) -> None:
    head = tk.encode(text)[:count]
    assert tk.encode(tk.decode(head)) == head


@given(TEXT, TEXT)
def test_text_appended_with_a_newline_leaves_earlier_ids_alone(text: str, more: str) -> None:
    ids = tk.encode(text)
    assert tk.encode(text + "\n" + more)[: len(ids)] == ids


@given(TEXT, TEXT)
def test_text_appended_in_any_way_changes_at_most_the_last_token(text: str, more: str) -> None:
    ids = tk.encode(text)
    kept = max(0, len(ids) - 1)
    assert tk.encode(text + more)[:kept] == ids[:kept]


@given(st.lists(st.integers(0, tk.VOCAB_SIZE - 1), max_size=50))
def test_any_id_below_the_vocabulary_size_detokenizes(ids: list[int]) -> None:
    text = tk.decode(ids)
    text.encode()  # no surrogate slips through
    assert tk.decode(tk.encode(text)) == text


@pytest.mark.parametrize("token", [-1, tk.VOCAB_SIZE])
def test_other_ids_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token} is out of range"):
        tk.decode([token])


def test_special_tokens_are_shown_only_on_demand_and_never_come_from_text() -> None:
    assert tk.decode([tk.IM_START, *tk.encode("hi"), tk.IM_END]) == "hi"
    assert tk.decode([tk.IM_START, tk.IM_END], skip_special_tokens=False) == (
        "<|im_start|><|im_end|>"
    )
    assert max(tk.encode("<|im_start|><tool_call>")) < tk.END_OF_TEXT


def test_about_four_bytes_a_token() -> None:
    prose = "The conversation is the scheduling unit, and its KV moves once. " * 40
    code = "def prefill(self, tokens: int) -> float:\n    return self._rate * tokens\n\n" * 40
    for text in (prose, code):
        assert 3.5 <= len(text) / len(tk.encode(text)) <= 4.0


def test_the_cache_of_segments_gives_the_same_ids_and_forgets_the_oldest() -> None:
    cache = tk.SegmentCache(max_tokens=100, min_chars=1)
    texts = ["".join(random.Random(seed).choices("abc ", k=160)) for seed in range(5)]
    for text in texts * 2:
        assert cache.encode(text) == tk.encode(text)
    assert cache.encode(texts[-1]) is cache.encode(texts[-1])
    assert cache.tokens <= 100
