"""What is to arrive, as plain values: of which trace, cut how, how many, at which times.

The conversations themselves, drawn by seed: ``pool.py``. ``docs/workloads.md`` is for people.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from conserve_serving.lab.arrivals import Bursts
from conserve_serving.lab.cuts import Answers, Split
from conserve_serving.lab.errors import WorkloadError
from conserve_serving.replay.traces import TraceFormat

__all__ = ["Answers", "Arrivals", "SharedPrefix", "Split", "WorkloadSpec"]


class Arrivals(enum.StrEnum):
    """When conversations arrive; see :mod:`conserve_serving.lab.arrivals`."""

    POISSON = "poisson"
    BURSTY = "bursty"
    RECORDED = "recorded"


class SharedPrefix(enum.StrEnum):
    """``cold``: conversations share nothing; ``warm``: they begin with the trace's prefixes.

    An engine that has computed a prefix once finds it cached for the conversations that share it.
    """

    COLD = "cold"
    WARM = "warm"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """A workload, as plain values (JSON-able; equal specs give equal workloads).

    Attributes:
        source: ``generated:NAME``, or the path of a trace.
        trace_format: how the trace is written; None: told by its content.
        pool_size: the trace's first conversations only, sub-agents included; how many a generator
            makes. None: the whole trace, ``pool.GENERATED_POOL``.
        split: which half of the pool.
        max_turns, max_context_tokens, max_gap_s, scale: caps as those of ``conserve replay``
            (:class:`conserve_serving.replay.workload.Caps`); None: none.
        until_reset: conversations end before their first reset
            (:func:`conserve_serving.lab.cuts.is_reset`).
        answers: see :class:`conserve_serving.lab.cuts.Answers`.
        conversations: how many arrive; the sub-agents of those that have some come on top. None:
            as many as the pool has.
        arrivals: see :class:`Arrivals`.
        rate_per_s: mean arrivals per second; None: as recorded.
        burst_factor, burst_share, burst_conversations: of ``bursty`` arrivals; see
            :class:`~conserve_serving.lab.arrivals.Bursts`.
        seed: names the draw and the pattern of arrivals.
        shared_prefix: see :class:`SharedPrefix`.

    Raises:
        WorkloadError: a value is out of range, or two contradict each other.
    """

    source: str
    trace_format: TraceFormat | None = None
    pool_size: int | None = None
    split: Split = Split.ALL
    max_turns: int | None = None
    max_context_tokens: int | None = None
    max_gap_s: float | None = None
    scale: float | None = None
    until_reset: bool = False
    answers: Answers = Answers.RETURNED
    conversations: int | None = None
    arrivals: Arrivals = Arrivals.POISSON
    rate_per_s: float | None = 1.0
    burst_factor: float = 4.0
    burst_share: float = 0.1
    burst_conversations: float = 50.0
    seed: int = 0
    shared_prefix: SharedPrefix = SharedPrefix.COLD

    def __post_init__(self) -> None:
        for name, kind in _ENUMS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _member(name, kind, value))
        for name in ("pool_size", "max_turns", "max_context_tokens", "conversations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise WorkloadError(f"{name} is {value}: give 1 or more, or leave it out.")
        for name in ("scale", "rate_per_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise WorkloadError(f"{name} is {value}: give a number above 0, or leave it out.")
        if self.max_gap_s is not None and not self.max_gap_s >= 0:
            raise WorkloadError(
                f"max_gap_s is {self.max_gap_s}: give 0 or more seconds, or leave it out."
            )
        if self.rate_per_s is None and self.arrivals is not Arrivals.RECORDED:
            raise WorkloadError(
                f"rate_per_s is not given, and arrivals are {self.arrivals.value!r}. Give "
                "conversations per second, or use arrivals 'recorded'."
            )
        if self.arrivals is Arrivals.BURSTY:
            self.bursts  # noqa: B018 - raises what is wrong with them

    @property
    def bursts(self) -> Bursts:
        """The shape of bursty arrivals."""
        return Bursts(
            factor=self.burst_factor,
            share=self.burst_share,
            conversations=self.burst_conversations,
        )

    @property
    def pool_key(self) -> WorkloadSpec:
        """What the pool depends on, the rest at its defaults: equal keys share a pool."""
        return WorkloadSpec(
            source=self.source,
            trace_format=self.trace_format,
            pool_size=self.pool_size,
            split=self.split,
            max_turns=self.max_turns,
            max_context_tokens=self.max_context_tokens,
            max_gap_s=self.max_gap_s,
            scale=self.scale,
            until_reset=self.until_reset,
            answers=self.answers,
        )


_ENUMS: Final[dict[str, type[enum.StrEnum]]] = {
    "trace_format": TraceFormat,
    "split": Split,
    "answers": Answers,
    "arrivals": Arrivals,
    "shared_prefix": SharedPrefix,
}


def _member(name: str, kind: type[enum.StrEnum], value: str) -> enum.StrEnum:
    try:
        return kind(value)
    except ValueError:
        raise WorkloadError(f"{name} is {value!r}: give one of {', '.join(kind)}.") from None
