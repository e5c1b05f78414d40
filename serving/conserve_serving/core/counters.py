"""What the scheduler counts, by reason. Totals since it started; bounded by the enumerations."""

from __future__ import annotations

from collections import Counter

from conserve_serving.core.types import Fallback, Outcome, Reason, TransferReason


class Counters:
    """Totals by reason. Read by metrics and tests, written by the scheduler alone."""

    __slots__ = (
        "fallbacks",
        "holds",
        "ignored_events",
        "moves",
        "outcomes",
        "parked_tokens",
        "parks",
        "placements",
        "rejections",
        "releases",
        "shortfall_tokens",
        "shortfall_turns",
        "transferred_tokens",
        "transfers",
    )

    def __init__(self) -> None:
        self.placements: Counter[Reason] = Counter()
        self.holds: Counter[Reason] = Counter()
        self.rejections: Counter[Reason] = Counter()
        self.releases: Counter[Reason] = Counter()
        self.moves: Counter[TransferReason] = Counter()  # re-placements of open conversations
        self.transfers: Counter[TransferReason] = Counter()
        self.fallbacks: Counter[Fallback] = Counter()
        self.outcomes: Counter[Outcome] = Counter()
        self.ignored_events: Counter[str] = Counter()
        self.transferred_tokens = 0
        self.parks = 0
        self.parked_tokens = 0
        self.shortfall_turns = 0
        self.shortfall_tokens = 0
