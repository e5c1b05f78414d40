"""What a supervised process says of itself: lines of JSON among the rest of its output.

{"ready": true, "port": N}                           it listens
{"note": text}                                       what it is at, while it starts
{"failed": what, "remedy": text, "evidence": line}   its last line: why it ends
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LOG_TAIL_LINES = 12
_TAIL_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Ready:
    """It listens on ``port``."""

    port: int


@dataclass(frozen=True, slots=True)
class Note:
    """What it is at."""

    text: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Why it ends, what to do about it, and the line of its log that shows it (or nothing)."""

    what: str
    remedy: str
    evidence: str


def parse(line: bytes) -> Ready | Note | Failed | None:
    """What a line of output says to the supervisor; None: it is just output."""
    if not line.startswith(b"{"):
        return None
    try:
        message = json.loads(line)
    except ValueError:
        return None
    if not isinstance(message, dict):
        return None
    port = message.get("port")
    if message.get("ready") is True and isinstance(port, int):
        return Ready(port)
    if isinstance(message.get("note"), str):
        return Note(message["note"])
    if isinstance(message.get("failed"), str):
        return Failed(
            message["failed"], str(message.get("remedy", "")), str(message.get("evidence", ""))
        )
    return None


def last_failure(path: Path) -> Failed | None:
    """Why the process ended, when the last line of its log says so."""
    lines = _tail(path).rstrip().splitlines()
    said = parse(lines[-1].encode()) if lines else None
    return said if isinstance(said, Failed) else None


def log_tail(path: Path, *, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log, or an empty string where there is none."""
    return "\n".join(_tail(path).rstrip().splitlines()[-lines:])


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as log:
            log.seek(0, 2)
            log.seek(max(0, log.tell() - _TAIL_BYTES))
            return log.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


_PORT_TAKEN: Final = re.compile(r"address already in use|errno 98\b", re.IGNORECASE)


def says_port_taken(text: str) -> bool:
    """Whether a program's last words are that its port is taken."""
    return _PORT_TAKEN.search(text) is not None
