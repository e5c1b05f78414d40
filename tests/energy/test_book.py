"""From engines and their GPUs to turns: which source an engine has, and what it says of it."""

from __future__ import annotations

from typing import Any

import pynvml
import pytest

from conserve_serving.core.events import StepTimes
from conserve_serving.core.types import EngineId, EngineSpeeds, Link, Tier
from conserve_serving.energy.errors import NvmlMissingError
from conserve_serving.energy.sampler import RETRY_S
from conserve_serving.energy.work import Kind, Tally, Work
from conserve_serving.engines.client import EngineClient
from conserve_serving.engines.client_types import EmulatedExtension, EngineDescription, StepDelta
from conserve_serving.gateway.config import TierSection
from conserve_serving.gateway.energy import EnergyBook
from conserve_serving.gateway.engine import Engine

URL = "http://127.0.0.1:1"
IDLE = StepDelta(times=StepTimes(), decode_batch_sum=0.0, decode_generated_tokens=0.0)
NVML = "measured: NVML total energy"


def decoded(steps: int, *, batch: int = 1) -> StepDelta:
    """A second in which so many decode steps ran."""
    return StepDelta(
        times=StepTimes(decode_steps=steps, decode_s=1.0),
        decode_batch_sum=float(steps * batch),
        decode_generated_tokens=float(steps * batch),
    )


def extension(energy_j: float, model_time_s: float) -> EmulatedExtension:
    return EmulatedExtension(
        profile="a40-qwen3-0.6b",
        speed=1.0,
        host_capacity_tokens=0,
        link=Link(setup_s=0.01, bytes_per_s=1e9, kv_bytes_per_token=1),
        speeds=EngineSpeeds(
            prefill_tokens_per_s=1e4, decode_step_s=0.01, decode_step_s_per_kv_token=1e-8
        ),
        energy_j=energy_j,
        energy_source="modelled: a40-qwen3-0.6b (assumed)",
        model_time_s=model_time_s,
    )


class Cluster:
    """A book, its machine, and engines that have joined."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.book = EnergyBook(clock=machine.clock, sampler=machine.sampler)

    def join(
        self,
        id_: str,
        *gpus: str,
        profile: str | None = None,
        emulated: EmulatedExtension | None = None,
    ) -> Engine:
        section = TierSection(role=Tier.DECODE, engine="attach", urls=(URL,), profile=profile)
        engine = Engine(EngineId(id_), URL, section, EngineClient(URL), gpus=gpus)
        engine.description = EngineDescription(
            model="m",
            page_tokens=64,
            kv_capacity_tokens=1000,
            max_context_tokens=1000,
            kv_layout="",
            keeps_sessions=True,
            takes_priority=True,
            low_priority_first=False,
            version="",
            emulated=emulated,
        )
        if emulated is not None:
            engine.energy_j, engine.energy_source = emulated.energy_j, emulated.energy_source
        self.book.joined(engine)
        return engine

    def report(self, delta: StepDelta, *engines: Engine) -> None:
        for engine in engines:
            self.book.reported(engine, self.machine.now_s, delta, None)
        self.book.check_invariants()

    def quiet(self, *engines: Engine, watts: float, seconds: int = 3) -> None:
        for _ in range(seconds):
            self.machine.run(1, watts=watts)
            self.report(IDLE, *engines)

    def decoding(self, engine: Engine) -> Work:
        """A turn that decodes from now on."""
        work = self.book.begin(engine, Tally(), prefill_tokens=1, decodes=True, streams=True)
        work.first_token(self.machine.now_s)
        return work

    def energy(self, engine: Engine) -> dict[str, Any]:
        described: dict[str, Any] = self.book.describe(engine)
        return described


@pytest.fixture
def cluster(machine: Any) -> Cluster:
    return Cluster(machine)


def test_a_turn_is_charged_what_its_board_used(cluster: Cluster, board: Any) -> None:
    cluster.machine.boards(board("GPU-a"), board("GPU-b"))
    engine = cluster.join("d0", "1")
    assert cluster.energy(engine)["energy_note"] == "being looked for"
    cluster.quiet(engine, watts=80.0)
    turn = cluster.decoding(engine)
    cluster.machine.run(1, watts={"GPU-b": 380.0})
    cluster.report(decoded(50), engine)
    assert turn.tally.describe() == {
        "total_j": pytest.approx(300.0),
        "prefill_j": 0.0,
        "decode_j": pytest.approx(300.0),
        "source": NVML,
        "settled": False,
        "unknown_engines": [],
    }
    described = cluster.energy(engine)
    assert described["energy_source"] == NVML
    assert described["energy_note"] is None
    assert described["energy_j"] == pytest.approx(2 * 80.0 + 380.0)  # from its second reading on
    assert described["energy"]["idle_w"] == pytest.approx(80.0)
    assert described["energy"]["idle_w_measured"] is True
    assert list(cluster.book.booked()) == [
        ("d0", "decode", Kind.IDLE, NVML, pytest.approx(240.0)),
        ("d0", "decode", Kind.DECODE, NVML, pytest.approx(300.0)),
    ]


def test_without_gpu_and_profile_there_is_no_figure(cluster: Cluster) -> None:
    engine = cluster.join("d0")
    turn = cluster.decoding(engine)
    cluster.machine.run(1)
    cluster.report(decoded(50), engine)
    assert cluster.energy(engine) == {
        "energy_j": None,
        "energy_source": None,
        "energy_note": "no GPU and no profile is known of it",
        "energy": None,
    }
    assert turn.tally.describe() == {
        "total_j": None,
        "prefill_j": None,
        "decode_j": None,
        "source": None,
        "settled": True,
        "unknown_engines": ["d0"],
    }


def test_without_gpu_the_profile_answers_and_says_so(cluster: Cluster) -> None:
    engine = cluster.join("d0", profile="h100-qwen3-8b")
    turn = cluster.decoding(engine)
    cluster.machine.run(2)
    cluster.report(decoded(50, batch=8), engine)
    described = cluster.energy(engine)
    assert described["energy_source"] == "modelled: h100-qwen3-8b (measured)"
    assert described["energy"]["idle_j"] == pytest.approx(2 * 120.0)
    busy_w = 410 + 220 * (1 - 2.718281828 ** (-8 / 96))
    assert described["energy"]["total_j"] == pytest.approx(120.0 + busy_w)
    ours = turn.tally.describe()
    assert ours is not None and ours["source"] == "modelled: h100-qwen3-8b (measured)"
    assert ours["total_j"] == pytest.approx((busy_w - 120.0) / 8)  # one of a batch of eight


@pytest.mark.parametrize("profile", [None, "h100-qwen3-8b"])
def test_nvml_that_fails_is_named_and_the_profile_stands_in(
    cluster: Cluster, board: Any, profile: str | None
) -> None:
    cluster.machine.boards(board("GPU-a"))
    cluster.machine.missing = NvmlMissingError("pynvml is missing")
    engine = cluster.join("d0", "0", profile=profile)
    cluster.quiet(engine, watts=80.0)
    described = cluster.energy(engine)
    assert described["energy_note"] == "pynvml is missing"
    assert (described["energy_j"] is None) == (profile is None)
    cluster.machine.missing = None
    for _ in range(int(RETRY_S) + 3):
        cluster.quiet(engine, watts=80.0, seconds=1)
    described = cluster.energy(engine)
    assert described["energy_note"] is None
    assert described["energy_source"] == NVML
    sources = {source for _, _, _, source, _ in cluster.book.booked()}
    assert sources == ({NVML} if profile is None else {NVML, f"modelled: {profile} (measured)"})


def test_a_gpu_that_is_not_there_is_named(cluster: Cluster, board: Any) -> None:
    cluster.machine.boards(board("GPU-a"))
    engine = cluster.join("d0", "0", "3")
    cluster.quiet(engine, watts=80.0)
    described = cluster.energy(engine)
    assert described["energy_j"] is None
    assert described["energy_note"].startswith("GPU 3: ")


def test_two_engines_on_one_gpu_share_it(cluster: Cluster, board: Any) -> None:
    cluster.machine.boards(board("GPU-a"))
    one, other = cluster.join("d0", "0"), cluster.join("d1", "GPU-a")
    cluster.quiet(one, other, watts=80.0)
    first, second = cluster.decoding(one), cluster.decoding(other)
    for _ in range(2):  # engines are asked one after the other: a report may be an interval old
        cluster.machine.run(1, watts=380.0)
        cluster.report(decoded(50), one, other)
    before = first.tally.decode_j, second.tally.decode_j
    cluster.machine.run(1, watts=380.0)
    cluster.report(decoded(50), one, other)
    assert first.tally.decode_j - before[0] == pytest.approx(150.0)
    assert second.tally.decode_j - before[1] == pytest.approx(150.0)
    label = f"{NVML}, split by busy time: 2 engines on one board"
    assert cluster.energy(one)["energy_source"] == label
    total_j = sum(cluster.energy(engine)["energy_j"] for engine in (one, other))
    assert total_j == pytest.approx(2 * 80.0 + 3 * 380.0)
    assert first.tally.sources == (label,)


def test_a_mig_device_is_not_charged_for_its_neighbours(cluster: Cluster, board: Any) -> None:
    cluster.machine.boards(board("GPU-a", mig=["MIG-1", "MIG-2"]))
    engine = cluster.join("d0", "MIG-1")
    cluster.quiet(engine, watts=80.0)
    turn = cluster.decoding(engine)
    cluster.machine.run(1, watts=380.0)
    cluster.report(decoded(50), engine)
    described = cluster.energy(engine)
    label = f"{NVML} of the whole board (shared with MIG devices of others)"
    assert described["energy_source"] == label
    assert described["energy"]["unattributed_j"] == described["energy"]["total_j"]
    assert turn.tally.total_j == 0.0
    assert turn.tally.unknown_engines == ("d0",)


def test_mig_devices_that_are_all_ours_split_their_board(cluster: Cluster, board: Any) -> None:
    cluster.machine.boards(board("GPU-a", mig=["MIG-1", "MIG-2"]))
    one, other = cluster.join("d0", "MIG-1"), cluster.join("d1", "MIG-2")
    cluster.quiet(one, other, watts=80.0)
    turn = cluster.decoding(one)
    cluster.machine.run(1, watts=380.0)
    cluster.report(decoded(50), one)
    cluster.report(IDLE, other)
    assert turn.tally.decode_j == pytest.approx(300.0)
    assert "MIG, all ours" in cluster.energy(one)["energy_source"]


def test_a_gpu_lost_under_an_engine_is_noted(cluster: Cluster, board: Any) -> None:
    cluster.machine.boards(board("GPU-a"))
    engine = cluster.join("d0", "0")
    cluster.quiet(engine, watts=80.0)
    before_j = cluster.energy(engine)["energy_j"]
    cluster.machine.nvml.boards[0].error = pynvml.NVML_ERROR_GPU_IS_LOST
    cluster.quiet(engine, watts=80.0)
    assert "lost" in cluster.energy(engine)["energy_note"]
    assert cluster.energy(engine)["energy_j"] == before_j
    cluster.book.lost(engine)
    cluster.machine.nvml.boards[0].error = None
    cluster.machine.run(RETRY_S + 1, watts=80.0)
    cluster.book.joined(engine)
    cluster.quiet(engine, watts=80.0)
    described = cluster.energy(engine)
    assert described["energy_note"] is None
    assert described["energy_j"] == pytest.approx(before_j + 80.0 * (3 + RETRY_S + 1 + 3))


def test_an_emulated_engines_own_joules_are_attributed(cluster: Cluster) -> None:
    engine = cluster.join("d0", emulated=extension(500.0, 100.0))
    turn = cluster.decoding(engine)
    cluster.machine.run(1)
    cluster.book.reported(engine, cluster.machine.now_s, decoded(50), extension(700.0, 101.0))
    assert turn.tally.decode_j == pytest.approx(125.0)  # 75 W of 200 W are idle
    assert cluster.energy(engine)["energy"]["total_j"] == pytest.approx(200.0)
    cluster.book.lost(engine)
    again = cluster.join("d0", emulated=extension(20.0, 0.5))  # it restarted
    cluster.machine.run(1)
    cluster.book.reported(again, cluster.machine.now_s, IDLE, extension(95.0, 1.5))
    described = cluster.energy(again)
    assert described["energy"]["total_j"] == pytest.approx(275.0)
    assert described["energy"]["idle_j"] == pytest.approx(150.0)
    cluster.book.check_invariants()


def test_an_engine_that_was_removed_leaves_its_board_to_the_other(
    cluster: Cluster, board: Any
) -> None:
    cluster.machine.boards(board("GPU-a"))
    one, other = cluster.join("d0", "0"), cluster.join("d1", "0")
    cluster.quiet(one, other, watts=80.0)
    cluster.book.lost(other)
    cluster.book.removed(other)
    before_j = cluster.energy(other)["energy_j"]
    cluster.quiet(one, watts=80.0)
    assert cluster.energy(other)["energy_j"] == before_j > 0
    assert cluster.energy(one)["energy_source"] == NVML


def test_what_a_gpu_draws_while_its_engine_is_gone_is_nobodys(cluster: Cluster, board: Any) -> None:
    cluster.machine.boards(board("GPU-a"))
    engine = cluster.join("d0", "0")
    cluster.quiet(engine, watts=80.0)
    cluster.book.lost(engine)
    for _ in range(3):
        cluster.machine.run(1, watts=200.0)
        cluster.book.away(engine)
    parts = cluster.energy(engine)["energy"]
    assert parts["unattributed_j"] == pytest.approx(3 * 120.0)
    assert parts["idle_w"] == pytest.approx(80.0)
