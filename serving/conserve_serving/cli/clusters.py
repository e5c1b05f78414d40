"""`conserve clusters`: the clusters there are to simulate, and what one can carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from conserve_serving.cli.lab_options import find_cluster, lab_errors
from conserve_serving.cli.params import FiniteRange
from conserve_serving.cli.render import quantity
from conserve_serving.cli.workload import cap_options
from conserve_serving.engines.profile import load_profile
from conserve_serving.lab.advantage import advantage
from conserve_serving.lab.boards import board_of, find_link, list_links
from conserve_serving.lab.capacity import ClusterCapacity, cluster_capacity
from conserve_serving.lab.cluster_spec import ClusterSpec
from conserve_serving.lab.clusters import cluster, list_clusters, read_clusters
from conserve_serving.lab.workloads import WorkloadSpec
from conserve_serving.replay.report import format_number


@click.command()
@click.argument("name", required=False)
@click.option(
    "--clusters-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Clusters of your own (docs/clusters.md).",
)
@click.option("--trace", "source", help="With NAME: what it can carry of a file or generated:NAME.")
@cap_options
@click.option(
    "--interference",
    "mixed_slowdown",
    type=FiniteRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="With --trace: time of a step that prefills and decodes over the sum of the two.",
)
@click.option("--link", help="With --trace: name of a link instead of the cluster's.")
def clusters(
    *,
    name: str | None,
    clusters_file: Path | None,
    source: str | None,
    mixed_slowdown: float,
    link: str | None,
    **caps: Any,
) -> None:
    """List clusters and links; with NAME, one cluster's engines, rents and advantages.

    With --trace, also what it can carry of that workload, by arithmetic: an upper bound, without
    queues or latency targets.
    """
    console = Console()
    with lab_errors():
        if name is None:
            own = [] if clusters_file is None else list(read_clusters(clusters_file).values())
            console.print(_listed([*own, *(cluster(known) for known in list_clusters())]))
            console.print()
            console.print(_links())
            return
        spec = find_cluster(name, clusters_file)
        console.print(Text(f"{spec.name}: {spec.title}", "bold"), soft_wrap=True)
        console.print()
        console.print(_engines(spec))
        console.print()
        console.print(_rents(spec), soft_wrap=True)
        if source is not None:
            workload = WorkloadSpec(source=source, **caps)
            found = cluster_capacity(spec, workload, mixed_slowdown=mixed_slowdown, link=link)
            console.print()
            console.print(_carried(found))
            console.print(_verdict(found))


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return table


def _listed(specs: list[ClusterSpec]) -> RenderableType:
    table = _table("cluster", "", "boards", "USD/h", "rated W", left=2)
    for spec in specs:
        usd, watts = f"{spec.dollars_per_hour:.2f}", f"{spec.rated_w:,.0f}"
        table.add_row(Text(spec.name, "bold"), spec.title, str(spec.boards), usd, watts)
    return table


def _links() -> RenderableType:
    table = _table("link", "", "set-up ms", "GB/s", "confidence", left=2)
    for name in list_links():
        link = find_link(name)
        speed = f"{link.bytes_per_s / 1e9:g}"
        table.add_row(
            Text(name, "bold"), link.title, f"{link.setup_ms:g}", speed, link.confidence.value
        )
    return table


def _engines(spec: ClusterSpec) -> RenderableType:
    strongest = spec.groups[0].hardware()
    table = _table("tier", "engines", "KV tokens", "prefill", "decode", "KV read", left=2)
    for group in spec.groups:
        hardware = group.hardware()
        slower = advantage(hardware, strongest)
        table.add_row(
            group.tier.value,
            f"{group.count} × {hardware.name}",
            quantity(hardware.kv_capacity_tokens),
            *(f"{value:.1f}×" for value in (slower.prefill, slower.decode_alone, slower.kv_read)),
        )
    note = Text(f"×: time over that of {strongest.name}; prefill of 8,192 tokens, ", "dim")
    note.append("a decode step alone, its growth per KV token read")
    return Group(table, note)


def _rents(spec: ClusterSpec) -> RenderableType:
    text = Text()
    low, high = spec.dollars_between()
    text.append(f"{spec.dollars_per_hour:.2f} USD/h ({low:.2f} to {high:.2f}), ")
    text.append(f"{spec.rated_w:,.0f} W rated, {spec.rated_with_host_w:,.0f} W with hosts")
    own = dict(spec.usd_per_hour)
    for gpu in dict.fromkeys(load_profile(group.profile).gpu for group in spec.groups):
        price = board_of(gpu).price
        if gpu in own:
            text.append(f"\n  {gpu}: {own[gpu]:.2f} USD/h, your own figure", "dim")
        else:
            source = f"{price.date}, {price.source}"
            text.append(f"\n  {gpu}: {price.usd_per_hour:.2f} USD/h, {source}", "dim")
    return text


def _carried(found: ClusterCapacity) -> RenderableType:
    table = _table("can carry, conversations/s", "")
    rows = [
        ("dedicated tiers", format_number(found.dedicated_per_s)),
        ("  first prompts, prefill tier", format_number(found.prefill_per_s)),
        ("  later prompts and decode, decode tier", format_number(found.decode_per_s)),
        ("  hand-offs, link", format_number(found.link_per_s)),
        ("  with decoders prefilling the rest", format_number(found.valve_per_s)),
        ("hosting everywhere", format_number(found.hosting_per_s)),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _verdict(found: ClusterCapacity) -> str:
    better = "dedicated tiers" if found.dedicate else "hosting everywhere"
    return f"dedicated tiers are limited by {found.bottleneck}; better, by this sum: {better}"
