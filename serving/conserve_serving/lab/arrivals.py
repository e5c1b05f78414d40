"""When conversations arrive: Poisson, in bursts, or as recorded.

Every process is made at a mean of one arrival per second and then stretched by the rate, so that
equal seeds give the same pattern at every rate (runs at different rates are paired), and the first
arrival is at 0.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from conserve_serving.lab.errors import WorkloadError


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursts:
    """A two-state Markov-modulated Poisson process: calm, and bursts of more arrivals.

    Attributes:
        factor: rate within a burst over the mean rate.
        share: share of time within bursts.
        conversations: mean number of arrivals in a burst. A burst's length is counted in arrivals,
            not in seconds, so that the pattern is the same at every rate.

    Raises:
        WorkloadError: no process has these properties.
    """

    factor: float = 4.0
    share: float = 0.1
    conversations: float = 50.0

    def __post_init__(self) -> None:
        if not self.factor >= 1.0:
            raise WorkloadError(
                f"burst_factor is {self.factor:g}: give 1 or more, bursts have more arrivals than "
                "the mean."
            )
        if not 0.0 < self.share < 1.0:
            raise WorkloadError(
                f"burst_share is {self.share:g}: give a share of time between 0 and 1."
            )
        if self.factor * self.share > 1.0:
            raise WorkloadError(
                f"burst_factor {self.factor:g} for a burst_share of {self.share:g} of the time is "
                f"more than all arrivals. Give a burst_factor of at most {1.0 / self.share:g}, or "
                "a smaller burst_share."
            )
        if not self.conversations > 0.0:
            raise WorkloadError(
                f"burst_conversations is {self.conversations:g}: give the mean number of arrivals "
                "in a burst, above 0."
            )

    @property
    def calm_factor(self) -> float:
        """Rate outside bursts over the mean rate: what is left for the mean to be exact."""
        return (1.0 - self.share * self.factor) / (1.0 - self.share)


def poisson(*, rate_per_s: float, seed: int) -> Iterator[float]:
    """Arrival times of a Poisson process, without end.

    The times are those of :func:`conserve_serving.replay.workload.poisson_arrivals`.

    Args:
        rate_per_s: mean arrivals per second.
        seed: names the pattern.
    """
    rng = random.Random(f"{seed}/arrivals")  # noqa: S311 - a workload, not a secret
    at = 0.0
    while True:
        yield at / rate_per_s
        at += rng.expovariate(1.0)


def bursty(*, rate_per_s: float, seed: int, bursts: Bursts) -> Iterator[float]:
    """Arrival times of a two-state Markov-modulated Poisson process, without end.

    The first state is drawn from the stationary distribution, so the mean rate holds from the
    start.

    Args:
        rate_per_s: mean arrivals per second, over both states.
        seed: names the pattern.
        bursts: how much, how often and how long.
    """
    rng = random.Random(f"{seed}/bursts")  # noqa: S311 - a workload, not a secret
    burst_s = bursts.conversations / bursts.factor
    calm_s = burst_s * (1.0 - bursts.share) / bursts.share
    in_burst = rng.random() < bursts.share
    now = 0.0
    first: float | None = None
    while True:
        until = now + rng.expovariate(1.0 / (burst_s if in_burst else calm_s))
        factor = bursts.factor if in_burst else bursts.calm_factor
        while factor > 0.0:
            now += rng.expovariate(factor)
            if now >= until:
                break
            if first is None:
                first = now
            yield (now - first) / rate_per_s
        # The time to the next arrival has no memory: it is drawn anew in the new state.
        now = until
        in_burst = not in_burst


def recorded(times_s: Sequence[float], *, rate_per_s: float | None) -> list[float]:
    """A trace's own arrival times, the first at 0.

    Args:
        times_s: in order.
        rate_per_s: stretched to this mean rate; None: as recorded.

    Raises:
        WorkloadError: a rate is asked for, and all conversations arrive at once.
    """
    start, span_s = times_s[0], times_s[-1] - times_s[0]
    stretch = 1.0
    if rate_per_s is not None and len(times_s) > 1:
        if span_s <= 0.0:
            raise WorkloadError(
                "arrivals are 'recorded', but the trace's conversations all arrive at once: no "
                "rate can be given them. Leave rate_per_s out, or use arrivals 'poisson'."
            )
        stretch = (len(times_s) - 1) / (rate_per_s * span_s)
    return [(at - start) * stretch for at in times_s]
