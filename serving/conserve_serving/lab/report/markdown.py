"""A report as Markdown: everything but the pictures, whose figures stand in tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from conserve_serving.lab.report.document import Figure, Note, Section, Table, Tile

#: Longer tables are cut: the page has all rows.
MAX_ROWS: Final = 40


def to_markdown(
    *,
    title: str,
    subtitle: str,
    summary: Sequence[str],
    tiles: Sequence[Tile],
    sections: Sequence[Section],
    footer: str,
) -> str:
    """The text; for the arguments see :func:`conserve_serving.lab.report.html.to_html`."""
    lines = [f"# {title}", ""]
    for text in (subtitle, *summary):
        lines += [_escaped(text), ""] if text else []
    lines += [f"- **{_escaped(t.name)}**: {_escaped(t.big)} ({_escaped(t.small)})" for t in tiles]
    for section in sections:
        lines += ["", f"## {_escaped(section.title)}", ""]
        lines += [_escaped(section.help), ""] if section.help else []
        for block in section.blocks:
            lines += _block(block)
    lines += ["", _escaped(footer)]
    return "\n".join(lines).rstrip() + "\n"


def _block(block: Note | Table | Figure) -> Iterator[str]:
    if isinstance(block, Note):
        yield f"> {_escaped(block.text)}" if block.missing else _escaped(block.text)
        yield ""
    elif isinstance(block, Table):
        yield from _table(block)
    else:
        yield f"### {_escaped(block.title)}"
        yield ""
        if block.help:
            yield _escaped(block.help)
            yield ""
        if block.data is not None:
            yield from _table(block.data)


def _table(table: Table) -> Iterator[str]:
    if table.caption:
        yield f"**{_escaped(table.caption)}**"
        yield ""
    yield _line(table.columns)
    yield (
        "|"
        + "|".join(
            "---" if number == 0 or column in table.texts else "--:"
            for number, column in enumerate(table.columns)
        )
        + "|"
    )
    for row in table.rows[:MAX_ROWS]:
        yield _line([f"{c.text} ({c.detail})" if c.detail else c.text for c in row])
    yield ""
    if len(table.rows) > MAX_ROWS:
        yield f"… and {len(table.rows) - MAX_ROWS} more rows on the page."
        yield ""


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    """Text that Markdown leaves as it is, on one line."""
    for mark in "\\`*_<>|[]":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())
