"""Reads the boards in a thread of its own; the event loop only looks at the latest snapshot."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from conserve_serving.energy.errors import NvmlMissingError
from conserve_serving.energy.meter import BoardMeter
from conserve_serving.energy.nvml import GONE, NOT_OFFERED, Gpu, Nvml, code, find, mig_devices

_log = logging.getLogger("conserve.energy")

#: After a failure NVML, a GPU or a board is tried again so often; MIG devices are recounted then.
RETRY_S: Final = 5.0
#: Power read further apart than this (or five periods) says nothing about the time between.
_MAX_GAP_S: Final = 2.0
_JOIN_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardReading:
    """One board as last read.

    Attributes:
        joules: since the sampler first saw it.
        at_s: when it was read (monotonic).
        source: how: its total-energy counter, or its power integrated.
        mig_devices: UUIDs of its MIG devices; None where MIG is off.
        missing_s: time whose joules are not known.
    """

    joules: float
    at_s: float
    source: str
    mig_devices: frozenset[str] | None
    missing_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What one round brought.

    Attributes:
        boards: by UUID; only those that answered in this round.
        gpus: every name that has been found, ever.
        notes: what is wrong, by GPU name; for people.
        failure: why nothing can be read at all.
    """

    boards: Mapping[str, BoardReading] = field(default_factory=dict)
    gpus: Mapping[str, Gpu] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    failure: str | None = None


@dataclass(slots=True)
class _Board:
    handle: Any  # None while it is lost
    meter: BoardMeter
    counts: bool | None = None  # has a total-energy counter
    mig: frozenset[str] | None = None
    note: str | None = None


class Sampler:
    """Keeps the joules of some boards.

    Args:
        open_nvml: gives the module; called in the thread.
        period_s: between two rounds, from start to start. A round that takes longer is followed
            by as long a pause: reading never takes more than half of one thread.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        open_nvml: Callable[[], Nvml],
        *,
        period_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open = open_nvml
        self._period_s = period_s
        self._clock = clock
        self._nvml: Nvml | None = None
        self._wanted: tuple[str, ...] = ()
        self._gpus: dict[str, Gpu] = {}
        self._boards: dict[str, _Board] = {}
        self._notes: dict[str, str] = {}
        self._retry_s = float("-inf")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        #: Replaced as a whole after every round: readers need no lock.
        self.snapshot = Snapshot()

    # --- life --------------------------------------------------------------------------------
    def want(self, gpus: Iterable[str]) -> None:
        """Read these GPUs' boards as well, from the next round on. Starts the thread."""
        new = [gpu for gpu in gpus if gpu not in self._wanted]
        if new:
            self._wanted = (*self._wanted, *dict.fromkeys(new))
        if self._thread is None and not self._stop.is_set():
            self.start()

    def start(self) -> None:
        """Run rounds in a thread until `stop`."""
        self._thread = threading.Thread(target=self._run, name="energy", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; one that hangs in the driver is left behind (it is a daemon)."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)
            self._thread = None

    def _run(self) -> None:
        while not self._stop.is_set():
            began_s = self._clock()
            try:
                self.sample()
            except Exception as error:  # noqa: BLE001 -- the boundary: a thread that dies says nothing
                _log.error("reading GPU energy failed", exc_info=error)
                self._fail(f"reading failed: {error}")
                self._stop.wait(RETRY_S)
            took_s = self._clock() - began_s
            self._stop.wait(max(self._period_s - took_s, took_s))
        self._shut()

    # --- one round ---------------------------------------------------------------------------
    def sample(self) -> None:
        """Read every board once and replace the snapshot. Never raises for what NVML does."""
        now_s = self._clock()
        retry = now_s >= self._retry_s
        if retry:
            self._retry_s = now_s + RETRY_S
            if not self._reopen():
                return
        nvml = self._nvml
        if nvml is None:
            return
        self._find(nvml, self._wanted if retry else self._new())
        if retry:
            self._count_mig(nvml)
        boards = {}
        for uuid, board in self._boards.items():
            at_s = self._clock()
            source = self._read(nvml, uuid, board, at_s)
            if source is not None:
                boards[uuid] = BoardReading(
                    joules=board.meter.joules,
                    at_s=at_s,
                    source=source,
                    mig_devices=board.mig,
                    missing_s=board.meter.missing_s,
                )
        self.snapshot = Snapshot(boards=boards, gpus=dict(self._gpus), notes=self._all_notes())

    def _new(self) -> list[str]:
        return [g for g in self._wanted if g not in self._gpus and g not in self._notes]

    def _reopen(self) -> bool:
        """Initialise NVML, anew if a board is lost; returns whether it can be used."""
        if self._nvml is not None and all(b.handle is not None for b in self._boards.values()):
            return True
        self._shut()
        try:
            nvml = self._open()
        except NvmlMissingError as error:
            self._fail(str(error))
            return False
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            self._fail(f"NVML: {error}")
            return False
        self._nvml = nvml
        for board in self._boards.values():
            board.handle = None
        return True

    def _fail(self, why: str) -> None:
        if self.snapshot.failure != why:
            _log.warning("GPU energy is not measured: %s", why)
        self.snapshot = Snapshot(gpus=dict(self._gpus), notes=self._all_notes(), failure=why)

    def _shut(self) -> None:
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            try:
                nvml.nvmlShutdown()
            except nvml.NVMLError as error:
                _log.debug("nvmlShutdown: %s", error)

    def _find(self, nvml: Nvml, gpus: Iterable[str]) -> None:
        """Look for GPUs that have no board's handle yet."""
        for name in gpus:
            known = self._gpus.get(name)
            if known is not None and self._boards[known.board].handle is not None:
                continue
            try:
                gpu, handle = find(nvml, name)
            except nvml.NVMLError as error:
                self._note(name, f"GPU {name}: {error}")
                continue
            self._notes.pop(name, None)
            self._gpus[name] = gpu
            board = self._boards.get(gpu.board)
            if board is None:
                gap_s = max(_MAX_GAP_S, 5 * self._period_s)
                board = self._boards[gpu.board] = _Board(handle, BoardMeter(max_gap_s=gap_s))
                self._count_mig(nvml)
            board.handle = handle

    def _count_mig(self, nvml: Nvml) -> None:
        for board in self._boards.values():
            if board.handle is None:
                continue
            try:
                board.mig = mig_devices(nvml, board.handle)
            except nvml.NVMLError as error:
                _log.debug("MIG devices: %s", error)  # the reading that follows says more

    def _read(self, nvml: Nvml, uuid: str, board: _Board, at_s: float) -> str | None:
        """Read one board; returns how, or None when it said nothing."""
        if board.handle is None:
            return None
        try:
            if board.counts is not False:
                try:
                    counter_mj = nvml.nvmlDeviceGetTotalEnergyConsumption(board.handle)
                except nvml.NVMLError as error:
                    if code(error) not in NOT_OFFERED:
                        raise
                    board.counts = False
                else:
                    board.counts = True
                    board.meter.energy(at_s, counter_mj)
            if not board.counts:
                board.meter.power(at_s, nvml.nvmlDeviceGetPowerUsage(board.handle))
        except nvml.NVMLError as error:
            if code(error) in GONE:
                board.handle = None
            text = "reports neither energy nor power" if code(error) in NOT_OFFERED else str(error)
            if board.note != text:
                _log.warning("energy of GPU %s: %s", uuid, text)
            board.note = text
            return None
        board.note = None
        if board.counts:
            return "measured: NVML total energy"
        return f"measured: NVML power, integrated every {self._period_s:g} s"

    def _note(self, gpu: str, text: str) -> None:
        if self._notes.get(gpu) != text:
            _log.warning("%s", text)
        self._notes[gpu] = text

    def _all_notes(self) -> dict[str, str]:
        notes = dict(self._notes)
        for name, gpu in self._gpus.items():
            board = self._boards[gpu.board]
            if board.note is not None:
                notes[name] = f"GPU {name}: {board.note}"
        return notes
