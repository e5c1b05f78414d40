"""Tools that look at one folder and nothing outside it; every answer is bounded in size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from langchain_core.tools import BaseTool, tool

MAX_ENTRIES: Final = 200
MAX_LISTED: Final = 500
MAX_READ_BYTES: Final = 16_000
MAX_MATCHES: Final = 40
MAX_LINE_CHARS: Final = 200
#: Larger files are data, not something to read or search.
MAX_FILE_BYTES: Final = 1_000_000
SKIPPED_FOLDERS: Final = frozenset({"node_modules", "__pycache__", "build", "dist"})


class OutsideError(ValueError):
    """The path leads out of the folder."""


def listing(folder: Path) -> str:
    """The paths of the folder's files, one a line, as far as there is room."""
    root = folder.resolve(strict=True)
    lines: list[str] = []
    for file in _files(root):
        lines.append(file.relative_to(root).as_posix())
        if len(lines) == MAX_LISTED:
            return "\n".join([*lines, "… and more"])
    return "\n".join(lines)


def folder_tools(folder: Path) -> list[BaseTool]:
    """The tools ``search_files``, ``read_file`` and ``list_files`` for ``folder``."""
    root = folder.resolve(strict=True)

    def inside(path: str) -> Path:
        """The path, with links followed. Raises OutsideError."""
        found = (root / path).resolve()
        if not found.is_relative_to(root):
            raise OutsideError("outside of the folder")
        return found

    @tool
    def list_files(path: str = ".") -> str:
        """List the files and folders in a folder; the names of folders end in /."""
        try:
            entries = sorted(inside(path).iterdir())
        except (OSError, OutsideError) as error:
            return _error(path, error)
        names = [e.name + "/" * e.is_dir() for e in entries if not _skipped(e.name)]
        more = len(names) - MAX_ENTRIES
        return "\n".join(names[:MAX_ENTRIES] + [f"… and {more} more"] * (more > 0)) or "(empty)"

    @tool
    def read_file(path: str, first_line: int = 1) -> str:
        """Read a text file, from a line on; long files come in parts."""
        try:
            file = inside(path)
            if file.stat().st_size > MAX_FILE_BYTES:
                return f"error: {path} has more than {MAX_FILE_BYTES} bytes"
            lines = file.read_text("utf-8").splitlines(keepends=True)
        except (OSError, OutsideError, UnicodeDecodeError) as error:
            return _error(path, error)
        start = max(0, first_line - 1)
        text: list[str] = []
        size = 0
        for number, line in enumerate(lines[start:], start + 1):
            size += len(line.encode())
            if size > MAX_READ_BYTES and text:
                return "".join(text) + f"… goes on at line {number} of {len(lines)}"
            text.append(line[:MAX_READ_BYTES])
        return "".join(text) or "(nothing there)"

    @tool
    def search_files(query: str, path: str = ".") -> str:
        """Find the lines that contain all words of a query, in any case, under a folder."""
        words = query.lower().split()
        if not words:
            return "error: query is empty; say what to look for"
        try:
            files = list(_files(inside(path)))
        except (OSError, OutsideError) as error:
            return _error(path, error)
        matches: list[str] = []
        for file in files:
            if not file.resolve().is_relative_to(root):
                continue
            for number, line in _lines(file):
                if all(word in line.lower() for word in words):
                    where = file.relative_to(root).as_posix()
                    matches.append(f"{where}:{number}: {line.strip()[:MAX_LINE_CHARS]}")
                    if len(matches) == MAX_MATCHES:
                        return "\n".join([*matches, "… there may be more"])
        return "\n".join(matches) or f"no line contains {query!r}"

    return [search_files, read_file, list_files]


def _error(path: str, error: OSError | ValueError) -> str:
    """What went wrong, for the model: without the folder's own place on the machine."""
    if isinstance(error, UnicodeDecodeError):
        return f"error: {path}: not a text file"
    return f"error: {path}: {getattr(error, 'strerror', None) or error}"


def _skipped(name: str) -> bool:
    return name.startswith(".") or name in SKIPPED_FOLDERS


def _files(start: Path) -> Iterator[Path]:
    if start.is_file():
        yield start
    for folder, folders, names in os.walk(start):
        folders[:] = sorted(name for name in folders if not _skipped(name))
        yield from (Path(folder, name) for name in sorted(names) if not _skipped(name))


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file; nothing of one that is large, binary or unreadable."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            return
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return
    yield from enumerate(text.splitlines(), 1)
