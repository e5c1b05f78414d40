"""Fields are appended to a JSON object without parsing it, and come out last."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.engines.splice import splice

SPACE = st.text(alphabet=" \t\r\n", max_size=4).map(str.encode)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)


@given(OBJECTS, st.dictionaries(st.text(), VALUES, max_size=3), SPACE, SPACE, SPACE)
def test_result_is_the_object_with_the_fields_set(
    body: dict, fields: dict, lead: bytes, inner: bytes, trail: bytes
) -> None:
    text = json.dumps(body).encode()
    text = lead + text[:-1] + inner + b"}" + trail
    assert json.loads(b"".join(splice(text, fields))) == {**body, **fields}


@given(OBJECTS.filter(bool), st.data())
def test_spliced_fields_come_last_and_win(body: dict, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(body)))
    pairs = json.loads(
        b"".join(splice(json.dumps(body).encode(), {name: "ours"})), object_pairs_hook=list
    )
    assert pairs[-1] == (name, "ours")
    assert [key for key, _ in pairs].count(name) == 2


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{}", b'{"rid":"a"}'),
        (b" { \n } \n", b' { \n "rid":"a"}'),
        (b'{"x":{}}', b'{"x":{},"rid":"a"}'),
        (b'{"x":"{"}\n', b'{"x":"{","rid":"a"}'),
    ],
)
def test_exact_bytes(body: bytes, expected: bytes) -> None:
    assert b"".join(splice(body, {"rid": "a"})) == expected


def test_large_body_is_not_copied() -> None:
    body = b'{"messages":["' + b"x" * 2_000_000 + b'"]}'
    first, second = splice(body, {"rid": "a", "tools": msgspec.Raw(b"[1]")})
    assert isinstance(first, memoryview)
    assert first.obj is body
    assert bytes(second) == b',"rid":"a","tools":[1]}'


@pytest.mark.parametrize("body", [b"", b"  ", b"[]", b"[{}", b'"}', b'{"a":1', b"null", b"x{}"])
def test_anything_else_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a JSON object"):
        splice(body, {"rid": "a"})
