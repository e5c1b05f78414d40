"""Joules of a real engine on hardware that is not measured: its profile's power × its busy time."""

from __future__ import annotations

from conserve_serving.energy.work import Steps, Weights
from conserve_serving.engines.power import PowerModel
from conserve_serving.engines.profile import HardwareProfile


def describe_source(profile: HardwareProfile) -> str:
    """How figures of this profile's power model are labelled, everywhere."""
    return f"modelled: {profile.name} ({profile.parts['power'].confidence.value})"


class ModelledMeter:
    """Cumulative joules: idle power while nothing runs, the step's own power while it runs.

    A step that mixes prefill and decode counts as prefill, as engines report it; decode power is
    that of the mean batch. Counted step time may run ahead of or behind the clock by one step:
    idle time is what the clock has in excess of it, over the whole run.
    """

    __slots__ = ("_busy_s", "_elapsed_s", "_idle_s", "_power", "joules")

    def __init__(self, power: PowerModel) -> None:
        """Args: the power model of the engine's boards."""
        self._power = power
        self._busy_s = self._elapsed_s = self._idle_s = 0.0
        self.joules = 0.0

    def add(self, steps: Steps, duration_s: float) -> None:
        """The engine counted ``steps`` in the last ``duration_s`` seconds."""
        power = self._power
        self._elapsed_s += duration_s
        self._busy_s += steps.busy_s
        idle_s = max(0.0, self._elapsed_s - self._busy_s - self._idle_s)
        self._idle_s += idle_s
        self.joules += idle_s * power.boards * power.idle_w
        self.joules += steps.prefill_s * power.boards * power.prefill_w
        self.joules += steps.decode_s * power.decode_w(_mean_batch(steps))


def phase_weights(power: PowerModel) -> Weights:
    """What a second of prefill and one of decode cost beyond idling, by a power model."""

    def weights(steps: Steps) -> tuple[float, float]:
        idle_w = power.boards * power.idle_w
        prefill_w = power.boards * power.prefill_w - idle_w
        decode_w = power.decode_w(_mean_batch(steps)) - idle_w
        return (prefill_w, decode_w) if prefill_w > 0 and decode_w > 0 else (1.0, 1.0)

    return weights


def _mean_batch(steps: Steps) -> float:
    return steps.decode_batch_sum / steps.decode_steps if steps.decode_steps else 0.0
