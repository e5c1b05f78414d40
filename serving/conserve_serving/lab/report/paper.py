"""The paper's figures at its highest load, as it draws them.

Source: arXiv 2606.01839, read from its plots by eye at 1.634 conversations per second: 1 + 3 A40,
Qwen3-0.6B, SWE-bench capped at 5 turns, 255 conversations. Normalised p95, tokens per joule.
"""

from __future__ import annotations

from typing import Final

from conserve_serving.lab.report.document import PaperValue

RATE_PER_S: Final = 1.634

_SEEN: Final = (
    ("collocated", {"ttfet": 5.6, "last_turn_tbt": 7.6, "tokens_per_j": 61.0}),
    ("full_disaggregation", {"ttfet": 104.0, "last_turn_tbt": 2.0, "tokens_per_j": 30.0}),
    ("per_turn-10-wrong", {"ttfet": 8.3, "last_turn_tbt": 4.3, "tokens_per_j": 57.7}),
    ("conserve", {"ttfet": 4.07, "last_turn_tbt": 4.4, "tokens_per_j": 62.0}),
    ("per_turn-5-wrong", {"ttfet": 6.1}),
    ("per_turn-50-wrong", {"ttfet": 13.7}),
)

#: For the argument ``paper`` of ``render``.
PAPER: Final = tuple(
    PaperValue(contender=contender, metric=metric, rate_per_s=RATE_PER_S, value=value)
    for contender, values in _SEEN
    for metric, value in values.items()
)
