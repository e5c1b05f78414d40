"""From rows of many cells to one page: load curves, comparisons, losses, and what they stand on.

Needs the extra ``lab`` (matplotlib, numpy); only commands that make a report import it.
"""

from __future__ import annotations

from conserve_serving.lab.report.build import MAX_HTML_BYTES, SECTIONS, render
from conserve_serving.lab.report.document import (
    Claim,
    Condition,
    Outcome,
    PaperValue,
    Report,
)

__all__ = [
    "MAX_HTML_BYTES",
    "SECTIONS",
    "Claim",
    "Condition",
    "Outcome",
    "PaperValue",
    "Report",
    "render",
]
