"""Clusters with what they carry: goodput of every contender, and the load to compare others at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from conserve_serving.lab.report.context import Context, say
from conserve_serving.lab.report.hardware import Hardware, hardware
from conserve_serving.lab.report.reached import GOODPUTS, Goodput, goodput
from conserve_serving.lab.report.rows import Place

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
    rates = context.rows.rates(place)
    rate = None
    if best is not None and rates:
        rate = max((r for r in rates if r <= LOAD_SHARE * best * 1.001), default=rates[0])
    return Site(place=place, hardware=hardware(context, place), goodputs=goodputs, rate_per_s=rate)


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
    return f"{unit * found.estimate.value / price:.3g}"
