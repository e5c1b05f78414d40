"""Watts over a stretch of time, and the board's conditions, from an NVML that tests make."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from board import Board, PowerError, PowerWatch

from conserve_serving.energy.sampler import BoardReading


class Machine:
    """A board whose counter is read every 0.1 s while work is done on it, on a clock of its own."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.joules = 0.0
        self.reading: BoardReading | None = None
        self.missing_s = 0.0
        self._read_at_s = 0.0

    def works(self, watts: float, step_s: float, steps: int) -> Callable[[], int]:
        def work() -> int:
            for _ in range(max(steps, 1)):
                self.pass_time(step_s, watts)
            return steps

        return work

    def pass_time(self, seconds: float, watts: float) -> None:
        self.now_s += seconds
        self.joules += watts * seconds
        if self.now_s - self._read_at_s >= 0.1:
            self._read_at_s = self.now_s
            self.reading = BoardReading(
                joules=self.joules,
                at_s=self.now_s,
                source="measured: NVML total energy",
                mig_devices=None,
                missing_s=self.missing_s,
            )

    def watch(self) -> PowerWatch:
        self.pass_time(0.1, 0.0)
        return PowerWatch(lambda: self.reading, lambda: "GPU 0: gone", clock=lambda: self.now_s)


def test_watts_and_joules_of_a_step() -> None:
    machine = Machine()
    seen = machine.watch().over(machine.works(350.0, 0.02, 10), warm_s=2.0, measure_s=6.0)
    assert seen["watts"] == pytest.approx(350.0)
    assert 6.0 <= seen["seconds"] < 6.5
    assert seen["steps_per_s"] == pytest.approx(50.0)
    assert seen["joules_per_step"] == pytest.approx(7.0)
    assert len(seen["watts_by_second"]) == 6
    assert seen["watts_sd"] == pytest.approx(0.0, abs=1e-6)
    assert seen["source"] == "measured: NVML total energy"


def test_what_is_drawn_while_the_board_settles_does_not_count() -> None:
    machine = Machine()
    watch = machine.watch()
    began_s = machine.now_s

    def work() -> int:
        machine.pass_time(0.2, 700.0 if machine.now_s - began_s < 2.0 else 300.0)
        return 1

    seen = watch.over(work, warm_s=2.0, measure_s=5.0)
    assert seen["watts"] == pytest.approx(300.0)


def test_power_that_changes_shows_in_the_spread() -> None:
    machine = Machine()
    turns = iter(range(10_000))

    def work() -> int:
        machine.pass_time(0.2, 300.0 + 100.0 * (next(turns) // 10 % 2))
        return 1

    seen = machine.watch().over(work, warm_s=2.0, measure_s=8.0)
    assert seen["watts_sd"] > 30.0


def test_an_idle_board_has_no_steps() -> None:
    machine = Machine()
    seen = machine.watch().over(machine.works(70.0, 0.2, 0), warm_s=2.0, measure_s=5.0)
    assert seen["watts"] == pytest.approx(70.0)
    assert seen["steps_per_s"] is None
    assert seen["joules_per_step"] is None


def test_a_board_that_falls_silent_ends_it_with_the_reason() -> None:
    machine = Machine()
    watch = machine.watch()

    def work() -> int:
        machine.now_s += 0.2  # and nobody reads
        return 1

    with pytest.raises(PowerError, match="GPU 0: gone"):
        watch.over(work, warm_s=1.0, measure_s=5.0)


def test_joules_that_are_not_known_are_not_guessed() -> None:
    machine = Machine()
    watch = machine.watch()

    def work() -> int:
        machine.pass_time(0.2, 100.0)
        machine.missing_s += 0.05
        return 1

    with pytest.raises(PowerError, match="are not known"):
        watch.over(work, warm_s=1.0, measure_s=5.0)


class NvmlError(Exception):
    """As pynvml's: with a code."""

    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


class Nvml:
    """One board; of what `Board` asks, this driver does not offer two things."""

    NVMLError = NvmlError

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index:
            raise NvmlError(2)
        return 0

    def nvmlDeviceIsMigDeviceHandle(self, handle: int) -> bool:
        return False

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return "GPU-1"

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 700_000

    def nvmlDeviceGetMaxClockInfo(self, handle: int, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return {1: 1755, 2: 2619}[kind]

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        raise NvmlError(3)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return 0x4 | 0x40 | 0x1


def test_conditions_as_the_board_has_them_and_none_where_it_does_not_say() -> None:
    board = Board("0", Nvml())
    assert board.uuid == "GPU-1"
    assert board.fixed() == {
        "driver": "580.1",
        "power_limit_w": 700.0,
        "max_sm_mhz": 1980,
        "max_memory_mhz": 2619,
        "mig": False,
    }
    assert board.now() == {
        "sm_mhz": 1755,
        "memory_mhz": 2619,
        "temperature_c": None,
        "power_w": None,
        "held_down_by": ["software power cap", "hardware thermal slowdown"],
    }


def test_a_board_that_is_not_there_is_named() -> None:
    with pytest.raises(PowerError, match="NVML, GPU 3: error 2"):
        Board("3", Nvml())
