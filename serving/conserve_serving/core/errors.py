"""Errors of the core.

CoreError
├── UnknownPolicyError    a policy's name is not in the registry
├── InvariantError        the scheduler's own books do not add up: a defect, never bad input
└── JournalError          a journal record cannot be read back
"""

from __future__ import annotations


class CoreError(Exception):
    """Root of the core's errors."""


class UnknownPolicyError(CoreError, ValueError):
    """A policy's name is not in the registry."""


class InvariantError(CoreError, AssertionError):
    """The scheduler's own books do not add up: a defect, never bad input."""


class JournalError(CoreError, ValueError):
    """A journal record cannot be read back."""
