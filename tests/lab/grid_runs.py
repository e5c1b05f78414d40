"""What the tests of the grid have run in its processes: importable there, and quick."""

from __future__ import annotations

import os
import threading

from conserve_serving.lab.cell import FORMAT, Cell
from conserve_serving.simulator.errors import ConservationError, DeadlockError


def quick(cell: Cell) -> dict:
    """A row without a run; it says which process made it."""
    return {
        "format": FORMAT,
        "key": cell.key,
        "cell": cell.to_json(),
        "pid": os.getpid(),
        "value": cell.workload.seed + 10 * (cell.workload.rate_per_s or 0.0),
    }


def failing(cell: Cell) -> dict:
    """Fails at seeds 1 to 3, in three ways."""
    if cell.workload.seed == 1:
        raise DeadlockError("p0 holds what d0 waits for")
    if cell.workload.seed == 2:
        raise ConservationError("tokens", "3 went in, 2 came out")
    if cell.workload.seed == 3:
        raise ZeroDivisionError("a bug")
    return quick(cell)


def killed(cell: Cell) -> dict:
    """The process is gone in the midst of seed 2, as when memory runs out."""
    if cell.workload.seed == 2:
        os._exit(9)
    return quick(cell)


def endless(cell: Cell) -> dict:
    """Seed 0 returns; the others say that they have begun, and never end by themselves."""
    if cell.workload.seed == 0:
        return quick(cell)
    os.write(1, b"begun\n")  # in one piece: several processes write here
    threading.Event().wait()
    raise AssertionError("nobody ended me")
