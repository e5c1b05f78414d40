"""A machine with GPUs as ``pynvml`` would show it, and a clock that tests move."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest

from conserve_serving.energy.sampler import Sampler


@dataclass
class FakeBoard:
    """One board; a reading that is None is not offered, ``error`` is what every call meets.

    Attributes:
        error: an NVML error code.
        mig: UUIDs of its MIG devices; None where MIG is off.
    """

    uuid: str
    energy_mj: int | None = 0
    power_mw: int | None = 50_000
    error: int | None = None
    mig: list[str] | None = None


@dataclass
class _Handle:
    board: FakeBoard
    life: int
    mig: str | None = None


@dataclass
class FakeNvml:
    """The functions of ``pynvml`` that are used, over some boards. Handles die with a shutdown."""

    boards: list[FakeBoard] = field(default_factory=list)
    init_error: int | None = None
    inits: int = 0
    alive: bool = False

    NVMLError = pynvml.NVMLError

    def _board(self, handle: _Handle) -> FakeBoard:
        if not self.alive or handle.life != self.inits:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        if handle.board not in self.boards:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        if handle.board.error is not None:
            raise pynvml.NVMLError(handle.board.error)
        return handle.board

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.inits += 1
        self.alive = True

    def nvmlShutdown(self) -> None:
        self.alive = False

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        if index >= len(self.boards):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return _Handle(self.boards[index], self.inits)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        for board in self.boards:
            if board.uuid == uuid:
                return _Handle(board, self.inits)
            if uuid in (board.mig or ()):
                return _Handle(board, self.inits, uuid)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, handle: _Handle) -> str:
        board = self._board(handle)
        return handle.mig or board.uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: _Handle) -> int:
        board = self._board(handle)
        if board.energy_mj is None or handle.mig is not None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return board.energy_mj

    def nvmlDeviceGetPowerUsage(self, handle: _Handle) -> int:
        board = self._board(handle)
        if board.power_mw is None or handle.mig is not None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return board.power_mw

    def nvmlDeviceIsMigDeviceHandle(self, handle: _Handle) -> Any:
        return int(handle.mig is not None)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: _Handle) -> Any:
        return _Handle(self._board(handle), self.inits)

    def nvmlDeviceGetMigMode(self, handle: _Handle) -> Any:
        board = self._board(handle)
        if board.energy_mj is None:  # an old board: it knows nothing of MIG either
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(board.mig is not None), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: _Handle) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: _Handle, index: int) -> Any:
        devices = self._board(handle).mig or []
        if index >= len(devices):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return _Handle(handle.board, self.inits, devices[index])


@dataclass
class Machine:
    """Some boards, their sampler without its thread, and the time of both."""

    nvml: FakeNvml = field(default_factory=FakeNvml)
    now_s: float = 1000.0
    period_s: float = 0.1
    missing: Exception | None = None

    def __post_init__(self) -> None:
        self.sampler = ThreadlessSampler(self.open, period_s=self.period_s, clock=self.clock)

    def open(self) -> FakeNvml:
        if self.missing is not None:
            raise self.missing
        return self.nvml

    def clock(self) -> float:
        return self.now_s

    def boards(self, *boards: FakeBoard) -> None:
        """These boards are in the machine."""
        self.nvml.boards = list(boards)

    def run(self, seconds: float, *, watts: float | dict[str, float] = 0.0) -> None:
        """Let time pass with boards drawing this much, read once every second at most."""
        while seconds > 0:
            step_s = min(1.0, seconds)
            seconds -= step_s
            self.now_s += step_s
            for board in self.nvml.boards:
                w = watts.get(board.uuid, 0.0) if isinstance(watts, dict) else watts
                board.power_mw = None if board.power_mw is None else round(w * 1e3)
                if board.energy_mj is not None:
                    board.energy_mj += round(w * step_s * 1e3)
            self.sampler.sample()

    def joules(self, uuid: str) -> float:
        return self.sampler.snapshot.boards[uuid].joules


class ThreadlessSampler(Sampler):
    """Rounds are run by the test."""

    def start(self) -> None:
        pass


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def board() -> type[FakeBoard]:
    """The fake board's class (test folders are no packages: nothing can be imported)."""
    return FakeBoard


@pytest.fixture
def fake_nvml() -> type[FakeNvml]:
    """The fake module's class."""
    return FakeNvml
