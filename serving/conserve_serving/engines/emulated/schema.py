"""Values that fit a JSON schema, lifted from the user's words where they offer any.

Covers what tools and response formats use: types and lists of types, required and optional
properties, nested objects, arrays, enums, constants, defaults, ``$ref``, ``anyOf``/``oneOf``/
``allOf``, bounds, lengths and the common string formats. A regular-expression ``pattern`` is met
only where a candidate happens to match it.
"""

from __future__ import annotations

import re
from typing import Any, Final

from conserve_serving.engines.emulated.lift import Lifter, words_of

Schema = dict[str, Any]

_MAX_DEPTH: Final = 16
#: Numbers beyond this are not exact as floats, and seldom meant as arguments.
_EXACT: Final = 2**53
_FORMATS: Final = {
    "date-time": "2026-01-01T00:00:00Z",
    "date": "2026-01-01",
    "time": "00:00:00Z",
    "email": "someone@example.com",
    "uri": "https://example.com/",
    "url": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "ipv4": "192.0.2.1",
    "hostname": "example.com",
    "duration": "PT1S",
}


def fill(schema: Schema | None, lifter: Lifter) -> Any:
    """A value that fits ``schema``; ``{}`` where it says nothing.

    Args:
        schema: a JSON schema; ``$ref`` may point into it.
        lifter: the user's words; what is used is marked as given away.
    """
    root = schema or {}
    return _Filler(root, lifter).value(root, "", 0)


class _Filler:
    def __init__(self, root: Schema, lifter: Lifter) -> None:
        self._root = root
        self._lift = lifter

    def value(self, schema: Schema, name: str, depth: int) -> Any:
        schema = self._resolve(schema)
        if "const" in schema:
            return schema["const"]
        if enum := schema.get("enum"):
            return self._choose(enum, name, schema)
        if variants := schema.get("anyOf") or schema.get("oneOf"):
            return self._variant(schema, variants, name, depth)
        kind = schema.get("type")
        if isinstance(kind, list):
            variants = [{**schema, "type": one} for one in kind]
            return self._variant(schema, variants, name, depth)
        if kind is None:
            kind = "array" if "items" in schema else "object" if not name else "string"
            if "properties" in schema:
                kind = "object"
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, name, depth)
        if kind in ("integer", "number"):
            return self._number(schema, name, whole=kind == "integer")
        if kind == "boolean":
            return self._boolean(schema, name)
        if kind == "null":
            return None
        return self._string(schema, name)

    def _resolve(self, schema: Schema) -> Schema:
        for _ in range(_MAX_DEPTH):
            reference = schema.get("$ref")
            if not isinstance(reference, str) or not reference.startswith("#"):
                break
            target: Any = self._root
            for name in reference.lstrip("#/").split("/") if reference != "#" else ():
                key = name.replace("~1", "/").replace("~0", "~")
                target = target.get(key, {}) if isinstance(target, dict) else {}
            beside = {key: value for key, value in schema.items() if key != "$ref"}
            schema = {**target, **beside} if isinstance(target, dict) else beside
        if parts := schema.get("allOf"):
            merged = {key: value for key, value in schema.items() if key != "allOf"}
            for part in map(self._resolve, parts):
                properties = {**merged.get("properties", {}), **part.get("properties", {})}
                required = [*merged.get("required", []), *part.get("required", [])]
                merged = {**part, **merged}
                if properties:
                    merged["properties"] = properties
                    merged["required"] = list(dict.fromkeys(required))
            return merged
        return schema

    def _variant(self, schema: Schema, variants: list[Schema], name: str, depth: int) -> Any:
        resolved = [self._resolve(variant) for variant in variants]
        real = [variant for variant in resolved if variant.get("type") != "null"]
        if len(real) < len(resolved):
            # May be null: only a value that was clearly meant for it beats null or the default.
            wanted = bool(real) and depth < _MAX_DEPTH and self._meant(real[0], name)
            if not wanted:
                return schema.get("default")
        beside: Schema = {k: schema[k] for k in ("description", "default") if k in schema}
        for variant in real:
            if self._meant(variant, name):
                return self.value({**beside, **variant}, name, depth + 1)
        return self.value({**beside, **real[0]}, name, depth + 1) if real else None

    def _meant(self, schema: Schema, name: str) -> bool:
        """Whether the user's words clearly hold a value for an optional argument."""
        lift = Lifter(self._lift.text)  # a look that gives nothing away
        if options := schema.get("enum"):
            return any(_mentioned(option, lift.text) for option in options)
        if lift.said(name) is not None:
            return True
        kind = schema.get("type")
        if kind == "string":
            return lift.specific(name, schema.get("description", "")) is not None
        named = set(words_of(name)) & set(words_of(lift.text))
        if kind in ("integer", "number"):
            return bool(named) and bool(lift.numbers(lambda _: True))
        return bool(named)

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        required = schema.get("required", [])
        value: dict[str, Any] = {}
        for name, part in schema.get("properties", {}).items():
            if not isinstance(part, dict):
                continue
            optional = name not in required
            if optional and (depth >= _MAX_DEPTH or not self._meant(self._resolve(part), name)):
                continue
            value[name] = self.value(part, name, depth + 1) if depth < _MAX_DEPTH else None
        return value

    def _array(self, schema: Schema, name: str, depth: int) -> list[Any]:
        if depth >= _MAX_DEPTH:
            return []
        fixed = [self.value(item, name, depth + 1) for item in schema.get("prefixItems", [])]
        items = schema.get("items")
        least = max(0, int(schema.get("minItems", 0)) - len(fixed))
        most = int(schema.get("maxItems", 8)) - len(fixed)
        if not isinstance(items, dict):
            items = {"type": "string"}
            if fixed:
                return fixed
        items = self._resolve(items)
        kind = items.get("type")
        rest: list[Any] = []
        if options := items.get("enum"):
            rest = [option for option in options if _mentioned(option, self._lift.text)]
        elif kind == "string":
            rest = list(self._lift.strings())
        elif kind in ("integer", "number"):
            whole = kind == "integer"
            numbers = self._lift.numbers(lambda number: _fits(items, number, whole=whole))
            rest = [int(number) if whole else _plain(number) for number in numbers]
        if schema.get("uniqueItems"):
            rest = list(dict.fromkeys(rest))
        while len(rest) < max(least, 1 if not fixed and most > 0 else 0):
            rest.append(self.value(items, name, depth + 1))
        return [*fixed, *rest[: max(most, least)]]

    def _choose(self, options: list[Any], name: str, schema: Schema) -> Any:
        said = self._lift.said(name)
        for text in (said, self._lift.text):
            for option in options:
                if text and _mentioned(option, text):
                    return option
        return schema.get("default", options[0])

    def _number(self, schema: Schema, name: str, *, whole: bool) -> int | float:
        number = self._lift.number(name, lambda value: _fits(schema, value, whole=whole))
        if number is None:
            if isinstance(schema.get("default"), int | float):
                default: int | float = schema["default"]
                return default
            number = _within(schema, whole=whole)
        return int(number) if whole else _plain(number)

    def _boolean(self, schema: Schema, name: str) -> bool:
        said = (self._lift.said(name) or "").lower()
        if said:
            return said not in ("false", "no", "off", "0")
        spelled = " ".join(words_of(name))
        text = " ".join(words_of(self._lift.text))
        if spelled and re.search(rf"\b(?:not|no|without|don t)\s+(?:\w+\s)?{spelled}\b", text):
            return False
        if "default" in schema:
            return bool(schema["default"])
        return bool(spelled) and re.search(rf"\b{spelled}\b", text) is not None

    def _string(self, schema: Schema, name: str) -> str:
        description = str(schema.get("description", ""))
        found = self._lift.specific(name, description)
        if found is None and isinstance(schema.get("default"), str):
            return str(schema["default"])
        form = schema.get("format")
        if isinstance(form, str) and form in _FORMATS:
            kind = {"date-time": "date", "uri": "url"}.get(form, form)
            text = found or self._lift.specific(kind) or _FORMATS[form]
            return f"{text}T00:00:00Z" if form == "date-time" and "T" not in text else text
        text = found if found is not None else self._lift.string(name, description)
        if (pattern := schema.get("pattern")) and not _matches(pattern, text):
            candidates = [*self._lift.quoted(), *re.findall(r"\S+", self._lift.text)]
            text = next((word for word in candidates if _matches(pattern, word)), text)
        most = schema.get("maxLength")
        text = text[:most] if isinstance(most, int) else text
        return text.ljust(int(schema.get("minLength", 0)), ".")


def _matches(pattern: str, text: str) -> bool:
    try:
        return re.search(pattern, text) is not None
    except re.error:
        return True  # an ECMA pattern Python cannot read constrains nothing here


def _mentioned(option: Any, text: str) -> bool:
    spelled = re.escape(str(option)).replace("_", "[ _-]").replace(r"\-", "[ _-]")
    return re.search(rf"(?<!\w){spelled}(?!\w)", text, re.IGNORECASE) is not None


def _fits(schema: Schema, value: float, *, whole: bool) -> bool:
    step = schema.get("multipleOf")
    return (
        abs(value) <= _EXACT
        and (not whole or value == int(value))
        and value >= schema.get("minimum", value)
        and value <= schema.get("maximum", value)
        and not value <= schema.get("exclusiveMinimum", float("-inf"))
        and not value >= schema.get("exclusiveMaximum", float("inf"))
        and (not step or abs(value / step - round(value / step)) < 1e-9)
    )


def _within(schema: Schema, *, whole: bool) -> float:
    """A number within the bounds: 1 where it fits, else the nearest that does."""
    step = schema.get("multipleOf")
    unit = step or 1
    candidates: list[float] = [1, 0, unit]
    for key, sign in (("minimum", 1), ("exclusiveMinimum", 1), ("maximum", -1)):
        if key in schema:
            edge = schema[key]
            base = (edge // unit) * unit
            candidates += [edge, base, base + sign * unit, edge + sign * (unit if whole else 1e-3)]
    if "exclusiveMaximum" in schema:
        edge = schema["exclusiveMaximum"]
        candidates += [edge - unit, ((edge - 1e-9) // unit) * unit, edge - 1e-3]
        if "minimum" in schema or "exclusiveMinimum" in schema:
            candidates.append((edge + schema.get("minimum", schema.get("exclusiveMinimum"))) / 2)
    return next((value for value in candidates if _fits(schema, value, whole=whole)), 1)


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number
