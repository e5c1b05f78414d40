"""Errors of the energy package, one tree::

EnergyError               anything this package raises on purpose
├── NvmlMissingError      the Python module for NVML is not installed
└── InvariantError        joules were lost or made: a defect, never bad input
"""

from __future__ import annotations


class EnergyError(Exception):
    """Root of the package's errors."""


class NvmlMissingError(EnergyError):
    """The Python module for NVML is not installed."""


class InvariantError(EnergyError, AssertionError):
    """Joules were lost or made: a defect, never bad input."""
