"""A link that carries one transfer at a time, in order."""

from __future__ import annotations


class SerialLink:
    """Transfers queue behind each other; the caller brings the time each takes alone.

    Attributes:
        busy_s: time of all transfers so far, those that wait included.
    """

    __slots__ = ("_free_s", "busy_s")

    def __init__(self) -> None:
        self._free_s = 0.0
        self.busy_s = 0.0

    def reserve(self, now_s: float, duration_s: float) -> float:
        """Append a transfer; returns when it will be over."""
        self.busy_s += duration_s
        self._free_s = max(self._free_s, now_s) + duration_s
        return self._free_s
