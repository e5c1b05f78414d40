"""Schemas as pydantic writes them; pydantic is also who judges the values."""

from __future__ import annotations

import enum
from datetime import date, datetime
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from conserve_serving.engines.emulated.lift import Lifter
from conserve_serving.engines.emulated.schema import fill


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Address(BaseModel):
    city: str
    zip_code: Annotated[str, Field(min_length=5, max_length=5)]


class Node(BaseModel):
    name: str
    children: list[Node] = []
    parent: Node | None = None


class Everything(BaseModel):
    text: str
    count: Annotated[int, Field(ge=3, le=9)]
    step: Annotated[int, Field(multiple_of=7, gt=0)]
    share: Annotated[float, Field(gt=0, lt=1)]
    low: Annotated[float, Field(le=-2.5)]
    flag: bool
    colour: Colour
    mode: Literal["a", "b"]
    fixed: Literal["only"]
    tags: Annotated[list[str], Field(min_length=2, max_length=3)]
    points: list[int]
    pair: tuple[int, str]
    address: Address
    addresses: Annotated[list[Address], Field(min_length=1)]
    either: int | str
    maybe: str | None
    optional: int = 4
    when: datetime
    day: date
    free: dict[str, Any]
    anything: Any
    tree: Node


@pytest.mark.parametrize(
    "words",
    [
        "",
        "Do it.",
        "Take 4 of the 'green' ones for mode b at Main Street 12345, flag it, tags: x, y and z.",
        'city is "Köln", count = 8, share: 0.25, low is -9, step is 21, points 1 2 3',
        "ünïcödé 你好 \"quoted 'twice'\" https://example.org/a?b=c and 1e9 -0.5 999999999999999999",
    ],
)
def test_values_fit_the_schema(words: str) -> None:
    value = fill(Everything.model_json_schema(), Lifter(words))
    Everything.model_validate(value, strict=False)


def test_explicit_values_are_taken_over() -> None:
    words = "count = 8, share: 0.25, mode b, colour green, flag is false, and step is 21"
    value = Everything.model_validate(fill(Everything.model_json_schema(), Lifter(words)))
    assert (value.count, value.share, value.mode, value.colour) == (8, 0.25, "b", Colour.GREEN)
    assert value.step == 21
    assert value.flag is False
    assert value.maybe is None
    assert value.optional == 4


class Listing(BaseModel):
    path: str = "."
    recursive: bool = False
    pattern: str | None = None


def test_optional_arguments_are_left_out_unless_the_words_give_them() -> None:
    schema = Listing.model_json_schema()
    assert fill(schema, Lifter("What is in this repository?")) == {}
    assert fill(schema, Lifter("List src/app recursive: true")) == {
        "path": "src/app",
        "recursive": True,
    }


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"type": "object"}, {}),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"const": 5}}}, 5),
        (
            {"allOf": [{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}]},
            {"a": 1},
        ),
        ({"type": ["null", "string"]}, None),
        ({"type": "array", "items": {"type": "integer"}, "maxItems": 0}, []),
        ({"enum": [None, 1]}, None),
    ],
)
def test_corners(schema: dict[str, Any] | None, expected: Any) -> None:
    assert fill(schema, Lifter("")) == expected


def test_an_endless_schema_ends() -> None:
    schema = {
        "$ref": "#/$defs/N",
        "$defs": {
            "N": {
                "type": "object",
                "properties": {"next": {"$ref": "#/$defs/N"}},
                "required": ["next"],
            }
        },
    }
    assert isinstance(fill(schema, Lifter("")), dict)


def test_a_pattern_is_met_where_a_word_meets_it() -> None:
    schema = {
        "type": "object",
        "properties": {"code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$"}},
        "required": ["code"],
    }
    assert fill(schema, Lifter("Please look at ticket AB42 for me")) == {"code": "AB42"}
