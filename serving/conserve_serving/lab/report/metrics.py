"""Which figures of a row the report shows, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure of a row.

    Attributes:
        name: in arguments and tests.
        title: for people; with its unit in ``unit``.
        path: keys from the row down to the figure.
        lower_is_better: the way of the figure.
        log: spans orders of magnitude, so that an axis of it is logarithmic.
    """

    name: str
    title: str
    path: tuple[str, ...]
    unit: str = ""
    lower_is_better: bool = True
    log: bool = True

    def of(self, row: Mapping[str, Any]) -> float | None:
        """The figure in ``row``; None where the row does not have it."""
        value: Any = row
        for key in self.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value)


def _latency(name: str, title: str, key: str, statistic: str = "p95", unit: str = "") -> Metric:
    return Metric(name=name, title=title, path=("latency", key, statistic), unit=unit)


IDLE: Final = "× idle"

TTFET: Final = _latency("ttfet", "TTFET, p95", "ttfet_s_normalized", unit=IDLE)
FIRST_TURN_TTFT: Final = _latency(
    "first_turn_ttft", "First-turn TTFT, p95", "first_turn_ttft_s_normalized", unit=IDLE
)
LAST_TURN_TBT: Final = _latency(
    "last_turn_tbt", "Last-turn TBT, p95", "last_turn_tbt_s_normalized", unit=IDLE
)
E2E: Final = _latency("e2e", "E2E, p95", "e2e_s_normalized", unit=IDLE)
TOKENS_PER_J: Final = Metric(
    name="tokens_per_j",
    title="Tokens per joule",
    path=("tokens_per_j",),
    lower_is_better=False,
    log=False,
)
TOKENS_PER_J_LOW: Final = Metric(
    name="tokens_per_j_low",
    title="Tokens per joule, low power model",
    path=("tokens_per_j_low",),
    lower_is_better=False,
    log=False,
)
TOKENS_PER_J_HIGH: Final = Metric(
    name="tokens_per_j_high",
    title="Tokens per joule, high power model",
    path=("tokens_per_j_high",),
    lower_is_better=False,
    log=False,
)
SLO_ALL: Final = Metric(
    name="slo_all",
    title="Conversations within every SLO",
    path=("slo", "all"),
    unit="share",
    lower_is_better=False,
    log=False,
)
SLO_TTFET: Final = Metric(
    name="slo_ttfet",
    title="Conversations within the TTFET SLO",
    path=("slo", "ttfet"),
    unit="share",
    lower_is_better=False,
    log=False,
)
#: Median first-turn TTFT in seconds: what the paper says that its own policy loses.
FIRST_TURN_TTFT_P50_S: Final = _latency(
    "first_turn_ttft_p50_s", "First-turn TTFT, median", "first_turn_ttft_s", "p50", "s"
)

#: The panels of a load curve, and what is compared on every page.
HEADLINE: Final = (TTFET, FIRST_TURN_TTFT, LAST_TURN_TBT, E2E, TOKENS_PER_J, SLO_ALL)
METRICS: Final = {
    metric.name: metric
    for metric in (
        *HEADLINE,
        SLO_TTFET,
        FIRST_TURN_TTFT_P50_S,
        TOKENS_PER_J_LOW,
        TOKENS_PER_J_HIGH,
    )
}
