"""Ctrl-C and SIGTERM of a command in the foreground: once to stop, twice to stop at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable


class StopSignals:
    """Listens from its making on, in the running event loop.

    Attributes:
        stopping: set by the first signal.
        count: signals so far.

    Args:
        kill: called by every signal after the first.
    """

    def __init__(self, kill: Callable[[], None]) -> None:
        self.stopping = asyncio.Event()
        self.count = 0
        self._kill = kill
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._received)

    def _received(self) -> None:
        self.count += 1
        if self.count > 1:
            self._kill()
        self.stopping.set()
