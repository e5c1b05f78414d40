"""What options take: kinds of numbers, and files that are to be written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """A number within limits. ``nan``, which no limit stops, is none; nor is ``inf``."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number: give one", param, ctx)
        return number


def check_writable(*paths: Path | None) -> None:
    """Say before anything runs that a file's folder is missing; None: no such file was asked for.

    Raises:
        click.UsageError: naming the path and the remedy.
    """
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise click.UsageError(f"{path}: its folder does not exist. Make it first.")
