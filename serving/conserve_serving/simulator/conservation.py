"""Checks that a finished run's figures add up. Every run makes them; they cost nothing."""

from __future__ import annotations

from conserve_serving.simulator.summary import RunSummary


def check_conservation(summary: RunSummary) -> None:
    """Raise ConservationError, naming the check, unless the run's books add up."""
