"""What is used of NVML, and how a GPU's name leads to the board that is measured.

Names and behaviour are those of NVIDIA's module ``pynvml`` (PyPI ``nvidia-ml-py``), which
satisfies :class:`Nvml` as it is; error codes are those of ``nvml.h``.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

from conserve_serving.energy.errors import NvmlMissingError

#: The board or the library does not offer the call.
NOT_OFFERED: Final = frozenset({3, 13})  # NOT_SUPPORTED, FUNCTION_NOT_FOUND
#: The handle is worth nothing any more: look for the board again, after initialising anew.
#: UNINITIALIZED, INVALID_ARGUMENT, NOT_FOUND, DRIVER_NOT_LOADED, GPU_IS_LOST, RESET_REQUIRED,
#: LIB_RM_VERSION_MISMATCH (the driver was updated), GPU_NOT_FOUND
GONE: Final = frozenset({1, 2, 6, 9, 15, 16, 18, 28})


class Nvml(Protocol):
    """The part of ``pynvml`` that is used. Handles are opaque."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any: ...
    def nvmlDeviceGetUUID(self, handle: Any) -> str: ...
    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int: ...
    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int: ...
    def nvmlDeviceIsMigDeviceHandle(self, handle: Any) -> Any: ...
    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: Any) -> Any: ...
    def nvmlDeviceGetMigMode(self, handle: Any) -> Any: ...
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int: ...
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> Any: ...


def load_nvml() -> Nvml:
    """NVIDIA's own module.

    Raises:
        NvmlMissingError: it is not installed.
    """
    try:
        return cast(Nvml, importlib.import_module("pynvml"))
    except ImportError as error:
        raise NvmlMissingError(
            "the module pynvml is missing: install conserve-agents[energy]"
        ) from error


def code(error: Exception) -> int:
    """NVML's error code; 999 (unknown) where there is none."""
    return int(getattr(error, "value", 999))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU as a configuration names it.

    Attributes:
        board: UUID of the board that is measured.
        mig: UUID of the MIG device, where it is one: its board's joules are not its own.
    """

    board: str
    mig: str | None = None


def find(nvml: Nvml, name: str) -> tuple[Gpu, Any]:
    """The GPU of that index (``nvidia-smi``'s, PCI order) or UUID, and its board's handle.

    Raises:
        Nvml.NVMLError: there is none, or NVML fails.
    """
    if name.isascii() and name.isdigit():
        handle = nvml.nvmlDeviceGetHandleByIndex(int(name))
    else:
        handle = nvml.nvmlDeviceGetHandleByUUID(name)
    mig = None
    if _is_mig(nvml, handle):
        mig = nvml.nvmlDeviceGetUUID(handle)
        handle = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    return Gpu(board=nvml.nvmlDeviceGetUUID(handle), mig=mig), handle


def _is_mig(nvml: Nvml, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceIsMigDeviceHandle(handle))
    except nvml.NVMLError as error:
        if code(error) in NOT_OFFERED:  # a driver from before MIG
            return False
        raise


def mig_devices(nvml: Nvml, board: Any) -> frozenset[str] | None:
    """UUIDs of a board's MIG devices; None where MIG is off.

    Raises:
        Nvml.NVMLError: NVML fails.
    """
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(board)
    except nvml.NVMLError as error:
        if code(error) in NOT_OFFERED:
            return None
        raise
    if not current:
        return None
    found = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(board)):
        try:
            device = nvml.nvmlDeviceGetMigDeviceHandleByIndex(board, index)
        except nvml.NVMLError as error:
            if code(error) in (2, 6):  # INVALID_ARGUMENT, NOT_FOUND: no device at this index
                continue
            raise
        found.append(nvml.nvmlDeviceGetUUID(device))
    return frozenset(found)
