"""Where it does not win: every figure in which the rows say that somebody else is better."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from conserve_serving.lab.report.context import Context, say, say_percent, verdict_cell
from conserve_serving.lab.report.curves import is_saturated
from conserve_serving.lab.report.document import Block, Cell, Note, Section, Table, Tile, Tone
from conserve_serving.lab.report.metrics import HEADLINE, Metric
from conserve_serving.lab.report.rows import Comparison, Place, say_rate
from conserve_serving.lab.stats import MARGIN, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """One of ours against the best of the others, somewhere, in something.

    Attributes:
        place, rate_per_s, metric, ours: where, under which load, in what, who.
        comparison: what came out.
        saturated: one of the two was.
    """

    place: Place
    rate_per_s: float
    metric: Metric
    ours: str
    comparison: Comparison
    saturated: bool

    @property
    def worse_by(self) -> float:
        """Share by which ours is worse than the other; negative: better."""
        ratio = self.comparison.ratio.value
        if self.metric.lower_is_better:
            return ratio - 1
        return 1 / ratio - 1 if ratio > 0 else float("inf")

    @property
    def excludes_win(self) -> bool:
        """Whether the whole interval is on the worse side, however small the effect."""
        ratio = self.comparison.ratio
        if ratio.n < 2:
            return False
        return ratio.low >= 1 if self.metric.lower_is_better else ratio.high <= 1


def meetings(context: Context) -> list[Meeting]:
    """Every place, load, metric and one of ours that can be compared with the best rival."""
    found = []
    for place in context.rows.places():
        for rate in context.rows.rates(place):
            for metric in HEADLINE:
                for ours in context.ours_at(place):
                    comparison = context.against_best(place, ours, rate, metric)
                    if comparison is not None:
                        found.append(
                            Meeting(
                                place=place,
                                rate_per_s=rate,
                                metric=metric,
                                ours=ours,
                                comparison=comparison,
                                saturated=is_saturated(context, place, ours, rate)
                                or is_saturated(context, place, comparison.rival, rate),
                            )
                        )
    return found


def section(context: Context, met: list[Meeting]) -> Section:
    """The losses, the largest first, after a count of everything."""
    lost = sorted(
        (one for one in met if one.excludes_win and one.comparison.ratio.value != 1.0),
        key=lambda one: -one.worse_by,
    )
    blocks: list[Block] = []
    if not met:
        blocks.append(
            Note("Nothing can be compared: the rows have ConServe or the others, not both.", True)
        )
    else:
        blocks.append(_counts(context, met))
    if met and all(one.comparison.ratio.n < 2 for one in met):
        blocks.append(
            Note("One seed only: no interval excludes anything. Run several seeds.", True)
        )
    elif met and not lost:
        blocks.append(Note("In no figure does the interval exclude a win."))
    if lost:
        blocks.append(_table(lost))
    return Section(
        id="losses",
        title="Where it does not win",
        help="Every cluster, workload, load and figure in which the 95 % interval of ConServe's "
        "difference to the best other policy lies wholly on the worse side, the largest loss "
        "first. The best is chosen after the fact, figure by figure, so that no single rival has "
        f"all of these. Up to {100 * MARGIN:g} % counts as a tie, and is listed all the same.",
        blocks=tuple(blocks),
        own_page=True,
    )


def tiles(met: list[Meeting]) -> tuple[Tile, ...]:
    """How often each verdict came out, for the top of the page."""
    counts = Counter(one.comparison.verdict for one in met)
    decided = sum(counts[v] for v in (Verdict.WIN, Verdict.TIE, Verdict.LOSS))
    if not decided:
        return ()
    return (
        Tile(
            name="Against the best other policy",
            big=f"{counts[Verdict.WIN]} · {counts[Verdict.TIE]} · {counts[Verdict.LOSS]}",
            small=f"wins · ties · losses, over {decided} figures at all loads",
        ),
    )


def _counts(context: Context, met: list[Meeting]) -> Table:
    rows = []
    for ours in context.ours:
        for metric in HEADLINE:
            counts = Counter(
                one.comparison.verdict for one in met if (one.ours, one.metric) == (ours, metric)
            )
            if counts:
                rows.append(
                    (
                        Cell(ours),
                        Cell(metric.title),
                        Cell(
                            str(counts[Verdict.WIN]),
                            Tone.GOOD if counts[Verdict.WIN] else Tone.SOFT,
                        ),
                        Cell(
                            str(counts[Verdict.TIE]),
                            Tone.EVEN if counts[Verdict.TIE] else Tone.SOFT,
                        ),
                        Cell(
                            str(counts[Verdict.LOSS]),
                            Tone.BAD if counts[Verdict.LOSS] else Tone.SOFT,
                        ),
                        Cell(str(counts[Verdict.UNKNOWN])),
                    )
                )
    return Table(
        caption="How often, over all clusters, workloads and loads",
        columns=("policy", "metric", "wins", "ties", "losses", "one seed"),
        rows=tuple(rows),
    )


def _table(lost: list[Meeting]) -> Table:
    rows = []
    for one in lost:
        c, unit = one.comparison, one.metric.unit
        cell = verdict_cell(c)
        rows.append(
            (
                Cell(one.place.cluster),
                Cell(one.place.workload),
                Cell(str(one.place.setting)),
                Cell(say_rate(one.rate_per_s) + (", saturated" if one.saturated else "")),
                Cell(one.ours),
                Cell(one.metric.title),
                Cell(f"{c.verdict}: {say_percent(c.ratio)}", cell.tone),
                Cell(say(c.ours, unit)),
                Cell(c.rival),
                Cell(say(c.theirs, unit)),
            )
        )
    return Table(
        caption=f"{len(lost)} figures",
        columns=(
            "cluster",
            "workload",
            "setting",
            "conversations/s",
            "policy",
            "metric",
            "difference",
            "ours",
            "best other",
            "theirs",
        ),
        rows=tuple(rows),
    )
