"""The gateway over engines on this machine's GPUs: from the configuration to the figures."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from conserve_serving.engines.client import EngineClient
from conserve_serving.engines.client_types import EngineDescription, Loads, Occupancy
from conserve_serving.gateway.config import parse_config
from conserve_serving.gateway.gateway import Gateway
from conserve_serving.gateway.views import describe_cluster

CONFIG = """
[gateway]
poll_interval_s = 0.01
energy_period_s = 0.01

[[tiers]]
role = "decode"
engine = "attach"
urls = ["http://127.0.0.1:4001", "http://127.0.0.1:4002", "http://10.9.9.9:4003"]
gpus = [["0", "GPU-b"], ["2"], []]
"""


class IdleEngine:
    """An engine that answers, and does nothing."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def describe(self) -> EngineDescription:
        return EngineDescription(
            model="m",
            page_tokens=64,
            kv_capacity_tokens=10_000,
            max_context_tokens=1000,
            kv_layout="",
            keeps_sessions=True,
            takes_priority=True,
            low_priority_first=False,
            version="",
            emulated=None,
        )

    async def loads(self) -> Loads:
        return Loads(
            running_requests=0,
            waiting_requests=0,
            waiting_uncached_tokens=0,
            prefill_tokens=0,
            prefill_busy_us=0,
            decode_steps=0,
            decode_batch_sum=0.0,
            decode_us=0.0,
            decode_generated_tokens=0.0,
        )

    async def occupancy(self) -> Occupancy:
        return Occupancy(kv_used_tokens=0, kv_evictable_tokens=0)

    def close(self) -> None:
        pass


async def test_gpus_of_a_tier_are_measured_for_their_engines(fake_nvml: Any, board: Any) -> None:
    class Drawing(fake_nvml):  # type: ignore[misc] -- the fixture is a class
        """Every board uses a joule between two readings."""

        def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:  # noqa: N802 -- pynvml's
            handle.board.energy_mj += 1000
            return int(super().nvmlDeviceGetTotalEnergyConsumption(handle))

    nvml = Drawing(boards=[board("GPU-a"), board("GPU-b"), board("GPU-c"), board("GPU-d")])
    gateway = Gateway(
        parse_config(CONFIG),
        make_client=lambda url: cast(EngineClient, IdleEngine(url)),
        open_nvml=lambda: nvml,
    )
    gateway.start()
    try:
        async with asyncio.timeout(20):
            while True:
                engines = {e["id"]: e for e in describe_cluster(gateway)["engines"]}
                if all(engines[id_]["energy_j"] for id_ in ("d0", "d1")):
                    break
                await asyncio.sleep(0)
                await gateway.fleet.refresh()
    finally:
        await gateway.close()
    gateway.energy.check_invariants()
    assert engines["d0"]["energy_source"] == "measured: NVML total energy"
    assert (
        engines["d0"]["energy"]["idle_j"]
        == engines["d0"]["energy_j"]
        == pytest.approx(engines["d0"]["energy"]["total_j"])
    )
    assert engines["d2"]["energy_j"] is None
    assert engines["d2"]["energy_note"] == "no GPU and no profile is known of it"
    assert not nvml.alive
    assert nvml.boards[3].energy_mj == 0  # nobody's GPU is left alone
