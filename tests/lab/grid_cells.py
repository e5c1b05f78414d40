"""Cells for the tests of the grid."""

from __future__ import annotations

from collections.abc import Iterable

from conserve_serving.lab.cell import Cell
from conserve_serving.lab.clusters import cluster
from conserve_serving.lab.contenders import contender
from conserve_serving.lab.grid import Grid
from conserve_serving.lab.workloads import WorkloadSpec


def cells(
    seeds: Iterable[int] = range(3),
    rates: Iterable[float] = (1.0,),
    contenders: Iterable[str] = ("conserve",),
) -> list[Cell]:
    return Grid(
        clusters=[cluster("paper")],
        contenders=[contender(name) for name in contenders],
        workload=WorkloadSpec(source="generated:swebench", conversations=4, pool_size=4),
        rates_per_s=tuple(rates),
        seeds=tuple(seeds),
    ).cells()
