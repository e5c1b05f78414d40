"""Every check of a finished run fails when what it checks is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from virtual_load import A40, conversations, engines, scheduler

from conserve_serving.core import Scheduler
from conserve_serving.core.decisions import Decision, Release
from conserve_serving.core.events import Event
from conserve_serving.core.types import EngineId
from conserve_serving.engines.model import EngineModel
from conserve_serving.engines.model_types import ModelEvent, RequestFinished
from conserve_serving.simulator import ConservationError, EngineUse, RunSummary, VirtualCluster
from conserve_serving.simulator.conservation import check_conservation

D0 = EngineId("d0")
POWERS = {engine.id: A40.power for engine in engines()}


@pytest.fixture(scope="module")
def summary() -> RunSummary:
    virtual = VirtualCluster(scheduler(), engines(kv_capacity_tokens=60_000))
    virtual.lose_engine(EngineId("p0"), at_s=12.0)
    virtual.feed(conversations(20))
    return virtual.run()


def with_use(summary: RunSummary, **changes: Any) -> RunSummary:
    use = dataclasses.replace(summary.engines[D0], **changes)
    return dataclasses.replace(summary, engines={**summary.engines, D0: use})


def busier(use: EngineUse) -> dict[str, Any]:
    return {"seconds": msgspec.structs.replace(use.seconds, prefill_s=use.seconds.prefill_s + 0.01)}


def dearer(use: EngineUse) -> dict[str, Any]:
    return {"energy": dataclasses.replace(use.energy, mixed_j=use.energy.mixed_j + 1.0)}


def test_a_run_is_sound(summary: RunSummary) -> None:
    check_conservation(summary, POWERS)


@pytest.mark.parametrize(
    ("check", "field"),
    [
        ("turns", "turns"),
        ("turns", "ended_conversations"),
        ("books", "booked_tokens"),
        ("books", "booked_turns"),
        ("books", "booked_conversations"),
    ],
)
def test_a_doctored_run_is_found_out(summary: RunSummary, check: str, field: str) -> None:
    doctored = dataclasses.replace(summary, **{field: getattr(summary, field) + 1})
    with pytest.raises(ConservationError, match=f"^{check}: ") as caught:
        check_conservation(doctored, POWERS)
    assert caught.value.check == check


def test_a_turn_s_output_is_looked_for(summary: RunSummary) -> None:
    whole = {
        engine: dataclasses.replace(use, lost=False) for engine, use in summary.engines.items()
    }
    doctored = dataclasses.replace(summary, engines=whole, output_tokens=summary.output_tokens + 1)
    with pytest.raises(ConservationError, match=r"^output_tokens: turns that ended well"):
        check_conservation(doctored, POWERS)


@pytest.mark.parametrize(
    ("check", "field"),
    [
        ("prompt_tokens", "prefill_tokens"),
        ("prompt_tokens", "cached_tokens"),
        ("prompt_tokens", "asked_tokens"),
        ("prompt_tokens", "recomputed_tokens"),
        ("prompt_tokens", "abandoned_tokens"),
        ("output_tokens", "decode_tokens"),
        ("output_tokens", "first_tokens"),
        ("output_tokens", "abandoned_output_tokens"),
        ("kv", "left_used_tokens"),
        ("kv", "left_requests"),
        ("kv", "left_sessions"),
        ("time", "alive_s"),
    ],
)
def test_a_doctored_engine_is_found_out(summary: RunSummary, check: str, field: str) -> None:
    doctored = with_use(summary, **{field: getattr(summary.engines[D0], field) + 1})
    with pytest.raises(ConservationError, match=f"^{check}: d0: "):
        check_conservation(doctored, POWERS)


@pytest.mark.parametrize("change", [busier, dearer])
def test_doctored_energy_is_found_out(
    summary: RunSummary, change: Callable[[EngineUse], dict[str, Any]]
) -> None:
    with pytest.raises(ConservationError, match=r"^energy: d0: "):
        check_conservation(with_use(summary, **change(summary.engines[D0])), POWERS)


# --- and where a part of the simulator itself is at fault ------------------------------------
class Forgetful(Scheduler):
    """Never says that an ended conversation's KV may go."""

    def handle(self, event: Event, *, now_s: float) -> list[Decision]:
        return [d for d in super().handle(event, now_s=now_s) if not isinstance(d, Release)]


def test_kv_that_nobody_frees() -> None:
    fresh = scheduler()
    virtual = VirtualCluster(Forgetful(fresh.settings, fresh.policy), engines())
    virtual.feed(conversations(3))
    with pytest.raises(ConservationError, match=r"^kv: d0: left_sessions"):
        virtual.run()


class Generous(EngineModel):
    """Says that requests generated a token more than they did."""

    def end_step(self, *, now_s: float) -> list[ModelEvent]:
        return [
            msgspec.structs.replace(event, output_tokens=event.output_tokens + 1)
            if isinstance(event, RequestFinished)
            else event
            for event in super().end_step(now_s=now_s)
        ]


class Hasty(EngineModel):
    """Does not notice idle time."""

    def begin_step(self, *, now_s: float, until_s: float | None = None) -> Any:
        self._energy._idle_s = self._energy._idle_j = 0.0
        return super().begin_step(now_s=now_s, until_s=until_s)


class Amnesiac(EngineModel):
    """Forgets prompt tokens it has computed."""

    def end_step(self, *, now_s: float) -> list[ModelEvent]:
        self.counters.recomputed_tokens += 1
        return super().end_step(now_s=now_s)


class Thrifty(EngineModel):
    """Does not count the energy of its idle time, which it does count as time."""

    def begin_step(self, *, now_s: float, until_s: float | None = None) -> Any:
        self._energy._idle_j = 0.0
        return super().begin_step(now_s=now_s, until_s=until_s)


@pytest.mark.parametrize(
    ("model", "check"),
    [
        (Generous, "output_tokens"),
        (Hasty, "time"),
        (Amnesiac, "prompt_tokens"),
        (Thrifty, "energy"),
    ],
)
def test_an_engine_that_is_wrong(model: type[EngineModel], check: str) -> None:
    virtual = VirtualCluster(scheduler(), engines(), model=model)
    virtual.feed(conversations(5))
    with pytest.raises(ConservationError, match=f"^{check}: "):
        virtual.run()
