"""Reading a trace file, whatever its format."""

from __future__ import annotations

import enum
import gzip
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from conserve_serving.replay.conversations import Conversation
from conserve_serving.replay.errors import TraceError
from conserve_serving.replay.mooncake import join_requests
from conserve_serving.replay.rows import csv_rows, join_rows, json_object, json_rows

_GZIP_MAGIC: Final = b"\x1f\x8b"


class TraceFormat(enum.StrEnum):
    """How a trace file is written.

    ``rows`` and ``csv``: :mod:`conserve_serving.replay.rows`; ``mooncake``:
    :mod:`conserve_serving.replay.mooncake`.
    """

    ROWS = "rows"
    CSV = "csv"
    MOONCAKE = "mooncake"


def load_trace(path: Path, trace_format: TraceFormat | None = None) -> Iterator[Conversation]:
    """Read a trace row by row; only token counts are kept, and every row is checked.

    Args:
        path: the file, plain or gzip (told by its content).
        trace_format: how it is written; None: CSV by its name, else told by its first row.

    Yields:
        Conversations in the order of their first rows.

    Raises:
        TraceError: the file cannot be read, or a row is not what the format asks for; the text
            names file, line, field and remedy.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        if zipped:
            with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
                yield from _conversations(lines, path, trace_format)
        else:
            with path.open(encoding="utf-8", newline="") as lines:
                yield from _conversations(lines, path, trace_format)
    except (OSError, EOFError) as error:
        raise TraceError(f"cannot be read: {error}. Give a readable file.", path=path) from error
    except UnicodeDecodeError as error:
        raise TraceError(
            f"not UTF-8 text: {error}. Re-encode the file as UTF-8.", path=path
        ) from error


def _conversations(
    lines: io.TextIOBase | Iterable[str], path: Path, trace_format: TraceFormat | None
) -> Iterator[Conversation]:
    name = path.name.removesuffix(".gz")
    if trace_format is TraceFormat.CSV or (trace_format is None and name.endswith(".csv")):
        return join_rows(csv_rows(lines, path), path)
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        raise TraceError("the file is empty. Give one JSON object per line.", path=path)
    rows = itertools.chain((first,), numbered)
    if trace_format is None:
        has_blocks = "hash_ids" in json_object(first[1], path=path, number=first[0])
        trace_format = TraceFormat.MOONCAKE if has_blocks else TraceFormat.ROWS
    if trace_format is TraceFormat.MOONCAKE:
        return join_requests(rows, path)
    return join_rows(json_rows(rows, path), path)
