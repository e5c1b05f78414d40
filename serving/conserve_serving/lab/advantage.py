"""Comparative advantage: which phase of a turn a GPU is least bad at, against another."""

from __future__ import annotations

from dataclasses import dataclass

from conserve_serving.engines.profile import HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantage:
    """How many times as long an engine takes as a reference, phase by phase.

    A tier is worth dedicating where its disadvantage is least: a strong engine should prefill for
    others that are, relative to it, better at what remains.

    Attributes:
        prefill: a cold prompt of 8,192 tokens.
        decode_alone: a decode step of one short request: weights, launches.
        kv_read: what a decode step grows by per KV token read.
    """

    prefill: float
    decode_alone: float
    kv_read: float

    @property
    def favours_prefill(self) -> bool:
        """Whether the reference is ahead by more in prefill than in both parts of decode."""
        return self.prefill > max(self.decode_alone, self.kv_read)


def advantage(profile: HardwareProfile, reference: HardwareProfile) -> Advantage:
    """Slowdown of ``profile`` against ``reference``: above 1 where the reference is faster."""
    one, other = profile.speeds(), reference.speeds()
    return Advantage(
        prefill=other.prefill_tokens_per_s / one.prefill_tokens_per_s,
        decode_alone=one.decode_step_s / other.decode_step_s,
        kv_read=one.decode_step_s_per_kv_token / other.decode_step_s_per_kv_token,
    )
