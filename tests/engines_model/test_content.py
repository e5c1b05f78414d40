"""Prompts as real tokens and as runs of streams answer the tree's questions alike."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.engines.content import Prompt, Run, StreamPrompt, TokenPrompt

PAGE = 4
runs = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(0, 11)), min_size=1, max_size=6
)


def spelled_out(pieces: list[Run]) -> list[int]:
    """The tokens the runs stand for: token o of stream s is 1000 s + o."""
    return [
        1000 * int(str(stream)) + offset + i
        for stream, offset, length in pieces
        for i in range(length)
    ]


def common(tokens: list[int], start: int, other: list[int]) -> int:
    """What ``common_tokens`` must say, from its definition."""
    count = 0
    for mine, theirs in zip(tokens[start:], other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count - count % PAGE


@given(runs, runs, st.integers(0, 3))
def test_common_tokens_of_streams_match_the_definition(
    first: list[Run], second: list[Run], pages: int
) -> None:
    mine, theirs = StreamPrompt(first, PAGE), StreamPrompt(second, PAGE)
    start = min(pages * PAGE, mine.tokens - mine.tokens % PAGE)
    expected = common(spelled_out(first), start, spelled_out(second))
    assert mine.common_tokens(start, theirs) == expected


@given(runs, runs)
def test_common_tokens_of_tokens_match_the_definition(first: list[Run], second: list[Run]) -> None:
    mine, theirs = spelled_out(first), spelled_out(second)
    one, two = TokenPrompt.of(mine, PAGE), TokenPrompt.of(theirs, PAGE)
    assert one.common_tokens(0, two) == common(mine, 0, theirs)


@given(runs, runs)
def test_page_keys_are_equal_exactly_when_pages_are(first: list[Run], second: list[Run]) -> None:
    mine, theirs = StreamPrompt(first, PAGE), StreamPrompt(second, PAGE)
    one, two = spelled_out(first), spelled_out(second)
    for i in range(0, len(one) - PAGE + 1, PAGE):
        for j in range(0, len(two) - PAGE + 1, PAGE):
            same = one[i : i + PAGE] == two[j : j + PAGE]
            assert (mine.key_at(i) == theirs.key_at(j)) is same


@given(runs, st.integers(0, 5), st.integers(0, 5))
def test_cut_is_the_content_between(pieces: list[Run], first: int, count: int) -> None:
    tokens = spelled_out(pieces)
    whole = len(tokens) // PAGE * PAGE
    start = min(first * PAGE, whole)
    end = min(start + count * PAGE, whole)
    contents: list[tuple[Prompt, Prompt]] = [
        (StreamPrompt(pieces, PAGE), StreamPrompt(pieces, PAGE).cut(start, end)),
        (TokenPrompt.of(tokens, PAGE), TokenPrompt.of(tokens, PAGE).cut(start, end)),
    ]
    for content, part in contents:
        assert part.tokens == end - start
        assert content.common_tokens(start, part) == end - start


@given(runs, runs)
def test_extending_tokens_equals_starting_whole(first: list[Run], second: list[Run]) -> None:
    one, two = spelled_out(first), spelled_out(second)
    whole = TokenPrompt.of(one + two, PAGE, extra_key="t")
    extended = TokenPrompt.of(one, PAGE, extra_key="t").extended(two)
    assert extended.tokens == whole.tokens
    assert extended.last_key == whole.last_key


def test_adjacent_runs_merge_and_kinds_do_not_mix() -> None:
    merged = StreamPrompt([("a", 0, 3), ("a", 3, 5), ("b", 0, 0)], PAGE)
    assert merged.runs == (("a", 0, 8),)
    assert merged.common_tokens(0, TokenPrompt.of([1] * 8, PAGE)) == 0
    assert TokenPrompt.of([1] * 8, PAGE).common_tokens(0, merged) == 0


def test_namespaces_share_nothing() -> None:
    one = TokenPrompt.of(range(8), PAGE, extra_key="a")
    two = TokenPrompt.of(range(8), PAGE, extra_key="b")
    assert one.common_tokens(0, two) == 0
