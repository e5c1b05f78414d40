"""What the command line says when something fails.

    CliError                     exit code 1: the thing asked for failed
    ├── ChildFailedError         a process of ours did not come up, or kept crashing
    │   └── PortInUseError       because its port is taken
    ├── GatewayUnreachableError  no gateway answers at the URL given
    ├── GatewayAnsweredError     the gateway answered with an error, or not as a gateway does
    └── BadInputError            exit code 2: a file or an option cannot be used as it is

Every error has two sentences for the person who reads it: what failed, and what to do about it.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2


class CliError(Exception):
    """Something failed that the person at the terminal can act on.

    Args:
        what: what failed, in one line.
        remedy: what to do about it, in one line.
        detail: lines of evidence (the end of a log), shown between the two.
    """

    exit_code = EXIT_FAILED

    def __init__(self, what: str, *, remedy: str, detail: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy
        self.detail = detail

    def __str__(self) -> str:
        return self.what


class ChildFailedError(CliError):
    """A process that we started did not come up, or crashed too often."""


class PortInUseError(ChildFailedError):
    """The port that a process of ours was to listen on is taken."""


class GatewayUnreachableError(CliError):
    """Nothing answers at the gateway's URL."""


class GatewayAnsweredError(CliError):
    """The gateway answered with an error status.

    Args:
        status: HTTP status of the answer.
    """

    def __init__(self, what: str, *, remedy: str, status: int) -> None:
        super().__init__(what, remedy=remedy)
        self.status = status


class BadInputError(CliError):
    """A file or an option cannot be used as it is."""

    exit_code = EXIT_USAGE
