"""What the parts of each cluster can carry of its workload, for the rows of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Final

from conserve_serving.engines.errors import ProfileError
from conserve_serving.lab.capacity import ClusterCapacity, capacity
from conserve_serving.lab.cell import cell_from_json
from conserve_serving.lab.demand import Demand
from conserve_serving.lab.errors import LabError
from conserve_serving.lab.pool import Pool
from conserve_serving.lab.report.rows import Rows
from conserve_serving.lab.workloads import Arrivals
from conserve_serving.replay.errors import ReplayError

#: Conversations in the sample that stands for a workload.
SAMPLE: Final = 500

#: By cluster and workload, as the rows name them.
Capacities = Mapping[tuple[str, str], ClusterCapacity]


def carried(rows: Rows) -> tuple[Capacities, dict[str, str]]:
    """By arithmetic, at each place's main setting.

    Args:
        rows: whose cells say what was run.

    Returns:
        Capacities; and the places without one, with the reason: the trace is not here, the cluster
        is not one of this version.
    """
    found: dict[tuple[str, str], ClusterCapacity] = {}
    missing: dict[str, str] = {}
    for place in rows.main_places():
        raw = next(row.raw for row in rows.all if row.place == place)
        try:
            cell = cell_from_json(raw["cell"])
            spec = cell.workload
            if spec.max_context_tokens is None:  # cut to what the engines hold: the row says where
                cut = (raw.get("workload") or {}).get("max_context_tokens")
                spec = replace(spec, max_context_tokens=cut)
            if spec.arrivals is not Arrivals.RECORDED:  # those are as many as the trace has
                spec = replace(spec, conversations=SAMPLE)
            demand = Demand.of(islice(Pool.load(spec).stream(spec), SAMPLE))
            engines = cell.cluster.engines(mixed_slowdown=cell.mixed_slowdown, link=cell.link)
            found[place.cluster, place.workload] = capacity(engines, demand)
        except (LabError, ReplayError, ProfileError, OSError) as error:
            missing[place.title] = str(error)
    return found, missing
