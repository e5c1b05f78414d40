"""Figures of one run: turns in as they close, a few numbers per conversation kept, JSON out.

Definitions are those of :mod:`conserve_serving.replay.figures`, for virtual time:

- **TTFET**: conversation arrival to the first token of its last turn, tool gaps included;
  ``ttfet_without_gaps`` leaves out the time between the end of a turn and the next one's arrival.
- **First-turn TTFT**: conversation arrival to the first token of turn 1.
- **Last-turn TBT**: mean gap between the tokens of the last turn; none where that is one token.
- **E2E**: conversation arrival to the last token of the last turn.
- **Normalised**: over the same conversation alone on the idle reference cluster.
- **SLO**: a conversation meets it at up to ``SLO_FACTOR`` times that. One that was not completely
  answered meets none.
- **Tail-turn TTFT**: arrival of a tail turn to its first token, pooled over turns.

The first ``warmup_share`` of the conversations, by arrival, are in none of these; energy, tokens
and counters are of the whole run, drain included.
"""

from __future__ import annotations

import math
from array import array
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from conserve_serving.core.types import ConversationId, Outcome
from conserve_serving.replay.ideal import IdealLatency
from conserve_serving.replay.latencies import SLO_FACTOR
from conserve_serving.simulator.conversation import TurnResult

#: Latencies of a conversation, in the order of the columns.
LATENCIES: Final = (
    "ttfet",
    "ttfet_without_gaps",
    "first_turn_ttft",
    "last_turn_tbt",
    "e2e",
)
#: Where the time up to the first token of the last turn goes, in order of a turn's life.
PARTS: Final = (
    "held",
    "prefill_queue",
    "prefill",
    "handoff",
    "decoder_wait",
    "decode",
    "gaps",
)
#: What of it there is alone on an idle cluster; hand-off and the decoder's step are in ``prefill``.
_ALONE: Final = ("prefill", "decode")
_QUANTILES: Final = (0.50, 0.90, 0.95, 0.99)
#: Arrivals and completions are counted between these shares of them.
_MIDDLE: Final = (0.2, 0.8)
#: Completions that take so much longer than arrivals leave a backlog that only grows. A steady run
#: of 1,000 conversations stays within 2 to 3 %.
SATURATED: Final = 1.05

Column = NDArray[np.float64]


class _Open:
    """A conversation under way."""

    __slots__ = ("arrived_s", "finished_s", "first_s", "ideal", "left", "moves", "order", "parts")

    def __init__(self, order: int, turns: int, ideal: IdealLatency) -> None:
        self.order = order
        self.left = turns
        self.ideal = ideal
        self.arrived_s = self.first_s = self.finished_s = math.nan
        self.parts = [0.0] * len(PARTS)
        self.moves = 0


class RunMeter:
    """Gathers a run's figures while it runs: some 200 bytes a conversation and 16 a tail turn."""

    def __init__(self) -> None:
        self._open: dict[ConversationId, _Open] = {}
        self._expected = 0
        self._order = array("q")
        self._ends: dict[str, array[float]] = {
            name: array("d") for name in ("arrived", "finished", *LATENCIES, *PARTS)
        }
        self._ideals: dict[str, array[float]] = {name: array("d") for name in (*LATENCIES, *_ALONE)}
        self._transfers = array("q")
        self._tail_ttft = array("d")
        self._tail_order = array("q")
        self.tokens = dict.fromkeys(
            ("prompt", "new", "output", "cached", "recomputed", "restored", "moved"), 0
        )
        self.turns = 0
        self.incomplete = 0

    def expect(self, conversation: ConversationId, turns: int, ideal: IdealLatency) -> None:
        """A conversation is about to arrive; in order of arrival.

        Args:
            conversation: its id.
            turns: how many it has.
            ideal: its latencies alone.
        """
        self._open[conversation] = _Open(self._expected, turns, ideal)
        self._expected += 1

    def on_turn(self, result: TurnResult) -> None:
        """A turn was closed."""
        self.turns += 1
        of = self._open[result.conversation]
        first_s, finished_s = result.first_token_s, result.finished_s
        if result.outcome is not Outcome.FINISHED or first_s is None or finished_s is None:
            self.incomplete += 1
            del self._open[result.conversation]
            return
        tokens = self.tokens
        tokens["prompt"] += result.prompt_tokens
        tokens["new"] += result.new_tokens
        tokens["output"] += result.output_tokens
        tokens["cached"] += result.cached_tokens
        tokens["recomputed"] += result.recomputed_tokens
        tokens["restored"] += result.restored_tokens
        tokens["moved"] += result.moved_tokens
        of.moves += result.transfer is not None
        parts = of.parts
        if result.index == 1:
            of.arrived_s, of.first_s = result.arrived_s, first_s
        else:
            parts[6] += result.arrived_s - of.finished_s
            self._tail_ttft.append(first_s - result.arrived_s)
            self._tail_order.append(of.order)
        for place, seconds in enumerate(turn_parts(result)):
            parts[place] += seconds
        of.finished_s = finished_s
        of.left -= 1
        if of.left:
            parts[5] += finished_s - first_s
        else:
            self._close(of, first_s, finished_s, result.output_tokens)
            del self._open[result.conversation]

    def _close(self, of: _Open, first_s: float, finished_s: float, output_tokens: int) -> None:
        ends, ideal = self._ends, of.ideal
        arrived_s = of.arrived_s
        self._order.append(of.order)
        self._transfers.append(of.moves)
        ends["arrived"].append(arrived_s)
        ends["finished"].append(finished_s)
        ends["ttfet"].append(first_s - arrived_s)
        ends["ttfet_without_gaps"].append(first_s - arrived_s - of.parts[6])
        ends["first_turn_ttft"].append(of.first_s - arrived_s)
        ends["last_turn_tbt"].append(
            (finished_s - first_s) / (output_tokens - 1) if output_tokens > 1 else math.nan
        )
        ends["e2e"].append(finished_s - arrived_s)
        for name, seconds in zip(PARTS, of.parts, strict=True):
            ends[name].append(seconds)
        tbt_s = ideal.last_turn_tbt_s
        self._ideals["ttfet"].append(ideal.ttfet_s)
        self._ideals["ttfet_without_gaps"].append(ideal.ttfet_s - ideal.gaps_s)
        self._ideals["first_turn_ttft"].append(ideal.first_turn_ttft_s)
        self._ideals["last_turn_tbt"].append(math.nan if tbt_s is None else tbt_s)
        self._ideals["e2e"].append(ideal.e2e_s)
        self._ideals["prefill"].append(ideal.first_tokens_s)
        self._ideals["decode"].append(ideal.ttfet_s - ideal.gaps_s - ideal.first_tokens_s)

    # --- what came out -----------------------------------------------------------------------
    def figures(self, *, warmup_share: float) -> dict[str, Any]:
        """Latencies, SLO, rates and where the time went.

        Args:
            warmup_share: share of the conversations, the first to arrive, that are left out.
        """
        first = math.floor(warmup_share * self._expected)
        order = np.asarray(self._order)
        kept = order >= first
        ends = {name: _column(values)[kept] for name, values in self._ends.items()}
        ideals = {name: _column(values)[kept] for name, values in self._ideals.items()}
        ratios = {name: ends[name] / ideals[name] for name in LATENCIES}
        latency = {f"{name}_s": _distribution(ends[name]) for name in LATENCIES}
        tail = _column(self._tail_ttft)[np.asarray(self._tail_order) >= first]
        latency["tail_turn_ttft_s"] = _distribution(tail)
        latency |= {f"{name}_s_normalized": _distribution(ratios[name]) for name in LATENCIES}
        measured = self._expected - first
        moves = np.asarray(self._transfers)[kept]
        return {
            "conversations": self._expected,
            "conversations_measured": measured,
            "conversations_incomplete": self._expected - len(order),
            "turns": self.turns,
            "latency": latency,
            "slo": _attainment(ratios, missing=measured - int(kept.sum())),
            **self._rates(),
            "transfers_per_conversation": {
                "mean": float(moves.mean()) if len(moves) else None,
                "max": int(moves.max()) if len(moves) else None,
            },
            "tokens": dict(self.tokens),
            "where": _where(ends, ideals, ratios["ttfet"]),
        }

    def _rates(self) -> dict[str, Any]:
        """Arrivals and completions a second, each over its own middle: from the first fifth to the
        last. In a steady state the two middles take equally long, however long a conversation
        lives; how many times longer the completions' takes is the ``stretch``.
        """
        arrived, finished = (np.sort(_column(self._ends[name])) for name in ("arrived", "finished"))
        low, high = (math.floor(share * len(arrived)) for share in _MIDDLE)
        arriving_s = float(arrived[high] - arrived[low]) if high > low else 0.0
        finishing_s = float(finished[high] - finished[low]) if high > low else 0.0
        known = arriving_s > 0 and finishing_s > 0
        stretch = finishing_s / arriving_s if known else None
        return {
            "arrival_rate_per_s": (high - low) / arriving_s if known else None,
            "completion_rate_per_s": (high - low) / finishing_s if known else None,
            "stretch": stretch,
            "saturated": stretch is not None and stretch > SATURATED,
        }


def turn_parts(result: TurnResult) -> tuple[float, float, float, float, float]:
    """Seconds from a turn's arrival to its first token: the first five of ``PARTS``.

    They add up to its TTFT. ``handoff`` is KV on its way, before the prompt was computed (a
    conversation that moves) or after; ``decoder_wait`` is what passed at the decoder between the
    KV's arrival and the first token.
    """
    end_s = result.first_token_s
    if end_s is None:
        return 0.0, 0.0, 0.0, 0.0, 0.0
    at_s = result.arrived_s

    def until(time_s: float | None) -> float:
        nonlocal at_s
        if time_s is None or time_s <= at_s:
            return 0.0
        start_s, at_s = at_s, min(time_s, end_s)
        return at_s - start_s

    held = until(result.placed_s)
    handoff = 0.0
    handed_s, prefilled_s = result.handed_s, result.prefilled_s
    moved_first = handed_s is not None and prefilled_s is not None and handed_s <= prefilled_s
    if moved_first:
        handoff = until(handed_s)
    queued = until(result.prefill_began_s)
    prefill = until(prefilled_s)
    if not moved_first:
        handoff = until(handed_s)
    return held, queued, prefill, handoff, until(end_s)


def _column(values: array[float]) -> Column:
    return np.asarray(values, dtype=np.float64)


def _distribution(values: Column) -> dict[str, float | int | None]:
    """Quantiles by linear interpolation between closest ranks; nan: the figure does not exist."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {"p50": None, "p90": None, "p95": None, "p99": None, "mean": None, "n": 0}
    p50, p90, p95, p99 = (float(q) for q in np.quantile(known, _QUANTILES))
    return {
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "mean": float(known.mean()),
        "n": len(known),
    }


def _attainment(ratios: dict[str, Column], *, missing: int) -> dict[str, float | None]:
    """Shares of conversations that meet the SLO; ``missing`` ones were not completely answered."""
    shares: dict[str, float | None] = {"factor": SLO_FACTOR}
    every = np.ones(len(ratios["ttfet"]), dtype=bool)
    for name in LATENCIES:
        unknown = np.isnan(ratios[name])
        met = ratios[name] <= SLO_FACTOR
        count = int((~unknown).sum()) + missing
        shares[name] = float(met.sum()) / count if count else None
        if name != "ttfet_without_gaps":
            every &= met | unknown
    count = len(every) + missing
    shares["all"] = float(every.sum()) / count if count else None
    return shares


def _where(ends: dict[str, Column], ideals: dict[str, Column], ratio: Column) -> dict[str, Any]:
    """Mean seconds per conversation by part: of all, and of those at and beyond the p95."""
    ttfet = ends["ttfet"]
    if not len(ttfet):
        return {"all": None, "p95": None, "p95_normalized": None}
    sets = {
        "all": np.ones(len(ttfet), dtype=bool),
        "p95": ttfet >= np.quantile(ttfet, 0.95),
        "p95_normalized": ratio >= np.quantile(ratio, 0.95),
    }
    return {
        name: {
            **{part: float(ends[part][chosen].mean()) for part in PARTS},
            "ttfet_s": float(ttfet[chosen].mean()),
            "ideal_ttfet_s": float(ideals["ttfet"][chosen].mean()),
            **{f"ideal_{part}": float(ideals[part][chosen].mean()) for part in _ALONE},
            "conversations": int(chosen.sum()),
        }
        for name, chosen in sets.items()
    }
