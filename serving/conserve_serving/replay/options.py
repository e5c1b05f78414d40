"""How to replay, on which clock, and how far a run is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """The wall clock, and how to wait on it (both injected, so that tests run in no time)."""

    now: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def sleep_until(self, when: float) -> None:
        """Wait until ``now()`` is ``when``; returns at once when it has passed."""
        delay = when - self.now()
        if delay > 0:
            await self.sleep(delay)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to replay.

    Attributes:
        seed: names the token ids; equal seeds send equal prompts.
        vocabulary: ids of the model that prompts may use; None: any model's in use.
        speed: model seconds per wall second; arrivals and gaps are shortened by it.
        connections: turns in flight at once; more wait, and their wait counts.
        max_attempts: attempts at one turn before it is an error.
        backoff_s: wall seconds before the second attempt, doubled for each further one up to
            ``max_backoff_s``, where the server does not say how long to wait.
        max_retry_after_s: longest wait a server's Retry-After is obeyed for, in wall seconds.
        stall_timeout_s: wall seconds without a byte after which an attempt has failed.
        sample_every_s: wall seconds between readings of the cluster.
    """

    seed: int = 0
    vocabulary: int | None = None
    speed: float = 1.0
    connections: int = 256
    max_attempts: int = 8
    backoff_s: float = 0.1
    max_backoff_s: float = 5.0
    max_retry_after_s: float = 60.0
    stall_timeout_s: float = 300.0
    sample_every_s: float = 0.25


@dataclass(slots=True)
class Progress:
    """How far a run is; changes while it runs."""

    conversations_done: int = 0
    conversations_open: int = 0
    turns_done: int = 0
    retries: int = 0
    errors: int = 0
