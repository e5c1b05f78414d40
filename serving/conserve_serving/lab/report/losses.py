"""Where it does not win: every figure in which the rows say that somebody else is better."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from conserve_serving.lab.report.context import Context, say, say_change, say_interval
from conserve_serving.lab.report.curves import is_saturated
from conserve_serving.lab.report.document import Block, Cell, Note, Section, Table, Tile, Tone
from conserve_serving.lab.report.metrics import HEADLINE, Metric
from conserve_serving.lab.report.rows import Comparison, Place, at_load, say_rate
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
        blocks.append(_summary(context, met))
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


def _summary(context: Context, met: list[Meeting]) -> Table:
    """Of each place: at how many loads each figure is lost, and by how much at worst."""
    rows = []
    for ours in context.ours:
        for place in context.rows.places():
            here = [one for one in met if (one.ours, one.place) == (ours, place)]
            if here:
                cells = (_loads([m for m in here if m.metric == metric]) for metric in HEADLINE)
                detail = str(place.setting)
                rows.append((Cell(ours), Cell(place.title, detail=detail), *cells))
    return Table(
        caption="At how many loads it loses, and by how much at worst",
        columns=("policy", "where", *(metric.title for metric in HEADLINE)),
        rows=tuple(rows),
        texts=frozenset({"policy", "where"}),
    )


def _loads(met: list[Meeting]) -> Cell:
    if not met:
        return Cell("–", Tone.SOFT)
    lost = [one for one in met if one.comparison.verdict is Verdict.LOSS]
    won = sum(one.comparison.verdict is Verdict.WIN for one in met)
    if lost:
        worst = max(lost, key=lambda one: one.worse_by)
        return Cell(
            f"{len(lost)} of {len(met)}: {say_change(worst.comparison.ratio)}",
            Tone.BAD,
            f"{at_load(worst.rate_per_s)}, against {worst.comparison.rival}",
        )
    if all(one.comparison.verdict is Verdict.UNKNOWN for one in met):
        return Cell("one seed", Tone.SOFT)
    return Cell(f"none of {len(met)}", Tone.GOOD if won else Tone.EVEN, f"wins at {won}")


def _table(lost: list[Meeting]) -> Table:
    rows = []
    for one in lost:
        c, unit = one.comparison, one.metric.unit
        tone = Tone.BAD if c.verdict is Verdict.LOSS else Tone.EVEN
        rows.append(
            (
                Cell(f"{c.verdict} {say_change(c.ratio)}", tone, say_interval(c.ratio)),
                Cell(one.metric.title),
                Cell(one.ours, detail=say(c.ours, unit)),
                Cell(c.rival, detail=say(c.theirs, unit)),
                Cell(one.place.title, detail=str(one.place.setting)),
                Cell(say_rate(one.rate_per_s), detail="saturated" if one.saturated else ""),
            )
        )
    return Table(
        caption=f"{len(lost)} figures, the largest loss first",
        columns=("difference", "metric", "policy", "best other", "where", "conversations/s"),
        rows=tuple(rows),
        texts=frozenset({"difference", "metric", "policy", "best other", "where"}),
    )
