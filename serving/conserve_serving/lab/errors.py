"""Errors of the laboratory.

::

    LabError
    ├── ClusterError     a cluster, link or price that does not exist or cannot be
    ├── RunError         what was asked for is in order, but it did not run to its end
    └── WorkloadError    a trace, a generated workload or its settings cannot be used as asked
"""

from __future__ import annotations


class LabError(Exception):
    """Root of the laboratory's errors; its text names what is wrong and what to do."""


class WorkloadError(LabError):
    """A workload cannot be used as asked; the text names the field and the remedy."""


class ClusterError(LabError):
    """A cluster that does not exist or cannot be; the text names the field and the choices."""


class RunError(LabError):
    """What was asked for is in order, but it did not run to its end; what was done is kept."""
