"""Tools that look at one folder of Markdown notes and nothing outside it; answers are bounded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from langchain_core.tools import BaseTool, tool

MAX_FOUND: Final = 8
MAX_PARAGRAPH_CHARS: Final = 400
MAX_NOTE_CHARS: Final = 12_000
MAX_OUTLINE_CHARS: Final = 12_000


def read_notes(folder: Path) -> dict[str, str]:
    """The texts of the ``.md`` files under ``folder``, by their paths in it."""
    root = folder.resolve(strict=True)
    return {
        path.relative_to(root).as_posix(): path.read_text("utf-8", "replace")
        for path in sorted(root.rglob("*.md"))
        if path.resolve().is_relative_to(root)
    }


def outline(notes: dict[str, str]) -> str:
    """The notes' paths with their headings."""
    lines = [
        line
        for name, text in notes.items()
        for line in (name, *(f"  {h}" for h in re.findall(r"^#+ .*", text, re.MULTILINE)))
    ]
    return "\n".join(lines)[:MAX_OUTLINE_CHARS]


def note_tools(notes: dict[str, str]) -> list[BaseTool]:
    """The tools ``search_notes`` and ``read_note`` for these notes."""

    @tool
    def search_notes(query: str) -> str:
        """Find the paragraphs of the notes that have most words of a query in them."""
        words = set(_words(query))
        if not words:
            return "error: query is empty; say what to look for"
        found = []
        for name, text in notes.items():
            for number, paragraph in enumerate(re.split(r"\n\s*\n", text)):
                said = _words(paragraph)
                hits = sum(word in words for word in said)
                if hits:
                    rank = (-len(words.intersection(said)), -hits / len(said), name, number)
                    found.append((rank, f"{name}: {paragraph.strip()[:MAX_PARAGRAPH_CHARS]}"))
        best = [text for _, text in sorted(found)[:MAX_FOUND]]
        return "\n\n".join(best) or f"no note mentions {query!r}"

    @tool
    def read_note(path: str) -> str:
        """Read a note, by the path that a search has given."""
        text = notes.get(path)
        if text is None:
            return f"error: there is no note {path!r}; the notes are: {', '.join(notes) or 'none'}"
        return text if len(text) <= MAX_NOTE_CHARS else f"{text[:MAX_NOTE_CHARS]}\n… (cut)"

    return [search_notes, read_note]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
