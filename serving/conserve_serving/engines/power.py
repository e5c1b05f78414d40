"""The power model of one GPU board, and the joules an engine has used by state.

``P(decode, batch) = p0 + (ps − p0) · (1 − exp(−batch / h))``; prefill and idle are constants. A
step that mixes both draws each part's power for that part's share of the step. Constants and
their confidence stand in the profile (``docs/profiles.md``); the result is modelled energy, GPU
board only, host not included.
"""

from __future__ import annotations

import math

import msgspec

from conserve_serving.engines.model_types import EnergyJ


class PowerModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Watts of one GPU board.

    Attributes:
        idle_w: model loaded, nothing running.
        prefill_w: compute-bound prefill.
        decode_p0_w, decode_ps_w: decode at an empty and at a saturated batch.
        decode_h: batch scale of the saturation, in requests.
        boards: GPU boards the engine spans (its tensor parallelism).
    """

    idle_w: float
    prefill_w: float
    decode_p0_w: float
    decode_ps_w: float
    decode_h: float
    boards: int = 1

    def decode_w(self, batch: float) -> float:
        """Watts while ``batch`` requests decode (a mean, perhaps), all boards together."""
        saturation = 1.0 - math.exp(-batch / self.decode_h)
        return self.boards * (self.decode_p0_w + (self.decode_ps_w - self.decode_p0_w) * saturation)


class EnergyMeter:
    """Integrates power over model time. Negative durations are a caller's bug and are refused."""

    __slots__ = ("_decode_j", "_idle_j", "_mixed_j", "_power", "_prefill_j")

    def __init__(self, power: PowerModel) -> None:
        """Args: the board's power model."""
        self._power = power
        self._idle_j = self._prefill_j = self._decode_j = self._mixed_j = 0.0

    def idle(self, duration_s: float) -> None:
        """Nothing ran for ``duration_s``."""
        self._idle_j += self._power.boards * self._power.idle_w * duration_s

    def step(self, duration_s: float, *, prefill_share: float, decode_batch: int) -> None:
        """A step ran: ``prefill_share`` of it prefill (0 to 1), the rest decode of the batch."""
        if duration_s < 0.0 or not 0.0 <= prefill_share <= 1.0:
            raise ValueError(f"step of {duration_s} s with prefill share {prefill_share}")
        if prefill_share >= 1.0:
            self._prefill_j += self._power.boards * self._power.prefill_w * duration_s
            return
        decode_w = self._power.decode_w(decode_batch)
        if prefill_share <= 0.0:
            self._decode_j += decode_w * duration_s
            return
        prefill_w = self._power.boards * self._power.prefill_w
        mean_w = prefill_w * prefill_share + decode_w * (1.0 - prefill_share)
        self._mixed_j += mean_w * duration_s

    def reading(self) -> EnergyJ:
        """Joules so far."""
        return EnergyJ(
            idle_j=self._idle_j,
            prefill_j=self._prefill_j,
            decode_j=self._decode_j,
            mixed_j=self._mixed_j,
        )
