"""How long one step of an engine takes, from its hardware profile. Times in seconds.

A step computes prompt chunks, decodes one token for each running request, or both:

* **prefill** of several chunks together: one prefill of their total length on the *equivalent*
  prefix, the one that gives the same number of (query, key) pairs. Fixed costs are paid once and
  attention is neither lost nor counted twice;
* **decode**: from the batch and the KV tokens read, piecewise linear in the latter; stretched
  where the board's power limit is below what the batch would draw (``power.py``);
* **mixed**: ``mixed_slowdown × (prefill + decode)``. The sum is the assumption, the factor says
  how far reality departs from it; with a measured table of slowdowns (``mixed.py``), that times
  the factor.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Final, NamedTuple

from conserve_serving.engines.profile import (
    DecodeKnee,
    DecodeTable,
    HardwareProfile,
    PrefillTable,
)

#: More KV tokens than any engine holds.
_ALWAYS: Final = 1e15


class DecodeLine(NamedTuple):
    """``base_s + s_per_kv_token · kv`` holds while ``kv <= until_kv_tokens``."""

    base_s: float
    s_per_kv_token: float
    until_kv_tokens: float


class StepTimes:
    """Step times of one profile; remembers the decode curve of every batch it was asked for."""

    __slots__ = ("_curves", "_profile")

    def __init__(self, profile: HardwareProfile) -> None:
        """Args: the engine's profile."""
        self._profile = profile
        self._curves: dict[int, list[DecodeLine]] = {}

    def prefill_s(self, new_tokens: int, prefix_tokens: float = 0.0) -> float:
        """Time of a step that computes ``new_tokens`` after ``prefix_tokens`` of cached prompt.

        ``prefix_tokens`` may be negative (see the module's first rule); between and beyond the
        profile's grid the time is linear in each of the two.
        """
        if new_tokens <= 0:
            return 0.0
        form = self._profile.prefill
        if isinstance(form, PrefillTable):
            # Tokens below the first row cost what the first row does: a step has a floor.
            return max(_bilinear(form, max(new_tokens, form.new_tokens[0]), prefix_tokens), 1e-6)
        prefix = max(prefix_tokens, 0.0)
        scan_us = form.us_per_prefix_token * prefix_tokens
        if prefix <= form.knee_tokens:
            few_ms = form.floor_ms
        else:
            few_ms = form.offset_ms + form.us_per_prefix_token * prefix / 1e3
        return max(few_ms / 1e3, (form.us_per_new_token * new_tokens + scan_us) / 1e6)

    def prefill_batch_s(self, chunks: Iterable[tuple[int, int]]) -> float:
        """Time of a step that computes these ``(new_tokens, prefix_tokens)`` chunks together."""
        total = 0
        pairs = 0.0
        for new, prefix in chunks:
            total += new
            pairs += new * (prefix + new / 2)
        if not total:
            return 0.0
        return self.prefill_s(total, pairs / total - total / 2)

    def decode_s(self, batch: int, kv_tokens: float) -> float:
        """Time of a step that decodes one token for ``batch`` requests holding ``kv_tokens``."""
        if batch <= 0:
            return 0.0
        line = self.decode_line(batch, kv_tokens)
        return line.base_s + line.s_per_kv_token * kv_tokens

    def decode_line(self, batch: int, kv_tokens: float) -> DecodeLine:
        """The straight piece of the decode curve of ``batch`` that holds at ``kv_tokens``."""
        curve = self._curves.get(batch)
        if curve is None:
            curve = self._curves[batch] = self._curve(batch)
        for line in curve:
            if kv_tokens <= line.until_kv_tokens:
                return line
        return curve[-1]

    def mixed_s(
        self,
        prefill_s: float,
        decode_s: float,
        *,
        chunk_tokens: int,
        batch: int,
        kv_tokens: float,
    ) -> float:
        """Time of a step that does both.

        Args:
            prefill_s, decode_s: its parts, each alone.
            chunk_tokens: prompt tokens it computes.
            batch, kv_tokens: requests that decode, and the KV they read.
        """
        return self.mixed_slowdown(chunk_tokens, batch, kv_tokens) * (prefill_s + decode_s)

    def mixed_slowdown(self, chunk_tokens: int, batch: int, kv_tokens: float) -> float:
        """What the sum of the parts of such a step is multiplied by."""
        table = self._profile.mixed
        if table is None or batch <= 0:
            return self._profile.mixed_slowdown
        return self._profile.mixed_slowdown * table.at(chunk_tokens, batch, kv_tokens / batch)

    def _curve(self, batch: int) -> list[DecodeLine]:
        form = self._profile.decode
        curve = _table_curve(form, batch) if isinstance(form, DecodeTable) else _knee(form, batch)
        stretch = self._profile.power.decode_stretch(batch)
        if stretch == 1.0:
            return curve
        return [
            DecodeLine(line.base_s * stretch, line.s_per_kv_token * stretch, line.until_kv_tokens)
            for line in curve
        ]


def _knee(form: DecodeKnee, batch: int) -> list[DecodeLine]:
    floor_s = _interpolate(form.floor_batch, form.floor_ms, batch) / 1e3
    base_s = form.line_ms / 1e3 + form.line_us_per_request * batch / 1e6
    slope_s = form.line_us_per_kv_token / 1e6
    knee = (floor_s - base_s) / slope_s
    return [DecodeLine(floor_s, 0.0, knee), DecodeLine(base_s, slope_s, _ALWAYS)]


def _table_curve(form: DecodeTable, batch: int) -> list[DecodeLine]:
    """Knots at ``batch · ctx``; below the first column the first slope goes on, above the last."""
    overhead = form.overhead_ms + form.overhead_ms_per_request * batch
    kv = [batch * ctx for ctx in form.ctx_tokens]
    ms = [
        _interpolate(form.batch, [row[column] for row in form.ms], batch) + overhead
        for column in range(len(kv))
    ]
    lines = []
    for i in range(len(kv) - 1):
        slope = (ms[i + 1] - ms[i]) / (kv[i + 1] - kv[i])
        until = float(kv[i + 1]) if i + 2 < len(kv) else _ALWAYS
        if i == 0:
            slope = max(slope, 0.0)  # noise of the table must not make an empty batch slow
        if i + 2 == len(kv):
            slope = max(slope, 0.0)
        lines.append(DecodeLine((ms[i] - slope * kv[i]) / 1e3, slope / 1e3, until))
    return lines


def _interpolate(axis: tuple[int, ...], values: Iterable[float], at: float) -> float:
    """Linear between and beyond the axis' last two points; constant before its first."""
    points = list(values)
    if at <= axis[0]:
        return points[0]
    i = min(bisect_right(axis, at), len(axis) - 1) - 1
    share = (at - axis[i]) / (axis[i + 1] - axis[i])
    return points[i] + share * (points[i + 1] - points[i])


def _bilinear(form: PrefillTable, new: float, prefix: float) -> float:
    rows, columns, ms = form.new_tokens, form.prefix_tokens, form.ms
    i = min(max(bisect_right(rows, new), 1), len(rows) - 1) - 1
    j = min(max(bisect_right(columns, prefix), 1), len(columns) - 1) - 1
    down = (new - rows[i]) / (rows[i + 1] - rows[i])
    right = (prefix - columns[j]) / (columns[j + 1] - columns[j])
    upper = ms[i][j] + right * (ms[i][j + 1] - ms[i][j])
    lower = ms[i + 1][j] + right * (ms[i + 1][j + 1] - ms[i + 1][j])
    return (upper + down * (lower - upper)) / 1e3
