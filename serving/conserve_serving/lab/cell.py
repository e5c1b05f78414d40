"""A cell: one contender, one workload, one cluster, one run. Plain data in, plain data out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Final

import msgspec

from conserve_serving.core.counters import Counters
from conserve_serving.core.policies import make_policy
from conserve_serving.core.scheduler import Scheduler
from conserve_serving.core.types import Tier
from conserve_serving.engines.power import reprice
from conserve_serving.engines.profile import HardwareProfile
from conserve_serving.lab.cluster_spec import ClusterSpec
from conserve_serving.lab.contenders import Contender
from conserve_serving.lab.errors import LabError
from conserve_serving.lab.metrics import RunMeter
from conserve_serving.lab.pool import Pool
from conserve_serving.lab.predictors import foretell
from conserve_serving.lab.workloads import Split, WorkloadSpec
from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.replay.ideal import IdealCluster, IdealLatency, ProfileCosts
from conserve_serving.simulator import (
    RunSummary,
    SimulatedConversation,
    SimulatedEngine,
    SimulatedTurn,
    VirtualCluster,
)
from conserve_serving.simulator.cluster import Observer

#: Folders that no figure depends on.
_OTHER_CODE: Final = frozenset({"__pycache__", "emulated", "report", "sglang", "templates"})
#: Written into every row; raised when a figure's meaning changes.
FORMAT: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What determines a run, and nothing else: equal cells give equal figures.

    Attributes:
        cluster: the hardware.
        contender: who schedules.
        workload: what arrives; rate and seed are in it. Without ``max_context_tokens`` of its own
            it is cut to what each engine can hold.
        mixed_slowdown: time of a step that prefills and decodes over the sum of the two.
        link: name of a link instead of the cluster's.
        reference: whose idle latency normalises; None: this cluster's.
        warmup_share: of the conversations, the first to arrive, that no latency counts.
        share_of_capacity: what the rate is of the contender's own capacity, where it was chosen
            so; a note for reports.
    """

    cluster: ClusterSpec
    contender: Contender
    workload: WorkloadSpec
    mixed_slowdown: float = 1.0
    link: str | None = None
    reference: ClusterSpec | None = None
    warmup_share: float = 0.1
    share_of_capacity: float | None = None

    def __post_init__(self) -> None:
        """Refuse impossible figures, naming the field."""
        if not self.mixed_slowdown > 0:
            raise LabError(f"mixed_slowdown is {self.mixed_slowdown}: 1.0 means none.")
        if not 0 <= self.warmup_share < 1:
            raise LabError(f"warmup_share is {self.warmup_share}: give 0 to below 1.")

    @property
    def key(self) -> str:
        """Names the cell: a hash of its JSON with sorted keys."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:20]

    @property
    def drawn(self) -> WorkloadSpec:
        """The workload as it is drawn: cut to what every engine can hold, where it says nothing."""
        spec = self.workload
        if spec.max_context_tokens is not None:
            return spec
        return replace(spec, max_context_tokens=self.cluster.longest_context_tokens)

    def to_json(self) -> dict[str, Any]:
        """Plain data; :func:`cell_from_json` reads it back."""
        data: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return data


def cell_from_json(data: Any) -> Cell:
    """The cell that ``Cell.to_json`` described.

    Raises:
        LabError: it does not describe one.
    """
    try:
        return msgspec.convert(data, Cell)
    except msgspec.ValidationError as error:
        raise LabError(f"this is no cell: {error}") from error


@cache
def code_hash() -> str:
    """Names the code that figures depend on: scheduler, engines, simulator, workloads, figures."""
    root = resources.files("conserve_serving")
    digest = hashlib.sha256()
    for package in ("core", "engines", "lab", "replay", "simulator"):
        for name, data in sorted(_sources(root / package, package)):
            digest.update(name.encode() + b"\0" + data)
    return digest.hexdigest()[:12]


def _sources(folder: Traversable, name: str) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        path = f"{name}/{entry.name}"
        if entry.is_dir():
            if entry.name not in _OTHER_CODE:
                yield from _sources(entry, path)
        elif entry.name.endswith((".py", ".json", ".toml")):
            yield path, entry.read_bytes()


def run_cell(
    cell: Cell,
    *,
    on_progress: Callable[[int], None] | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Run one cell.

    No turn arrives with a limit on its output: the trace's true length, which a replay sends as
    one, would tell the scheduler what only an oracle knows.

    Args:
        cell: what to run.
        on_progress: told how many turns are done, from time to time.
        observer: told of each event and what was decided.

    Returns:
        The figures as plain JSON data, in the form that ``docs/laboratory.md`` describes.

    Raises:
        LabError: policy, workload or cluster cannot be used as asked.
        SimulationError: the run stopped making progress, or its books do not add up.
    """
    started_s = time.perf_counter()
    contender = cell.contender
    contender.check_policy()
    engines = cell.cluster.engines(mixed_slowdown=cell.mixed_slowdown, link=cell.link)
    spec = cell.drawn
    pool = Pool.load(spec)
    ideals = _Ideals(cell, engines)
    meter = RunMeter()

    def expected() -> Iterator[SimulatedConversation]:
        for conversation in pool.stream(spec):
            ideal = ideals.of(pool.conversation(conversation.id).id, conversation.turns)
            meter.expect(conversation.id, len(conversation.turns), ideal)
            yield conversation

    settings = contender.scheduler_settings()
    cluster = VirtualCluster(
        Scheduler(settings, make_policy(contender.policy, settings)),
        engines,
        on_turn=meter.on_turn,
        on_progress=on_progress,
        observer=observer,
        output_limits=False,
    )
    training: tuple[Conversation, ...] = ()
    if contender.predictor == "realistic":
        training = Pool.load(training_half(spec)).conversations
    cluster.feed(foretell(expected(), contender.predictor, training=training, seed=spec.seed))
    summary = cluster.run()
    row: dict[str, Any] = {
        "format": FORMAT,
        "code": code_hash(),
        "key": cell.key,
        "cell": cell.to_json(),
        "workload": {
            "name": pool.name,
            "pool": len(pool.conversations),
            "max_context_tokens": spec.max_context_tokens,
            "cut_by_context": pool.workload.cut_by_context,
            "dropped_by_context": pool.workload.dropped_by_context,
        },
        "virtual_s": summary.virtual_s,
    }
    row |= meter.figures(warmup_share=cell.warmup_share)
    row |= _energy(summary, row["tokens"], cell)
    row |= _counts(cluster.scheduler.counters)
    row |= _engines(summary)
    row["wall_s"] = time.perf_counter() - started_s
    return row


def training_half(spec: WorkloadSpec) -> WorkloadSpec:
    """What the realistic predictor has seen, whichever half the workload is."""
    return replace(spec, split=Split.TUNE)


class _Ideals:
    """Ideal latencies by conversation of the pool, computed when one is first drawn.

    Anything of the reference cluster may hold the conversation, and its prefill tier may prefill
    turn 1: the limit is the hardware's, not a policy's. Prompts shared with other conversations
    are cold: alone, nobody has computed them before.
    """

    def __init__(self, cell: Cell, engines: list[SimulatedEngine]) -> None:
        if cell.reference is not None:
            engines = cell.reference.engines()
        self._cluster = IdealCluster(
            hosts=_costs(engine.profile for engine in engines),
            prefillers=_costs(e.profile for e in engines if e.tier is Tier.PREFILL),
        )
        self._known: dict[str, IdealLatency] = {}

    def of(self, name: str, turns: tuple[SimulatedTurn, ...]) -> IdealLatency:
        """Of the conversation of that name in the pool."""
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = self._cluster.latency(
                Conversation(
                    id=name,
                    turns=tuple(
                        Turn(
                            input_tokens=turn.prompt_tokens,
                            new_input_tokens=turn.new_tokens,
                            output_tokens=turn.output_tokens,
                            gap_s=turn.gap_s,
                        )
                        for turn in turns
                    ),
                )
            )
        return known


def _costs(profiles: Iterable[HardwareProfile]) -> list[ProfileCosts]:
    """Of each kind once; kinds are told by all their figures, since a limit keeps the name."""
    kinds: list[HardwareProfile] = []
    for profile in profiles:
        if profile not in kinds:
            kinds.append(profile)
    return [ProfileCosts(kind) for kind in kinds]


# --- figures of the cluster -----------------------------------------------------------------------


def _energy(summary: RunSummary, tokens: dict[str, int], cell: Cell) -> dict[str, Any]:
    """Joules by state, and tokens per joule at each level of the power models.

    Tokens are those served: prompts, cached tokens included, and outputs.
    """
    parts = ("idle_j", "prefill_j", "decode_j", "mixed_j")
    energy = {
        part: sum(getattr(use.energy, part) for use in summary.engines.values()) for part in parts
    }
    served = tokens["prompt"] + tokens["output"]
    total_j = sum(energy.values())
    out: dict[str, Any] = {"energy": {"total_j": total_j, **energy}}
    out["tokens_per_j"] = served / total_j if total_j else None
    out["new_tokens_per_j"] = (tokens["new"] + tokens["output"]) / total_j if total_j else None
    for level in ("low", "high"):
        level_j = sum(
            reprice(summary.engines[engine.id].seconds, engine.profile.power).total_j
            for engine in cell.cluster.engines(power=level)
        )
        out["energy"][f"total_{level}_j"] = level_j
        # A low power model draws little: its tokens per joule are the most.
        out[f"tokens_per_j_{level}"] = served / level_j if level_j else None
    return out


def _counts(counters: Counters) -> dict[str, Any]:
    """What the scheduler counted, by reason."""
    return {
        name: {str(reason): n for reason, n in sorted(getattr(counters, name).items())}
        for name in ("transfers", "moves", "placements", "holds", "rejections", "releases")
    } | {"parks": counters.parks, "parked_tokens": counters.parked_tokens}


def _engines(summary: RunSummary) -> dict[str, Any]:
    """What each engine did, as shares of the run, and what left its memory for want of room."""
    whole_s = summary.virtual_s or 1.0
    engines = {
        engine_id: {
            "tier": str(use.tier),
            "profile": use.profile,
            "busy": use.seconds.busy_s / whole_s,
            "prefill": use.seconds.prefill_s / whole_s,
            "decode": sum(use.seconds.decode_s.values()) / whole_s,
            "mixed": use.seconds.mixed_s / whole_s,
            "idle": use.seconds.idle_s / whole_s,
            "egress": use.egress_busy_s / whole_s,
            "ingress": use.ingress_busy_s / whole_s,
            "prefill_tokens": use.prefill_tokens,
            "decode_tokens": use.decode_tokens,
            "evicted_tokens": use.evicted_tokens,
            "dropped_tokens": use.dropped_tokens,
            "energy_j": use.energy.total_j,
        }
        for engine_id, use in summary.engines.items()
    }
    uses = summary.engines.values()
    return {
        "engines": engines,
        "evicted_tokens": sum(use.evicted_tokens for use in uses),
        "dropped_tokens": sum(use.dropped_tokens for use in uses),
        "retractions": sum(use.retractions for use in uses),
        "refusals": summary.refusals,
    }
