"""One board's joules, from a counter or from its power. Pure: times and readings are arguments."""

from __future__ import annotations

from typing import Final

#: No board draws more, transients included: what says so is a counter that jumped. (The largest
#: announced boards are rated at 1,400 W.)
MAX_BOARD_W: Final = 3000.0
#: Counters are updated every 20 to 100 ms: a reading may bring that much more than its time.
_LATE_S: Final = 0.5
#: A counter of millijoules ends at one of these: NVML's type has 64 bits, some boards count 32.
_WRAPS_MJ: Final = (2**32, 2**64)


class BoardMeter:
    """Cumulative joules of one board.

    Args:
        max_gap_s: power read further apart says nothing about the time between.

    Attributes:
        joules: since the first reading; never goes down.
        missing_s: time whose joules are not known.
        resets: times the counter began anew (driver reloaded, board reset).
    """

    __slots__ = ("_energy", "_max_gap_s", "_power", "joules", "missing_s", "resets")

    def __init__(self, *, max_gap_s: float) -> None:
        self.joules = 0.0
        self.missing_s = 0.0
        self.resets = 0
        self._max_gap_s = max_gap_s
        self._energy: tuple[float, int] | None = None
        self._power: tuple[float, float] | None = None

    def energy(self, at_s: float, counter_mj: int) -> None:
        """The board's own counter.

        Also after a gap: the counter went on without us. One that went back wrapped, if that
        explains it, or began at zero: then what it has counted since is known, and what was
        used before, since the last reading, is not.

        Args:
            at_s: time of the reading.
            counter_mj: millijoules.
        """
        last, self._energy = self._energy, (at_s, counter_mj)
        if last is None:
            return
        gap_s = at_s - last[0]
        limit_mj = (gap_s + _LATE_S) * MAX_BOARD_W * 1e3
        grown_mj = counter_mj - last[1]
        if grown_mj < 0:
            wrapped = [grown_mj + top for top in _WRAPS_MJ if 0 <= grown_mj + top <= limit_mj]
            if wrapped:
                grown_mj = wrapped[0]
            else:
                grown_mj = counter_mj
                self.resets += 1
                self.missing_s += gap_s
        if grown_mj > limit_mj:
            self.resets += 1
            self.missing_s += gap_s
            return
        self.joules += grown_mj / 1e3

    def power(self, at_s: float, power_mw: int) -> None:
        """The board's power now: integrated by trapezoids over gaps of at most ``max_gap_s``.

        Args:
            at_s: time of the reading.
            power_mw: milliwatts.
        """
        watts = power_mw / 1e3
        if watts > MAX_BOARD_W:  # nonsense: as if it had not been read
            return
        last, self._power = self._power, (at_s, watts)
        if last is None:
            return
        gap_s = at_s - last[0]
        if gap_s > self._max_gap_s:
            self.missing_s += gap_s
        else:
            self.joules += gap_s * (last[1] + watts) / 2.0
