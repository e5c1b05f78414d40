"""Tools that read one log file; every answer is bounded in size."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Final

MAX_MATCHES: Final = 30
MAX_AROUND: Final = 20
MAX_LINE_CHARS: Final = 300
LEVELS: Final = ("DEBUG", "INFO", "WARN", "ERROR", "FATAL")

_TEXT: Final = {"type": "string"}
_PARAMETERS: Final[dict[str, dict[str, Any]]] = {
    "count_by_level": {},
    "search_log": {"query": {**_TEXT, "description": "words that a line must all contain"}},
    "lines_around": {
        "line": {"type": "integer", "description": "number of the line in the middle"}
    },
}


class LogTools:
    """The tools for one file.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self._lines: Final = file.read_text("utf-8").splitlines()

    def count_by_level(self) -> str:
        """Count the lines of the log by level."""
        levels = (next((one for one in LEVELS if one in line), "none") for line in self._lines)
        counts = Counter(levels)
        return ", ".join(f"{counts[level]} {level}" for level in (*LEVELS, "none") if counts[level])

    def search_log(self, query: str) -> str:
        """Search the log for the lines that contain all words of a query, in any case."""
        words = query.lower().split()
        if not words:
            return "error: query is empty; say what to look for"
        found = [
            n for n, line in enumerate(self._lines, 1) if all(w in line.lower() for w in words)
        ]
        more = len(found) - MAX_MATCHES
        shown = [self._line(n) for n in found[:MAX_MATCHES]] + [f"… and {more} more"] * (more > 0)
        return "\n".join(shown) or f"no line contains {query!r}"

    def lines_around(self, line: int) -> str:
        """Show the lines around a line of the log, by its number."""
        if not 1 <= line <= len(self._lines):
            return f"error: line {line}: the log has lines 1 to {len(self._lines)}"
        first = max(1, line - MAX_AROUND // 2)
        last = min(len(self._lines), line + MAX_AROUND // 2)
        return "\n".join(self._line(number) for number in range(first, last + 1))

    def call(self, name: str, arguments: str) -> str:
        """Run a tool call as a model has made it; what is wrong with it becomes its result."""
        try:
            if name not in _PARAMETERS:
                return f"error: no tool {name!r}; there are {', '.join(_PARAMETERS)}"
            return str(getattr(self, name)(**json.loads(arguments or "{}")))
        except (TypeError, ValueError) as error:
            return f"error: {name}: {error}"

    def _line(self, number: int) -> str:
        return f"{number}: {self._lines[number - 1][:MAX_LINE_CHARS]}"


SCHEMAS: Final[list[dict[str, Any]]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": getattr(LogTools, name).__doc__,
            "parameters": {
                "type": "object",
                "properties": parameters,
                "required": list(parameters),
            },
        },
    }
    for name, parameters in _PARAMETERS.items()
]
