"""Where the hand-off store of one run is, and how large it may become.

Pages are written once and read once, moments later. In shared memory (/dev/shm) they never touch a
disk; where that is small, as in many containers, the run folder takes its place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from conserve_serving.cli.errors import BadInputError

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - the folder made there is private
#: Shared memory with less than this free is not for KV (containers often have 64 MiB).
ENOUGH_BYTES: Final = 4 * 1024**3
_PREFIX: Final = "conserve-store-"
_MEMORY_INFO: Final = Path("/proc/meminfo")


def make_store_folder(
    run_dir: Path, *, shared: Path = SHARED_MEMORY, enough_bytes: int = ENOUGH_BYTES
) -> Path:
    """A new folder for this run's pages, private to this user; to be removed at the end.

    Folders of runs that were killed and could not remove theirs are removed: they hold memory.

    Args:
        run_dir: where it goes when shared memory is small.
        shared: the file system in shared memory.
        enough_bytes: what must be free there.
    """
    remove_stale(shared)
    try:
        if shutil.disk_usage(shared).free >= enough_bytes:
            return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=shared))
    except OSError:  # no such file system, or not for us
        pass
    return run_dir / "store"


def make_store(folder: Path) -> None:
    """Make the store's folder if need be.

    Raises:
        BadInputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise BadInputError(
            f"the hand-off store's folder {folder} cannot be made: {failure.strerror}",
            remedy="correct handoff.path in the configuration file",
        ) from failure


def remove_stale(shared: Path) -> None:
    """Remove store folders of this user's whose process is gone."""
    try:
        folders = list(shared.glob(f"{_PREFIX}*"))
    except OSError:
        return
    for folder in folders:
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            ours = folder.stat().st_uid == os.getuid()
            if ours and pid.isdigit() and not _runs(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def default_max_bytes(folder: Path, *, memory_info: Path = _MEMORY_INFO) -> int | None:
    """What the store may take: half of what is free there; of memory, a quarter of what is free.

    Args:
        folder: the store's, or where it will be.
        memory_info: Linux's account of memory.

    Returns:
        None when it cannot be found out.
    """
    there = next((f for f in (folder, *folder.parents) if f.exists()), None)
    if there is None:
        return None
    limit = shutil.disk_usage(there).free // 2
    if SHARED_MEMORY in (there, *there.parents):
        available = available_memory_bytes(memory_info)
        limit = limit if available is None else min(limit, available // 4)
    return max(limit, 1)


def available_memory_bytes(memory_info: Path = _MEMORY_INFO) -> int | None:
    """Memory that programs can still take; None when it cannot be found out."""
    try:
        for line in memory_info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
