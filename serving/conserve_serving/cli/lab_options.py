"""Options that `conserve simulate` and `conserve compare` share, and what they amount to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from conserve_serving.cli.errors import EXIT_USAGE, CliError
from conserve_serving.cli.params import FiniteRange
from conserve_serving.cli.workload import cap_options
from conserve_serving.lab.cluster_spec import ClusterSpec
from conserve_serving.lab.clusters import cluster, list_clusters, read_clusters
from conserve_serving.lab.contenders import ABOUT, Contender, available, contender
from conserve_serving.lab.errors import LabError, RunError
from conserve_serving.lab.workloads import Arrivals, SharedPrefix, WorkloadSpec
from conserve_serving.simulator.errors import SimulationError

_Command = TypeVar("_Command", bound=Callable[..., object])
_AT_LEAST_ONE = click.IntRange(min=1)


class CommaList(click.ParamType[tuple[Any, ...]]):
    """Several values with commas between them; each is of the inner type."""

    def __init__(self, inner: click.ParamType[Any]) -> None:
        """Args: type of each."""
        self._inner = inner
        self.name = "number,…" if isinstance(inner, click.FloatRange) else "name,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if not isinstance(value, str):
            return tuple(value)
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not parts:
            self.fail("give at least one", param, ctx)
        return tuple(dict.fromkeys(self._inner.convert(part, param, ctx) for part in parts))


#: Positive numbers with commas between them.
RATES = CommaList(FiniteRange(min=0, min_open=True))


def lab_options(command: _Command) -> _Command:
    """Workload, hardware and what is counted; :class:`Setup` reads them."""
    options = (
        click.option(
            "--trace",
            "source",
            default="generated:swebench",
            show_default=True,
            help="A file, or generated:NAME; `conserve workload list` names those there are.",
        ),
        cap_options,
        click.option(
            "--conversations",
            type=_AT_LEAST_ONE,
            default=1000,
            show_default=True,
            help="How many arrive, drawn from the trace with replacement.",
        ),
        click.option(
            "--arrivals",
            type=click.Choice([str(name) for name in Arrivals]),
            default=str(Arrivals.POISSON),
            show_default=True,
            help="Pattern of arrivals.",
        ),
        click.option(
            "--shared-prefix",
            type=click.Choice([str(name) for name in SharedPrefix]),
            default=str(SharedPrefix.COLD),
            show_default=True,
            help="Whether conversations begin with the trace's common prefixes.",
        ),
        click.option(
            "--clusters-file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Clusters of your own (docs/clusters.md).",
        ),
        click.option(
            "--reference",
            metavar="CLUSTER",
            help="Whose idle latency normalises; each cluster's own if left out.",
        ),
        click.option(
            "--warmup",
            "warmup_share",
            type=FiniteRange(min=0, max=1, max_open=True),
            default=0.1,
            show_default=True,
            help="Share of the conversations, the first to arrive, that no latency counts.",
        ),
        click.option("--progress/--no-progress", default=True, help="Show a progress bar."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What the shared options amount to."""

    workload: WorkloadSpec
    reference: ClusterSpec | None
    warmup_share: float
    clusters_file: Path | None

    @classmethod
    def read(cls, options: dict[str, Any]) -> Setup:
        """Takes the shared options out of ``options``; what is left is the command's own.

        Raises:
            LabError: they cannot be used as they are.
        """
        file = options.pop("clusters_file")
        reference = options.pop("reference")
        warmup_share = options.pop("warmup_share")
        names = (
            "source", "trace_format", "pool_size", "split", "max_turns", "max_context_tokens",
            "max_gap_s", "scale", "until_reset", "answers", "conversations", "arrivals",
            "shared_prefix",
        )  # fmt: skip
        return cls(
            workload=WorkloadSpec(**{name: options.pop(name) for name in names}),
            reference=None if reference is None else find_cluster(reference, file),
            warmup_share=warmup_share,
            clusters_file=file,
        )

    def cluster(self, name: str) -> ClusterSpec:
        """A cluster of the file, or one that comes with the package.

        Raises:
            LabError: there is none of that name.
        """
        return find_cluster(name, self.clusters_file)


def find_cluster(name: str, file: Path | None) -> ClusterSpec:
    """A cluster of the file, or one that comes with the package.

    Raises:
        LabError: there is none of that name.
    """
    own = {} if file is None else read_clusters(file)
    if name in own:
        return own[name]
    if own and name not in list_clusters():
        raise LabError(
            f"no cluster {name!r}: {file} has {', '.join(own)}; the package has "
            f"{', '.join(list_clusters())}."
        )
    return cluster(name)


def find_contenders(names: tuple[str, ...]) -> list[Contender]:
    """Contenders by label, or ``all``.

    Raises:
        LabError: there is none of a name.
    """
    if names == ("all",):
        names = tuple(available())
    return [contender(name) for name in names]


def contender_help() -> str:
    """The table of contenders, for an epilog."""
    wide = max(map(len, available()))
    return "\n".join(f"{label:<{wide}}  {ABOUT[label]}" for label in available())


class _Unusable(click.ClickException):
    exit_code = EXIT_USAGE


@contextmanager
def lab_errors() -> Iterator[None]:
    """Errors of the laboratory as what the command line says.

    What cannot be used as asked has exit code 2, a run that failed has 1.
    """
    try:
        yield
    except RunError as error:
        raise click.ClickException(str(error)) from error
    except (LabError, OSError) as error:
        raise _Unusable(str(error)) from error
    except SimulationError as error:
        raise CliError(
            f"the run failed: {type(error).__name__}",
            remedy="This is a defect: report it with the command and the text above.",
            detail=str(error),
        ) from error
