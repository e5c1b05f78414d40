"""Unlike tiers, run: what each contender carries on each cluster, and how it fares at equal loads.

Three stages. Under each seed the highest load at which 95 % of the conversations meet every SLO
(``Gany``), then the TTFET SLO alone (``Gf``), are searched for every contender, workload and
cluster side by side; a seed's search begins where the seeds before it ended. Then all contenders of
a cluster run at the same loads: shares of what the best of them carries there.

What makes clusters comparable: one SLO in seconds (a multiple of what one H100 alone takes), and
the same conversations, cut to what every engine of every cluster can hold.

``lab.tier_verdicts`` says what came out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from conserve_serving.core.types import Tier
from conserve_serving.lab.capacity import ClusterCapacity, cluster_capacity
from conserve_serving.lab.cell import Cell
from conserve_serving.lab.cluster_spec import ClusterSpec, EngineGroup
from conserve_serving.lab.clusters import cluster, list_clusters
from conserve_serving.lab.contenders import Contender
from conserve_serving.lab.errors import LabError
from conserve_serving.lab.goodput import GoodputSearch, Row, Target, at_rate, drive
from conserve_serving.lab.grid import failed
from conserve_serving.lab.report.context import BOUNDS
from conserve_serving.lab.workloads import WorkloadSpec
from conserve_serving.lab.worth import right_sized

#: Ours, and the strongest of those that they have to beat: hosting (``collocated`` takes no notice
#: of speed), per turn, and those that dedicate the strong tier, as ours may.
CONTENDERS: Final = (
    "conserve",
    "conserve-hosting",
    "conserve_plus",
    "collocated_speed",
    "collocated_speed_override",
    "collocated",
    "per_turn-10-wrong",
    "per_turn-perfect",
    "ppd",
    "deflection",
)
#: Name → workload, with as many conversations as make a run of about 1,000 turns.
WORKLOADS: Final[dict[str, WorkloadSpec]] = {
    "swebench-5": WorkloadSpec(source="generated:swebench", max_turns=5, conversations=160),
    "swebench": WorkloadSpec(source="generated:swebench", conversations=80),
    "customer-service": WorkloadSpec(source="generated:customer-service", conversations=100),
    "coding-agent": WorkloadSpec(
        source="generated:coding-agent", max_gap_s=120, until_reset=True, conversations=40
    ),
}
#: Model → profile of the engine that, alone, sets the SLO.
REFERENCES: Final = {"8b": "h100-qwen3-8b", "32b": "h100-qwen3-32b-tp2"}
#: Loads at which latencies are compared, as shares of the best contender's Gany.
SHARES: Final = (0.5, 0.8, 1.0)
#: A search ends when the loads that pass and fail are this close; the goodput lies between them on
#: a straight line.
TOLERANCE: Final = 0.1

#: The first load tried, as a share of what the contender can carry by arithmetic.
_GUESS: Final = 0.65
#: Nothing above so many times what can be carried by any mode: no queue would ever empty.
_CEILING: Final = 1.5
#: What carries less than this share of the guess carries nothing worth a table.
_FLOOR: Final = 1 / 16
_FIRST_STEP: Final = 1.4
_LATER_STEP: Final = 1.12
#: Conversations that the arithmetic looks at.
_SAMPLE: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run.

    Attributes:
        clusters, contenders, workloads: every one with every other.
        seeds: runs of each point; intervals are over them.
        reference: the cluster whose idle latency the SLOs are multiples of.
        mixed_slowdown, link, warmup_share: as those of :class:`~conserve_serving.lab.cell.Cell`.
        tolerance: of the searches.
        shares: loads of the comparison, as shares of the best contender's Gany.

    Raises:
        LabError: the clusters serve more than one model, or a figure is out of range.
    """

    clusters: Sequence[ClusterSpec]
    contenders: Sequence[Contender]
    workloads: Sequence[WorkloadSpec]
    seeds: int
    reference: ClusterSpec
    mixed_slowdown: float = 1.25
    link: str | None = None
    warmup_share: float = 0.1
    tolerance: float = TOLERANCE
    shares: Sequence[float] = SHARES

    def __post_init__(self) -> None:
        models = sorted({one.model for one in (*self.clusters, self.reference)})
        if len(models) > 1:
            raise LabError(
                f"clusters serve {' and '.join(models)}: latencies of one model say nothing about "
                "another's. Give clusters of one model; --model chooses the reference."
            )
        if not 0 < self.tolerance < 1:
            raise LabError(f"tolerance is {self.tolerance}: give more than 0 and less than 1.")

    def cells(self, seed: int) -> list[Cell]:
        """One for each cluster, workload and contender; their rate does not matter yet."""
        return [
            Cell(
                cluster=on,
                contender=contender,
                workload=replace(workload, seed=seed, rate_per_s=1.0),
                mixed_slowdown=self.mixed_slowdown,
                link=self.link,
                reference=self.reference,
                warmup_share=self.warmup_share,
            )
            for workload in map(self._cut, self.workloads)
            for on in self.clusters
            for contender in self.contenders
        ]

    def _cut(self, workload: WorkloadSpec) -> WorkloadSpec:
        """Cut to what every engine of every cluster can hold: else some would have less to do."""
        if workload.max_context_tokens is not None:
            return workload
        longest = min(one.longest_context_tokens for one in self.clusters)
        return replace(workload, max_context_tokens=longest)


def reference_of(model: str) -> ClusterSpec:
    """One engine alone, whose idle latency the SLOs of that model are multiples of.

    Raises:
        LabError: there is none for that model.
    """
    if model not in REFERENCES:
        raise LabError(f"model {model!r}: choose one of {', '.join(REFERENCES)}.")
    profile = REFERENCES[model]
    return ClusterSpec(
        name=f"1-{profile}",
        title=f"one {profile} alone",
        groups=(EngineGroup(count=1, tier=Tier.DECODE, profile=profile),),
    )


def clusters_of(model: str) -> list[ClusterSpec]:
    """The clusters that come with the package and serve what the reference does."""
    wanted = reference_of(model).model
    return [one for one in map(cluster, list_clusters()) if one.model == wanted]


def with_right_sized(clusters: Sequence[ClusterSpec]) -> list[ClusterSpec]:
    """With equal tiers that cost, and that may draw, about as much as each unlike one.

    They are of the unlike cluster's prefill tier's kind; such as are there already are not added.
    """
    found = list(clusters)
    for like in clusters:
        profiles = [group.profile for group in like.groups]
        if len(set(profiles)) == 1:
            continue
        for by in ("dollars", "watts"):
            sized = right_sized(like, profiles[0], by=by)
            if not any(_alike(sized, one) for one in found):
                found.append(sized)
    return found


def _alike(one: ClusterSpec, other: ClusterSpec) -> bool:
    return (one.groups, one.link, one.usd_per_hour) == (
        other.groups,
        other.link,
        other.usd_per_hour,
    )


# --- running --------------------------------------------------------------------------------------

#: Names a cluster, a workload and a contender.
_Site = tuple[str, WorkloadSpec, str]


@dataclass(slots=True)
class _Known:
    """What is known of each site so far.

    Attributes:
        answers: goodputs by site, one for each seed.
        tried: the loads that have run under each seed, with their rows.
        rows: all rows by key.
    """

    answers: dict[Target, dict[_Site, list[float]]] = field(
        default_factory=lambda: {Target.ANY: {}, Target.TTFET: {}}
    )
    tried: dict[tuple[_Site, int], list[tuple[float, Row]]] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)

    def mean(self, target: Target, site: _Site) -> float | None:
        """Mean goodput of the seeds so far; None before the first."""
        found = self.answers[target].get(site)
        return sum(found) / len(found) if found else None

    def keep(self, cells: Sequence[Cell], rows: Sequence[Row]) -> None:
        """Rows that have come, of these cells."""
        self.rows.update((row["key"], row) for row in rows)
        for cell in cells:
            row = self.rows.get(cell.key)
            rate = cell.workload.rate_per_s
            if row is not None and not failed(row) and rate is not None:
                tried = self.tried.setdefault((_site(cell), cell.workload.seed), [])
                tried.append((rate, row))


def run_plan(
    plan: Plan, run: Callable[[list[Cell], str], Sequence[Row]]
) -> tuple[list[Row], list[str]]:
    """Run all stages.

    Args:
        plan: what.
        run: runs cells of a stage that is named, and returns their rows; a row may say that it
            failed, and rows may be missing when it was interrupted.

    Returns:
        All rows; and for each search without an answer, why.

    Raises:
        LabError: a cluster cannot hold a mean conversation of a workload.
    """
    known = _Known()
    errors: list[str] = []
    guesses = _Guesses()

    def staged(stage: str) -> Callable[[list[Cell]], Sequence[Row]]:
        def run_and_keep(cells: list[Cell]) -> Sequence[Row]:
            rows = run(cells, stage)
            known.keep(cells, rows)
            return rows

        return run_and_keep

    for seed in range(plan.seeds):
        cells = plan.cells(seed)
        for target, name in ((Target.ANY, "Gany"), (Target.TTFET, "Gf")):
            searches = [_begin(cell, target, known, guesses, plan.tolerance) for cell in cells]
            drive(cells, searches, staged(f"searching {name}, seed {seed + 1} of {plan.seeds}"))
            for cell, one in zip(cells, searches, strict=True):
                if one.rate_per_s is None:
                    errors.append(f"{name} of {_title(cell)}: {one.error}")
                else:
                    known.answers[target].setdefault(_site(cell), []).append(one.rate_per_s)
    staged("all at equal loads")(_at_equal_loads(plan, known))
    return list(known.rows.values()), errors


class _Guesses:
    """What each contender can carry by arithmetic."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, WorkloadSpec], ClusterCapacity] = {}

    def of(self, cell: Cell) -> tuple[float, float]:
        """Of the contender, and of the best mode."""
        name, workload, _ = _site(cell)
        found = self._known.get((name, workload))
        if found is None:
            found = self._known[name, workload] = cluster_capacity(
                cell.cluster,
                replace(workload, conversations=_SAMPLE),
                mixed_slowdown=cell.mixed_slowdown,
                link=cell.link,
            )
        best = max(found.hosting_per_s, found.valve_per_s)
        policy, mode = cell.contender.policy, cell.contender.tier_mode
        if policy.startswith("collocated") or mode == "hosting":
            return found.hosting_per_s, best
        if policy == "conserve" and found.dedicated_per_s:
            return found.dedicated_per_s, best
        return best, best


def _begin(
    cell: Cell, target: Target, known: _Known, guesses: _Guesses, tolerance: float
) -> GoodputSearch:
    carried, best = guesses.of(cell)
    guess = _GUESS * carried
    floor, ceiling = _FLOOR * guess, _CEILING * best
    before = known.mean(target, _site(cell))
    start = guess if before is None else before
    one = GoodputSearch(
        target=target,
        start_per_s=min(max(start, floor), ceiling),
        tolerance=tolerance,
        step=_FIRST_STEP if before is None else _LATER_STEP,
        floor_per_s=floor,
        ceiling_per_s=ceiling,
    )
    for rate, row in known.tried.get((_site(cell), cell.workload.seed), ()):
        one.know(rate, row)
    return one


def _at_equal_loads(plan: Plan, known: _Known) -> list[Cell]:
    best: dict[tuple[str, WorkloadSpec], float] = {}
    for target in (Target.TTFET, Target.ANY):  # Gf stands in where nobody meets every SLO
        most: dict[tuple[str, WorkloadSpec], float] = {}
        for cell in plan.cells(0):
            carried = known.mean(target, _site(cell)) or 0.0
            if carried and cell.contender.policy not in BOUNDS:
                here = _site(cell)[:2]
                most[here] = max(carried, most.get(here, 0.0))
        best |= most
    return [
        at_rate(cell, float(f"{share * best[here]:.3g}"))
        for seed in range(plan.seeds)
        for cell in plan.cells(seed)
        if (here := _site(cell)[:2]) in best
        for share in plan.shares
    ]


def _site(cell: Cell) -> _Site:
    workload = replace(cell.workload, seed=0, rate_per_s=1.0)
    return cell.cluster.name, workload, cell.contender.label


def _title(cell: Cell) -> str:
    return (
        f"{cell.contender.label} on {cell.cluster.name}, {cell.workload.source}, "
        f"seed {cell.workload.seed}"
    )
