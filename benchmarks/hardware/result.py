"""The result file: what was measured under which conditions, and going on with it. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from grid import Cell

FORMAT: Final = "conserve-hardware-1"


class ResultError(Exception):
    """A result file cannot be read or gone on with."""


class Result:
    """One file. Written anew, as a whole, after each thing measured: what is killed loses little.

    Args:
        path: where; None: only in memory.
        config: what must be equal for figures to be put together (model, kernels, GPU, ...).

    Raises:
        ResultError: the file there is another kind, or was measured under another ``config``.
    """

    def __init__(self, path: Path | None, config: dict[str, Any]) -> None:
        self._path = path
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "config": config,
            "sessions": [],
            "cells": [],
            "repeats": [],
            "power": [],
            "left_out": [],
        }
        if path is not None and path.exists():
            self.data = read_result(path)
            differing = [
                f"{name} ({self.data['config'].get(name)!r} there, {config.get(name)!r} now)"
                for name in {**self.data["config"], **config}
                if self.data["config"].get(name) != config.get(name)
            ]
            if differing:
                raise ResultError(
                    f"{path} was measured with another {', '.join(differing)}: give another --out"
                )

    def begin(self, session: dict[str, Any]) -> int:
        """A run of the script; returns its number."""
        self.data["sessions"].append(session)
        self.save()
        return len(self.data["sessions"]) - 1

    def measured(self) -> set[Cell]:
        """Cells that need not be measured again."""
        return {Cell(**cell["cell"]) for cell in self.data["cells"]}

    def add(self, kind: str, entry: dict[str, Any]) -> None:
        """Keep what was measured."""
        self.data[kind].append(entry)
        self.save()

    def save(self) -> None:
        """Write the file."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        beside.replace(self._path)


def read_result(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ResultError: it is none; the message says what to do.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ResultError(f"{path} was not written by measure.py ({FORMAT})")
    return data
