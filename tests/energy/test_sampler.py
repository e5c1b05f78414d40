"""Reading boards: counters, power, what is missing, what gets lost and comes back."""

from __future__ import annotations

import threading
from typing import Any

import pynvml
import pytest

from conserve_serving.energy.errors import NvmlMissingError
from conserve_serving.energy.nvml import Gpu
from conserve_serving.energy.sampler import RETRY_S, Sampler


def test_a_counter_is_preferred_and_named(machine: Any, board: Any) -> None:
    machine.boards(board("GPU-a", energy_mj=5_000_000), board("GPU-b", energy_mj=0))
    machine.sampler.want(["0", "GPU-b"])
    machine.run(1)
    machine.run(10, watts={"GPU-a": 300.0, "GPU-b": 70.0})
    snapshot = machine.sampler.snapshot
    assert snapshot.gpus == {"0": Gpu(board="GPU-a"), "GPU-b": Gpu(board="GPU-b")}
    assert machine.joules("GPU-a") == pytest.approx(3000.0)
    assert machine.joules("GPU-b") == pytest.approx(700.0)
    assert {b.source for b in snapshot.boards.values()} == {"measured: NVML total energy"}
    assert not snapshot.notes


def test_power_is_integrated_where_there_is_no_counter(machine: Any, board: Any) -> None:
    machine.boards(board("GPU-a", energy_mj=None))
    machine.sampler.want(["0"])
    machine.run(1, watts=250.0)
    machine.run(4, watts=250.0)
    read = machine.sampler.snapshot.boards["GPU-a"]
    assert read.joules == pytest.approx(1000.0)
    assert read.source == "measured: NVML power, integrated every 0.1 s"


def test_a_board_with_neither_says_so(machine: Any, board: Any) -> None:
    machine.boards(board("GPU-a", energy_mj=None, power_mw=None))
    machine.sampler.want(["0"])
    machine.run(2)
    assert machine.sampler.snapshot.boards == {}
    assert machine.sampler.snapshot.notes == {"0": "GPU 0: reports neither energy nor power"}


def test_one_board_under_two_names_is_one_board(machine: Any, board: Any) -> None:
    machine.boards(board("GPU-a"))
    machine.sampler.want(["0", "GPU-a"])
    machine.run(3, watts=100.0)
    assert list(machine.sampler.snapshot.boards) == ["GPU-a"]
    assert machine.joules("GPU-a") == pytest.approx(200.0)


def test_a_lost_gpu_comes_back_and_its_counter_went_on(machine: Any, board: Any) -> None:
    machine.boards(board("GPU-a"), board("GPU-b"))
    machine.sampler.want(["0", "1"])
    machine.run(3, watts=100.0)
    machine.nvml.boards[0].error = pynvml.NVML_ERROR_GPU_IS_LOST
    machine.run(RETRY_S + 2, watts=100.0)
    snapshot = machine.sampler.snapshot
    assert list(snapshot.boards) == ["GPU-b"]
    assert "GPU is lost" in snapshot.notes["0"]
    assert machine.nvml.inits > 1  # NVML was initialised anew, to find it again
    machine.nvml.boards[0].error = None
    machine.run(RETRY_S + 1, watts=100.0)
    assert machine.sampler.snapshot.notes == {}
    seconds = 3 - 1 + RETRY_S + 2 + RETRY_S + 1
    assert machine.joules("GPU-a") == pytest.approx(100.0 * seconds)
    assert machine.joules("GPU-b") == pytest.approx(100.0 * seconds)


def test_a_reloaded_driver_begins_its_counters_anew(machine: Any, board: Any) -> None:
    machine.boards(board("GPU-a", energy_mj=10**9))
    machine.sampler.want(["0"])
    machine.run(3, watts=100.0)
    machine.nvml.alive = False  # every handle is dead
    machine.nvml.init_error = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    machine.run(RETRY_S + 1)
    assert "Driver Not Loaded" in (machine.sampler.snapshot.failure or "")
    machine.nvml.init_error = None
    machine.nvml.boards[0].energy_mj = 7_000
    machine.run(RETRY_S + 1)
    assert machine.sampler.snapshot.failure is None
    assert machine.joules("GPU-a") == pytest.approx(200.0 + 7.0)
    assert machine.sampler.snapshot.boards["GPU-a"].missing_s > 0


def test_a_hiccup_leaves_one_round_out(machine: Any, board: Any) -> None:
    machine.boards(board("GPU-a"))
    machine.sampler.want(["0"])
    machine.run(2, watts=100.0)
    machine.nvml.boards[0].error = pynvml.NVML_ERROR_TIMEOUT
    machine.run(1, watts=100.0)
    assert machine.sampler.snapshot.boards == {}
    machine.nvml.boards[0].error = None
    machine.run(1, watts=100.0)
    assert machine.joules("GPU-a") == pytest.approx(300.0)
    assert machine.nvml.inits == 1


def test_a_gpu_that_is_not_there_is_looked_for_again(machine: Any, board: Any) -> None:
    machine.boards(board("GPU-a"))
    machine.sampler.want(["1", "GPU-c"])
    machine.run(1)
    notes = machine.sampler.snapshot.notes
    assert notes["1"].startswith("GPU 1: ") and notes["GPU-c"].startswith("GPU GPU-c: ")
    machine.nvml.boards.append(board("GPU-c"))
    machine.run(RETRY_S + 1, watts=10.0)
    assert not machine.sampler.snapshot.notes
    assert set(machine.sampler.snapshot.gpus) == {"1", "GPU-c"}


def test_without_the_module_it_says_what_to_install(machine: Any, board: Any) -> None:
    machine.missing = NvmlMissingError("install it")
    machine.boards(board("GPU-a"))
    machine.sampler.want(["0"])
    machine.run(1)
    assert machine.sampler.snapshot.failure == "install it"
    machine.missing = None
    machine.run(RETRY_S + 1, watts=10.0)
    assert machine.sampler.snapshot.failure is None
    assert machine.joules("GPU-a") > 0


def test_a_mig_device_leads_to_its_board(machine: Any, board: Any) -> None:
    machine.boards(board("GPU-a", mig=["MIG-1", "MIG-2"]))
    machine.sampler.want(["MIG-1"])
    machine.run(3, watts=200.0)
    snapshot = machine.sampler.snapshot
    assert snapshot.gpus == {"MIG-1": Gpu(board="GPU-a", mig="MIG-1")}
    assert snapshot.boards["GPU-a"].mig_devices == {"MIG-1", "MIG-2"}
    assert machine.joules("GPU-a") == pytest.approx(400.0)
    machine.nvml.boards[0].mig = ["MIG-1"]  # the other was destroyed
    machine.run(RETRY_S + 1, watts=200.0)
    assert machine.sampler.snapshot.boards["GPU-a"].mig_devices == {"MIG-1"}


def test_it_reads_in_a_thread_until_it_is_stopped(fake_nvml: Any, board: Any) -> None:
    read = threading.Event()
    where: set[int] = set()

    class Watched(fake_nvml):  # type: ignore[misc] -- the fixture is a class
        def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:  # noqa: N802 -- pynvml's
            where.add(threading.get_ident())
            read.set()
            return int(super().nvmlDeviceGetTotalEnergyConsumption(handle))

    nvml = Watched(boards=[board("GPU-a")])
    sampler = Sampler(lambda: nvml, period_s=0.01)
    assert not nvml.inits  # nothing is touched before there is something to read
    sampler.want(["0"])
    assert read.wait(10)
    sampler.stop()
    assert where and threading.get_ident() not in where
    assert not nvml.alive  # the thread has ended, and shut NVML down


def test_a_defect_is_told_and_the_thread_lives_on(
    fake_nvml: Any, board: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(fake_nvml):  # type: ignore[misc] -- the fixture is a class
        def nvmlInit(self) -> None:  # noqa: N802 -- pynvml's
            raise ValueError("something nobody thought of")

    told = threading.Event()

    class Watching(Sampler):
        def _fail(self, why: str) -> None:
            super()._fail(why)
            told.set()

    sampler = Watching(lambda: Broken(boards=[board("GPU-a")]), period_s=0.01)
    sampler.want(["0"])
    assert told.wait(10)
    sampler.stop()
    assert sampler.snapshot.failure == "reading failed: something nobody thought of"
    assert "reading GPU energy failed" in caplog.text
