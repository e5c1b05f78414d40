"""Errors of the simulator.

::

    SimulationError
    ├── DeadlockError       nothing more will happen, and conversations are open
    └── ConservationError   the books of a run that has ended do not add up
"""

from __future__ import annotations


class SimulationError(Exception):
    """Base of the simulator's errors; raised itself where the input makes no sense."""


class DeadlockError(SimulationError):
    """A run makes no progress. The text holds the state of the scheduler and of every engine."""


class ConservationError(SimulationError):
    """A check of a finished run failed: its figures cannot be believed.

    Attributes:
        check: name of the check.
    """

    def __init__(self, check: str, what: str) -> None:
        """Args: the check's name and what it found."""
        super().__init__(f"{check}: {what}")
        self.check = check
