"""What `conserve reproduce` runs: the paper's testbed, and what its claims hang on, as cells.

Two sizes. *Steady*: loads below what the cluster carries, 1,000 conversations and more, the first
tenth not counted. *Transient*: the paper's own 255 conversations, all counted, at the paper's
loads, most of which are more than the cluster can carry for long: every figure there depends on how
many conversations are sent, so it is compared with the paper's and nothing else. What is swept
beside the load (interference, link, ratio of the tiers, prediction, power, unlike GPUs) is of the
second size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from conserve_serving.lab.capacity import cluster_capacity
from conserve_serving.lab.cell import Cell
from conserve_serving.lab.cluster_spec import ClusterSpec
from conserve_serving.lab.clusters import cluster
from conserve_serving.lab.contenders import contender
from conserve_serving.lab.grid import Grid
from conserve_serving.lab.workloads import WorkloadSpec

#: The paper's arrivals, in conversations per second, and how many it sends.
PAPER_RATES_PER_S: Final = (0.5, 0.75, 1.0, 1.25, 1.5, 1.634)
PAPER_CONVERSATIONS: Final = 255
#: What the paper caps conversations at.
PAPER_MAX_TURNS: Final = 5

#: Loads of the steady study, as shares of what the cluster can carry when every engine hosts
#: (`lab.capacity`): the last of them is about where queues begin to grow without end.
STEADY_SHARES: Final = (0.4, 0.6, 0.8, 0.92)

#: The paper's own policy, ours, and the strongest of those they have to beat.
MAIN: Final = (
    "conserve",
    "conserve_plus",
    "collocated",
    "collocated_override",
    "per_turn-perfect",
    "per_turn-10-wrong",
    "per_turn-greedy-10-wrong",
    "full_disaggregation",
)
#: Run at one load only.
OTHERS: Final = (
    "conserve_plus-dedicated",
    "conserve_plus-hosting",
    "per_turn-realistic",
    "per_turn-biased",
    "per_turn-5-wrong",
    "per_turn-50-wrong",
    "per_turn-greedy",
    "ppd",
    "deflection",
    "least_loaded",
    "round_robin",
    "oracle",
)
#: Those whose answer to a changed assumption is asked for.
FEW: Final = (
    "conserve",
    "conserve_plus",
    "collocated",
    "per_turn-10-wrong",
    "per_turn-greedy-10-wrong",
)
#: On unlike GPUs everybody places by each engine's own speed.
TIERED: Final = (
    "conserve",
    "conserve_plus",
    "collocated_speed",
    "collocated_speed_override",
    "per_turn-10-wrong",
)
#: Clusters of unlike tiers that `reproduce` looks at, with equal ones for comparison; the whole
#: table is `tiers`' (`lab.tiers`).
TIER_CLUSTERS: Final = ("h100-3a100", "h100-3a100-kv80", "4h100", "2h100", "4a100")
INTERFERENCE: Final = (1.25, 1.5)
LINKS: Final = ("ib_ndr400", "pcie_host_bounce", "tcp_25g")


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Cells that answer one question."""

    name: str
    about: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is run.

    Attributes:
        seeds: runs of each point; intervals are over them.
        conversations: of each run of the steady study.
        transient_conversations: of each other run.
    """

    seeds: int = 12
    conversations: int = 1000
    transient_conversations: int = PAPER_CONVERSATIONS


def studies(
    workload: WorkloadSpec,
    size: Size,
    *,
    rates_per_s: Sequence[float] | None = None,
    only: Iterable[str] | None = None,
) -> list[Study]:
    """The studies, in order of importance.

    Args:
        workload: what arrives; its rate, seed and number of conversations are replaced.
        size: how much of it.
        rates_per_s: loads of the transient studies. None: the paper's, where the workload is capped
            as the paper's is; else shares of what the cluster can carry.
        only: names of studies; None: all.

    Raises:
        LabError: the workload cannot be used on these clusters.
    """
    paper = cluster("paper")
    steady = steady_rates(paper, workload)
    if rates_per_s is None:
        as_paper = workload.max_turns == PAPER_MAX_TURNS
        rates_per_s = PAPER_RATES_PER_S if as_paper else (*steady, _round(steady[-1] * 1.5))
    top = rates_per_s[-1]
    middle = rates_per_s[len(rates_per_s) // 2]
    long = replace(workload, conversations=size.conversations)
    short = replace(workload, conversations=size.transient_conversations)

    def grid(
        labels: Sequence[str],
        rates: Sequence[float],
        *,
        clusters: Sequence[ClusterSpec] = (paper,),
        mixed_slowdowns: Sequence[float] = (1.0,),
        links: Sequence[str | None] = (None,),
        reference: ClusterSpec | None = None,
        spec: WorkloadSpec = short,
        warmup_share: float = 0.0,
    ) -> tuple[Cell, ...]:
        made = Grid(
            clusters=clusters,
            contenders=[contender(label) for label in labels],
            workload=spec,
            rates_per_s=rates,
            seeds=range(size.seeds),
            mixed_slowdowns=mixed_slowdowns,
            links=links,
            reference=reference,
            warmup_share=warmup_share,
        )
        return tuple(made.cells())

    capped = [cluster("paper-capped"), cluster("paper-capped-free")]
    ratio = [paper.with_ratio(2, 2)]
    tiers = [cluster(name) for name in TIER_CLUSTERS]
    slowest = min(steady_rates(one, workload)[-1] for one in tiers)
    found = [
        Study(
            name="transient",
            about="as the paper sends them",
            cells=grid(MAIN, rates_per_s),
        ),
        Study(
            name="steady",
            about="loads that the cluster carries",
            cells=grid(MAIN, steady, spec=long, warmup_share=0.1),
        ),
        Study(
            name="interference",
            about="prefill slows the decodes beside it",
            cells=grid(FEW, sorted({middle, top}), mixed_slowdowns=INTERFERENCE),
        ),
        Study(
            name="capped",
            about="the paper's unlike tiers: decoders limited to 200 W",
            cells=grid(FEW, sorted({middle, top}), clusters=capped),
        ),
        Study(
            name="tiers",
            about="unlike GPUs, Qwen3-8B",
            cells=grid(
                TIERED,
                (_round(0.5 * slowest), _round(slowest)),
                clusters=tiers,
                mixed_slowdowns=(1.25,),
                reference=cluster("4h100"),
            ),
        ),
        Study(
            name="policies",
            about="all other policies, and what predictions are worth",
            cells=grid(OTHERS, (top,)),
        ),
        Study(
            name="links",
            about="slower links",
            cells=grid(("conserve", "conserve_plus", "per_turn-10-wrong"), (top,), links=LINKS),
        ),
        Study(
            name="ratio",
            about="two prefillers and two decoders",
            cells=grid(FEW, (top,), clusters=ratio),
        ),
    ]
    return found if only is None else [one for one in found if one.name in set(only)]


def steady_rates(at: ClusterSpec, workload: WorkloadSpec) -> tuple[float, ...]:
    """Loads of the steady study on a cluster, in conversations per second."""
    carried = cluster_capacity(at, replace(workload, conversations=2000)).hosting_per_s
    return tuple(_round(share * carried) for share in STEADY_SHARES)


def _round(rate_per_s: float) -> float:
    """Two significant digits: a rate that people can say."""
    return float(f"{rate_per_s:.2g}")
