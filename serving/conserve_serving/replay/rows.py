"""The common trace rows: one turn a row, as JSON lines or CSV.

Fields: ``conversation_id``, ``turn`` (0, 1, 2 … within a conversation), ``input_tokens``,
``output_tokens``, and where known ``new_input_tokens``, ``gap_s``, and on first turns
``arrival_s``, ``shared_prefix_tokens`` (leading tokens that other conversations begin with, too)
with ``kind`` and ``model``. Other fields are ignored. Without ``new_input_tokens`` a turn extends
the whole previous context.

Conversations of one kind and model whose shared prefixes are equally long are taken to share one:
a trace of counts does not show the text. That is an upper bound of what they share.

A conversation ``a/b`` in a trace that has ``a`` is a sub-agent of ``a``. Where both have ``t_s``
(seconds since the session began), it says when the sub-agent was called.
"""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.replay.errors import TraceError

Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0)]
_T = TypeVar("_T")


class Row(msgspec.Struct):
    """One turn as it stands in the file."""

    conversation_id: Annotated[str, msgspec.Meta(min_length=1)]
    turn: Annotated[int, msgspec.Meta(ge=0)]
    input_tokens: Count
    output_tokens: Count
    new_input_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    gap_s: Seconds | None = None
    arrival_s: Seconds | None = None
    shared_prefix_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    kind: Any = None
    model: Any = None
    t_s: Seconds | None = None


def json_object(line: str, *, path: Path, number: int) -> dict[str, Any]:
    """The JSON object on one line of a file.

    Raises:
        TraceError: the line is not JSON, or not an object.
    """
    try:
        value = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise TraceError(
            f"not JSON ({error}). Write one JSON object per line.", path=path, line=number
        ) from error
    if not isinstance(value, dict):
        raise TraceError(
            f"a {type(value).__name__} where an object belongs. Write one JSON object per line.",
            path=path,
            line=number,
        )
    return value


def json_rows(lines: Iterable[tuple[int, str]], path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a JSON-lines trace, numbered as the lines are."""
    for number, line in lines:
        fields = json_object(line, path=path, number=number)
        yield number, convert(fields, Row, path=path, number=number)


def csv_rows(lines: Iterable[str], path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a CSV trace with a header line; empty cells are unknown."""
    reader = csv.DictReader(lines)
    if reader.fieldnames is None:
        raise TraceError("the file is empty. Give a header line and one turn per row.", path=path)
    known = set(Row.__struct_fields__)
    required = ("conversation_id", "turn", "input_tokens", "output_tokens")
    missing = [name for name in required if name not in reader.fieldnames]
    if missing:
        raise TraceError(
            f"no column {', '.join(missing)}. The header needs {', '.join(required)}; "
            "new_input_tokens, gap_s, arrival_s and shared_prefix_tokens may follow.",
            path=path,
            line=1,
        )
    for cells in reader:
        number = reader.line_num
        if None in cells:
            raise TraceError(
                "more cells than the header has columns. Quote cells that hold a comma.",
                path=path,
                line=number,
            )
        fields = {k: v.strip() for k, v in cells.items() if k in known and v and v.strip()}
        yield number, convert(fields, Row, path=path, number=number, strict=False)


def convert(
    fields: dict[str, Any], into: type[_T], *, path: Path, number: int, strict: bool = True
) -> _T:
    """``fields`` as the struct ``into``; ``strict=False`` reads numbers from text.

    Raises:
        TraceError: a field is missing, of the wrong type, or out of range; named in the text.
    """
    try:
        return msgspec.convert(fields, into, strict=strict)
    except msgspec.ValidationError as error:
        reason = str(error).replace("`$.", "`").replace("$.", "")
        raise TraceError(
            f"{reason}. Correct the field, or drop the row's whole conversation.",
            path=path,
            line=number,
        ) from error


@dataclass(slots=True)
class _Joining:
    first: Row
    turns: list[Turn] = field(default_factory=list)
    begun_s: list[float | None] = field(default_factory=list)


def join_rows(rows: Iterable[tuple[int, Row]], path: Path) -> Iterator[Conversation]:
    """Conversations from rows, in the order of their first rows.

    Conversations may interleave (a sub-agent's rows stand among its parent's), so the rows are
    read to their end, and thereby all checked, before the first conversation comes.

    Raises:
        TraceError: a conversation's turns are out of order, or contradict each other.
    """
    joined: dict[str, _Joining] = {}
    for number, row in rows:
        entry = joined.setdefault(row.conversation_id, _Joining(first=row))
        if row.turn != len(entry.turns):
            raise TraceError(
                f"turn is {row.turn} where {len(entry.turns)} is due in conversation "
                f"{row.conversation_id!r}. Number each conversation's turns 0, 1, 2 … in order.",
                path=path,
                line=number,
            )
        entry.turns.append(_turn(row, entry.turns, path=path, number=number))
        entry.begun_s.append(row.t_s)
    for name, entry in joined.items():
        yield _called(_conversation(name, entry), entry, joined)


def _conversation(name: str, entry: _Joining) -> Conversation:
    first = entry.first
    shared = min(first.shared_prefix_tokens or 0, first.input_tokens)
    labels = (first.kind, first.model, f"{shared} tokens")
    return Conversation(
        id=name,
        turns=tuple(entry.turns),
        arrival_s=first.arrival_s,
        shared_prefix_tokens=shared,
        shared_prefix_name="/".join(str(label) for label in labels if label) if shared else "",
    )


def _called(
    conversation: Conversation, entry: _Joining, joined: dict[str, _Joining]
) -> Conversation:
    """The conversation with its parent, if the trace has it."""
    above, _, _ = conversation.id.rpartition("/")
    parent = joined.get(above)
    if parent is None:
        return conversation
    called_s = entry.begun_s[0]
    begun_s = [at for at in parent.begun_s if at is not None]
    if called_s is None or len(begun_s) < len(parent.begun_s):
        return replace(conversation, parent=above)
    return replace(
        conversation,
        parent=above,
        parent_turns=bisect_right(begun_s, called_s),
        offset_s=max(0.0, called_s - begun_s[0]),
    )


def _turn(row: Row, before: list[Turn], *, path: Path, number: int) -> Turn:
    previous = before[-1].context_tokens if before else 0
    new = row.new_input_tokens
    if new is None:
        new = row.input_tokens - previous
        if new < 0:
            raise TraceError(
                f"input_tokens is {row.input_tokens}, less than the previous context of "
                f"{previous}. Give new_input_tokens: how many of them are new.",
                path=path,
                line=number,
            )
    if new > row.input_tokens:
        raise TraceError(
            f"new_input_tokens is {new}, more than input_tokens {row.input_tokens}. "
            "new_input_tokens counts the part of the prompt that is new.",
            path=path,
            line=number,
        )
    return Turn(
        input_tokens=row.input_tokens,
        # What cannot come from the previous context is new, whatever the row says.
        new_input_tokens=max(new, row.input_tokens - previous),
        output_tokens=row.output_tokens,
        gap_s=(row.gap_s or 0.0) if before else 0.0,
    )
