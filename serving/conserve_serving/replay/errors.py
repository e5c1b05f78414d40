"""Errors of the replayer.

::

    ReplayError
    ├── TraceError        a trace file or a workload that cannot be replayed as written
    ├── GatewayUnusable   the gateway cannot be reached, or does not answer what a replay needs
    └── TurnFailure       one attempt at a turn did not end with an answer (see ``kind``)
"""

from __future__ import annotations

from pathlib import Path


class ReplayError(Exception):
    """Root of the replayer's errors; its text says what failed and what to do."""


class TraceError(ReplayError):
    """A trace cannot be replayed as written.

    Args:
        message: what is wrong, naming the field, and the remedy.
        path: the file, where there is one.
        line: line in the file, counted from 1.
    """

    def __init__(self, message: str, *, path: Path | None = None, line: int | None = None) -> None:
        where = "" if path is None else f"{path}: " if line is None else f"{path}, line {line}: "
        super().__init__(where + message)
        self.path = path
        self.line = line


class GatewayUnusable(ReplayError):  # noqa: N818 - names the state, as httpx's ConnectTimeout does
    """The gateway cannot be reached, or does not answer what a replay needs."""


class TurnFailure(ReplayError):  # noqa: N818 - caught inside the replayer, reported as a kind
    """One attempt at a turn did not end with an answer.

    Args:
        kind: what is counted: ``connect_failed``, ``connection_lost``, ``timeout``,
            ``stream_error`` (an error event inside the stream), ``stream_cut`` (the stream ended
            before its usage), ``bad_reply`` (not what the API promises) or ``http_<status>``.
        message: for people.
        retryable: whether the same turn may be sent again.
        retry_after_s: what the server asked for, in wall seconds.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        retryable: bool = True,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.retryable = retryable
        self.retry_after_s = retry_after_s
