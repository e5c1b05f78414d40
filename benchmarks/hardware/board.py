"""The GPU board through NVML: the conditions of a measurement, and watts over a stretch of time.

Reads only; clocks, power limit and modes stay as they are found. Joules come from the sampler of
`conserve_serving.energy`, the same that serves the gateway.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final

from conserve_serving.energy.errors import NvmlMissingError
from conserve_serving.energy.nvml import find, load_nvml
from conserve_serving.energy.sampler import BoardReading, Sampler

#: Bits of ``nvmlDeviceGetCurrentClocksEventReasons`` (``nvml.h``) that hold clocks down.
_REASONS: Final = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
_PERIOD_S: Final = 0.1
#: A board that has not been read for so long is not read.
_SILENT_S: Final = 10.0
_PIECE_S: Final = 1.0


class PowerError(Exception):
    """The board's power cannot be read."""


class Board:
    """What NVML says of one board now.

    Args:
        name: index in PCI order, or UUID.

    Raises:
        PowerError: NVML or the board is not there; the message says what to do.
    """

    def __init__(self, name: str, nvml: Any = None) -> None:
        try:
            self._nvml: Any = load_nvml() if nvml is None else nvml
            self._nvml.nvmlInit()
            self.gpu, self._handle = find(self._nvml, name)
        except NvmlMissingError as error:
            raise PowerError(f"{error} (PyPI nvidia-ml-py)") from error
        except self._nvml.NVMLError as error:
            raise PowerError(f"NVML, GPU {name}: {error}") from error

    @property
    def uuid(self) -> str:
        """Of the GPU as CUDA sees it."""
        return self.gpu.mig or self.gpu.board

    def fixed(self) -> dict[str, Any]:
        """What does not change while we measure. None: NVML does not say."""
        limit_mw = self._ask("nvmlDeviceGetEnforcedPowerLimit", self._handle)
        return {
            "driver": _text(self._ask("nvmlSystemGetDriverVersion")),
            "power_limit_w": None if limit_mw is None else limit_mw / 1e3,
            "max_sm_mhz": self._ask("nvmlDeviceGetMaxClockInfo", self._handle, 1),
            "max_memory_mhz": self._ask("nvmlDeviceGetMaxClockInfo", self._handle, 2),
            "mig": self.gpu.mig is not None,
        }

    def now(self) -> dict[str, Any]:
        """Clocks, temperature, power, and why the clocks are held down. None: NVML does not say."""
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons", self._handle)
        if bits is None:
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", self._handle)
        power_mw = self._ask("nvmlDeviceGetPowerUsage", self._handle)
        return {
            "sm_mhz": self._ask("nvmlDeviceGetClockInfo", self._handle, 1),
            "memory_mhz": self._ask("nvmlDeviceGetClockInfo", self._handle, 2),
            "temperature_c": self._ask("nvmlDeviceGetTemperature", self._handle, 0),
            "power_w": None if power_mw is None else power_mw / 1e3,
            "held_down_by": None
            if bits is None
            else [name for bit, name in _REASONS.items() if bits & bit],
        }

    def _ask(self, function: str, *arguments: Any) -> Any:
        call = getattr(self._nvml, function, None)  # older modules lack some
        if call is None:
            return None
        try:
            return call(*arguments)
        except self._nvml.NVMLError:
            return None


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value  # older modules give bytes


class PowerWatch:
    """Mean watts of a board while something is kept running on it.

    Args:
        read: the board as last read, or None; see `watch_board`.
        why_not: what is wrong when nothing is read.
        clock: seconds, the same as the readings'.
    """

    def __init__(
        self,
        read: Callable[[], BoardReading | None],
        why_not: Callable[[], str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._why_not, self._clock = read, why_not, clock

    def over(self, work: Callable[[], int], *, warm_s: float, measure_s: float) -> dict[str, Any]:
        """Run ``work`` again and again, first unwatched, then watched.

        Args:
            work: a fraction of a second of steps, all of them finished; returns how many.
            warm_s: how long the board settles.
            measure_s: how long it is watched, at least.

        Returns:
            ``watts``, ``seconds`` watched, ``watts_by_second`` (its spread), ``source`` of the
            joules; of steps ``steps_per_s`` and ``joules_per_step``, None when none ran.

        Raises:
            PowerError: the board is not read.
        """
        until_s = self._clock() + warm_s
        while self._clock() < until_s:
            work()
        first = self._after(self._clock(), work)
        marks = [first]
        steps, began_s = 0, self._clock()
        ended_s = began_s
        while marks[-1].at_s - first.at_s < measure_s:
            steps += work()
            ended_s = self._clock()
            latest = self._fresh(ended_s)
            if latest.at_s - marks[-1].at_s >= _PIECE_S or latest.at_s - first.at_s >= measure_s:
                marks.append(latest)
        last = marks[-1]
        seconds = last.at_s - first.at_s
        if last.missing_s > first.missing_s:
            raise PowerError(f"joules of {last.missing_s - first.missing_s:.1f} s are not known")
        watts = (last.joules - first.joules) / seconds
        pieces = [
            (later.joules - earlier.joules) / (later.at_s - earlier.at_s)
            for earlier, later in pairwise(marks)
        ]
        rate = steps / (ended_s - began_s)
        return {
            "watts": watts,
            "seconds": seconds,
            "watts_by_second": pieces,
            "watts_sd": statistics.stdev(pieces) if len(pieces) > 1 else None,
            "source": last.source,
            "steps_per_s": rate or None,
            "joules_per_step": watts / rate if rate else None,
        }

    def _after(self, at_s: float, work: Callable[[], int]) -> BoardReading:
        while True:
            work()
            reading = self._fresh(self._clock())
            if reading.at_s >= at_s:
                return reading

    def _fresh(self, now_s: float) -> BoardReading:
        reading = self._read()
        if reading is None or now_s - reading.at_s > _SILENT_S:
            raise PowerError(self._why_not())
        return reading


def watch_board(name: str) -> tuple[PowerWatch, Sampler]:
    """Begin to read a board's joules ten times a second; stop the sampler when done.

    Args:
        name: index in PCI order, or UUID.

    Raises:
        PowerError: it is not read.
    """
    sampler = Sampler(load_nvml, period_s=_PERIOD_S)
    sampler.want([name])

    def read() -> BoardReading | None:
        snapshot = sampler.snapshot
        gpu = snapshot.gpus.get(name)
        return None if gpu is None else snapshot.boards.get(gpu.board)

    def why_not() -> str:
        snapshot = sampler.snapshot
        return snapshot.failure or snapshot.notes.get(name) or f"GPU {name} is not read"

    until_s = time.monotonic() + _SILENT_S
    while read() is None:
        snapshot = sampler.snapshot
        if snapshot.failure or snapshot.notes.get(name) or time.monotonic() > until_s:
            sampler.stop()
            raise PowerError(why_not())
        time.sleep(_PERIOD_S / 2)
    return PowerWatch(read, why_not), sampler
