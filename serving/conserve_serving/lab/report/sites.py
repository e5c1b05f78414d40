"""Clusters with what they carry: goodput of every contender, and the load to compare others at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from conserve_serving.lab.report.context import Context, say
from conserve_serving.lab.report.hardware import Hardware, hardware
from conserve_serving.lab.report.reached import GOODPUTS, Goodput, goodput
from conserve_serving.lab.report.rows import Place
from conserve_serving.replay.report import format_number

#: The load at which latencies are compared, as a share of the best policy's goodput.
LOAD_SHARE: Final = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place with what it carries.

    Attributes:
        place, hardware: where.
        goodputs: by contender, then by the name in ``GOODPUTS``; None where the rows do not say.
        rate_per_s: the load at which latencies are compared; None: nothing was run there.
    """

    place: Place
    hardware: Hardware
    goodputs: dict[str, dict[str, Goodput | None]]
    rate_per_s: float | None

    def reached(self, contender: str, name: str) -> Goodput | None:
        """Goodput of a contender."""
        return self.goodputs[contender][name]


def site_of(context: Context, place: Place) -> Site:
    """The place with the goodput of everybody there."""
    goodputs = {
        label: {name: goodput(context, place, label, metric) for name, metric, _ in GOODPUTS}
        for label in context.rows.contenders(place)
    }
    best = max(
        (g.estimate.value for one in goodputs.values() if (g := one["Gany"]) is not None),
        default=None,
    )
    rate = None if best is None else _load(context, place, LOAD_SHARE * best)
    return Site(place=place, hardware=hardware(context, place), goodputs=goodputs, rate_per_s=rate)


def _load(context: Context, place: Place, highest_per_s: float) -> float | None:
    """The highest rate up to a limit, of those that most runs have; else the lowest of these."""
    runs = {
        rate: sum(len(context.rows.at(place, label, rate)) for label in context.rows.contenders())
        for rate in context.rows.rates(place)
        if rate  # what arrives as recorded is neither above nor below the limit
    }
    most = max(runs.values(), default=0)
    common = [rate for rate, count in runs.items() if 2 * count > most]
    return max((r for r in common if r <= highest_per_s * 1.001), default=min(common, default=None))


def say_goodput(found: Goodput | None) -> str:
    """A goodput with its interval; bounds are told as such."""
    if found is None:
        return "–"
    if found.closed_start and found.estimate.value == 0:
        return "below the lowest load"
    return ("≥ " if found.open_end else "") + say(found.estimate)


def per(found: Goodput, price: float | None, unit: float) -> str:
    """Goodput per ``unit`` of a price or a power; a dash where that is not known."""
    if not price:
        return "–"
    return format_number(unit * found.estimate.value / price)
