"""One policy against another in one figure: who wins, ties or loses, and by how much.

A win or a loss needs an interval over paired seeds that excludes no difference, and one beyond
``MARGIN``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from conserve_serving.lab.report.reached import Goodput
from conserve_serving.lab.stats import Estimate, Verdict, difference, mean, ratio, verdict

#: Differences up to this share are ties: two runs of equal clusters differ by as much.
MARGIN: Final = 0.05
#: The bound of a finding in which neither found its end.
BOTH: Final = "both carried every load that was run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One of ours against the best of the others in one figure.

    Attributes:
        ours, rival: labels.
        value, rival_value: means over seeds.
        ratio: ours over theirs, paired by seed; None where theirs is 0.
        verdict: what that says.
        bound: ``or more`` or ``or less`` where one of them kept the SLO at every load that was run,
            ``BOTH`` where both did; else empty.
    """

    ours: str
    rival: str
    value: float
    rival_value: float
    ratio: Estimate | None
    verdict: Verdict
    bound: str = ""


def finding(
    ours: str,
    own: Mapping[int, float],
    rival: str,
    other: Mapping[int, float],
    *,
    higher_is_better: bool,
) -> Finding | None:
    """Figures by seed, paired; None where no seed has both.

    Where some of theirs are 0 the ratio is 1 and the difference over their mean.
    """
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return None
    a, b = [own[seed] for seed in seeds], [other[seed] for seed in seeds]
    mine, theirs = mean(a).value, mean(b).value
    found: Estimate | None = None
    if min(b) > 0:
        found = ratio(a, b)
    elif theirs > 0:
        gap = difference(a, b)
        found = Estimate(
            value=1 + gap.value / theirs,
            low=1 + gap.low / theirs,
            high=1 + gap.high / theirs,
            n=gap.n,
        )
    if found is None:
        said = Verdict.WIN if mine > 0 and len(seeds) > 1 else Verdict.UNKNOWN
    else:
        said = verdict(found, higher_is_better=higher_is_better, margin=MARGIN)
    return Finding(
        ours=ours, rival=rival, value=mine, rival_value=theirs, ratio=found, verdict=said
    )


def finding_of_goodputs(
    ours: str, own: Goodput | None, rival: str, other: Goodput | None
) -> Finding | None:
    """What both carry; None where one of them is not known, or neither carries anything."""
    if own is None or other is None or not (own.estimate.value or other.estimate.value):
        return None
    found = finding(ours, own.by_seed, rival, other.by_seed, higher_is_better=True)
    if found is None or not (own.open_end or other.open_end):
        return found
    if own.open_end and other.open_end:
        return replace(found, verdict=Verdict.TIE, bound=BOTH)
    return replace(found, bound="or more" if own.open_end else "or less")
