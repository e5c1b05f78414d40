"""SGLang's output on its way to the log: whole lines, the last of them kept, stages noticed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

#: Lines kept to find out why it ended: tensor-parallel ranks repeat each other's tracebacks.
_KEPT_LINES: Final = 600
#: What SGLang says at each stage of starting → what we say of it.
_STAGES: Final = (
    ("Load weight begin", "loading weights"),
    ("Load weight end", "weights are loaded"),
    ("KV Cache is allocated", "KV cache is allocated"),
    ("Capture cuda graph begin", "capturing CUDA graphs"),
    ("Capture cuda graph end", "CUDA graphs are captured"),
)


class Relay:
    """Passes a program's output on in whole lines, and remembers the last of them.

    Args:
        write: takes one line, with its end.
        note: told when the program enters another stage of starting.
    """

    def __init__(self, write: Callable[[bytes], None], note: Callable[[str], None]) -> None:
        self._write = write
        self._note = note
        self._rest = b""
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._stage = ""

    @property
    def lines(self) -> list[str]:
        """The last lines, oldest first."""
        return list(self._lines)

    def forget(self) -> None:
        """What was said so far explains nothing that happens from now on."""
        self._lines.clear()

    def feed(self, chunk: bytes) -> None:
        """Take output; progress bars, which end in a carriage return, become lines."""
        *lines, self._rest = (self._rest + chunk).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            if line.strip():
                self._take(line)

    def end(self) -> None:
        """Pass on what was left without an end."""
        if self._rest.strip():
            self._take(self._rest)
        self._rest = b""

    def _take(self, line: bytes) -> None:
        self._write(line + b"\n")
        text = line.decode("utf-8", "replace")
        self._lines.append(text)
        for said, stage in _STAGES:
            if said in text and stage != self._stage:  # every rank says it
                self._stage = stage
                self._note(stage)
