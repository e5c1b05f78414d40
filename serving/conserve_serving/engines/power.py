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
        cap_w: power limit of a board, None: its rated one. Idle and prefill watts are the limited
            ones (:meth:`capped` sees to it), decode is limited by batch.
        cap_exponent: how much longer a decode step takes that would draw ``w`` above the limit:
            ``(w / cap_w) ** cap_exponent``. 1: as much as it is short of power, energy per token
            stays; 0: not at all, as where memory and not the clock is what it waits for.
    """

    idle_w: float
    prefill_w: float
    decode_p0_w: float
    decode_ps_w: float
    decode_h: float
    boards: int = 1
    cap_w: float | None = None
    cap_exponent: float = 1.0

    def decode_w(self, batch: float) -> float:
        """Watts while ``batch`` requests decode (a mean, perhaps), all boards together."""
        wanted_w = self._wanted_w(batch)
        return self.boards * (wanted_w if self.cap_w is None else min(wanted_w, self.cap_w))

    def decode_stretch(self, batch: float) -> float:
        """Duration of a decode step of ``batch`` requests over what it is without the limit."""
        if self.cap_w is None:
            return 1.0
        return float(max(1.0, self._wanted_w(batch) / self.cap_w) ** self.cap_exponent)

    def capped(self, cap_w: float, *, exponent: float = 1.0) -> PowerModel:
        """The same board limited to ``cap_w``; what that costs in time is up to the caller.

        Raises:
            ValueError: the limit is not above idle power, or the exponent not between 0 and 1.
        """
        if cap_w <= self.idle_w:
            raise ValueError(f"cap_w is {cap_w}: it must be above idle power, {self.idle_w} W")
        if not 0.0 <= exponent <= 1.0:
            raise ValueError(f"cap_exponent is {exponent}: it must be between 0 and 1")
        return msgspec.structs.replace(
            self, prefill_w=min(self.prefill_w, cap_w), cap_w=cap_w, cap_exponent=exponent
        )

    def _wanted_w(self, batch: float) -> float:
        saturation = 1.0 - math.exp(-batch / self.decode_h)
        return self.decode_p0_w + (self.decode_ps_w - self.decode_p0_w) * saturation


class StateSeconds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds by what an engine did; with them :func:`reprice` knows its energy.

    Attributes:
        idle_s: nothing ran.
        prefill_s: steps that only computed prompts.
        decode_s: steps that only decoded, by batch size.
        mixed_prefill_s, mixed_decode_s: steps that did both, as shares of their time: the
            prompts' and, by batch size, the decodes'.
    """

    idle_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: dict[int, float] = {}
    mixed_prefill_s: float = 0.0
    mixed_decode_s: dict[int, float] = {}

    @property
    def mixed_s(self) -> float:
        """Steps that did both."""
        return self.mixed_prefill_s + sum(self.mixed_decode_s.values())

    @property
    def busy_s(self) -> float:
        """All steps."""
        return self.prefill_s + sum(self.decode_s.values()) + self.mixed_s

    @property
    def total_s(self) -> float:
        """Steps and idle time."""
        return self.idle_s + self.busy_s


def reprice(seconds: StateSeconds, power: PowerModel) -> EnergyJ:
    """Joules of the same work under a power model, the one it ran with or another."""

    def decode_j(by_batch: dict[int, float]) -> float:
        return sum(power.decode_w(batch) * spent_s for batch, spent_s in by_batch.items())

    prefill_w = power.boards * power.prefill_w
    return EnergyJ(
        idle_j=power.boards * power.idle_w * seconds.idle_s,
        prefill_j=prefill_w * seconds.prefill_s,
        decode_j=decode_j(seconds.decode_s),
        mixed_j=prefill_w * seconds.mixed_prefill_s + decode_j(seconds.mixed_decode_s),
    )


class EnergyMeter:
    """Integrates power over model time. Negative durations are a caller's bug and are refused."""

    __slots__ = (
        "_decode_j",
        "_decode_s",
        "_decode_w",
        "_idle_j",
        "_idle_s",
        "_idle_w",
        "_mixed_decode_s",
        "_mixed_j",
        "_mixed_prefill_s",
        "_power",
        "_prefill_j",
        "_prefill_s",
        "_prefill_w",
    )

    def __init__(self, power: PowerModel) -> None:
        """Args: the board's power model."""
        self._power = power
        self._idle_w = power.boards * power.idle_w
        self._prefill_w = power.boards * power.prefill_w
        self._decode_w: dict[int, float] = {}  # by batch size
        self._idle_j = self._prefill_j = self._decode_j = self._mixed_j = 0.0
        self._idle_s = self._prefill_s = self._mixed_prefill_s = 0.0
        self._decode_s: dict[int, float] = {}
        self._mixed_decode_s: dict[int, float] = {}

    def idle(self, duration_s: float) -> None:
        """Nothing ran for ``duration_s``."""
        self._idle_s += duration_s
        self._idle_j += self._idle_w * duration_s

    def step(self, duration_s: float, *, prefill_share: float, decode_batch: int) -> None:
        """A step ran: ``prefill_share`` of it prefill (0 to 1), the rest decode of the batch."""
        if duration_s < 0.0 or not 0.0 <= prefill_share <= 1.0:
            raise ValueError(f"step of {duration_s} s with prefill share {prefill_share}")
        if prefill_share >= 1.0:
            self._prefill_s += duration_s
            self._prefill_j += self._prefill_w * duration_s
            return
        decode_w = self._decode_w.get(decode_batch)
        if decode_w is None:
            decode_w = self._decode_w[decode_batch] = self._power.decode_w(decode_batch)
        if prefill_share <= 0.0:
            self._decode_s[decode_batch] = self._decode_s.get(decode_batch, 0.0) + duration_s
            self._decode_j += decode_w * duration_s
            return
        prefill_s = prefill_share * duration_s
        decode_s = duration_s - prefill_s
        self._mixed_prefill_s += prefill_s
        by_batch = self._mixed_decode_s
        by_batch[decode_batch] = by_batch.get(decode_batch, 0.0) + decode_s
        self._mixed_j += self._prefill_w * prefill_s + decode_w * decode_s

    def reading(self) -> EnergyJ:
        """Joules so far."""
        return EnergyJ(
            idle_j=self._idle_j,
            prefill_j=self._prefill_j,
            decode_j=self._decode_j,
            mixed_j=self._mixed_j,
        )

    def seconds(self) -> StateSeconds:
        """Seconds so far, by state."""
        return StateSeconds(
            idle_s=self._idle_s,
            prefill_s=self._prefill_s,
            decode_s=dict(self._decode_s),
            mixed_prefill_s=self._mixed_prefill_s,
            mixed_decode_s=dict(self._mixed_decode_s),
        )
