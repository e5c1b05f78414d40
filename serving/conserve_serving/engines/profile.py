"""Hardware profiles: what one engine on one kind of GPU can do, as data with its source.

A profile is a JSON file in ``profiles/``, written by ``benchmarks/profiles/make_profiles.py``;
``docs/profiles.md`` explains every figure. Nothing here computes a step time: see ``steptime.py``.
"""

from __future__ import annotations

import enum
import math
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Any, Final, Self

import msgspec

from conserve_serving.core.types import EngineSpeeds, Link
from conserve_serving.engines.errors import ProfileError
from conserve_serving.engines.mixed import MixedTable
from conserve_serving.engines.power import PowerModel

#: Every profile states a confidence and a source for each of these.
PARTS: Final = (
    "prefill",
    "decode",
    "mixed",
    "kv_capacity",
    "host_capacity",
    "host_link",
    "handoff",
    "power",
)


class Confidence(enum.StrEnum):
    """How a figure came about, best first."""

    MEASURED = "measured"
    TABULATED = "tabulated"
    DERIVED = "derived"
    ASSUMED = "assumed"


class PowerLevel(enum.StrEnum):
    """One end of a power model's band, or its middle, which is what runs unless asked."""

    LOW = "low"
    MID = "mid"
    HIGH = "high"


class _Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything read from a profile file: frozen, unknown keys refused by name."""


class Part(_Data, frozen=True):
    """Where one part of a profile comes from."""

    confidence: Confidence
    source: str


class PrefillTable(_Data, frozen=True, tag_field="kind", tag="table"):
    """Prefill step times on a grid: ``ms[i][j]`` for ``new_tokens[i]`` on ``prefix_tokens[j]``."""

    new_tokens: tuple[int, ...]
    prefix_tokens: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Refuse a grid that cannot be interpolated."""
        _check_grid("new_tokens", self.new_tokens, "prefix_tokens", self.prefix_tokens, self.ms)


class PrefillScan(_Data, frozen=True, tag_field="kind", tag="scan"):
    """Prefill step times from three measured figures.

    A step with few new tokens on a cached prefix takes ``floor_ms`` up to ``knee_tokens`` of
    prefix, then ``offset_ms + us_per_prefix_token · prefix``. A step with many new tokens takes
    ``us_per_new_token · new + us_per_prefix_token · prefix``. The larger of the two holds.
    """

    floor_ms: float
    knee_tokens: int
    offset_ms: float
    us_per_prefix_token: float
    us_per_new_token: float


class DecodeTable(_Data, frozen=True, tag_field="kind", tag="table"):
    """Decode step times on a grid: ``ms[i][j]`` for ``batch[i]`` requests of ``ctx_tokens[j]``.

    ``overhead_ms + overhead_ms_per_request · batch`` is added to every cell: what the engine
    spends on a step outside the kernels that the table covers.
    """

    batch: tuple[int, ...]
    ctx_tokens: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    overhead_ms: float = 0.0
    overhead_ms_per_request: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a grid that cannot be interpolated."""
        _check_grid("batch", self.batch, "ctx_tokens", self.ctx_tokens, self.ms)


class DecodeKnee(_Data, frozen=True, tag_field="kind", tag="knee"):
    """Decode step times as ``max(floor(batch), line)``: launch-bound below, bandwidth above.

    ``floor`` is ``floor_ms`` interpolated over ``floor_batch``; the line is
    ``line_ms + line_us_per_request · batch + line_us_per_kv_token · kv``.
    """

    floor_batch: tuple[int, ...]
    floor_ms: tuple[float, ...]
    line_ms: float
    line_us_per_request: float
    line_us_per_kv_token: float

    def __post_init__(self) -> None:
        """Refuse a floor that cannot be interpolated."""
        if len(self.floor_batch) != len(self.floor_ms) or len(self.floor_batch) < 2:
            raise ValueError("floor_batch and floor_ms need the same length, at least 2")
        _check_rising("floor_batch", self.floor_batch)


class HandoffAffine(_Data, frozen=True, tag_field="kind", tag="affine"):
    """KV leaves over a link in ``setup_ms + bytes / bytes_per_s``.

    ``via_store``: it goes to a store in host memory, and the receiver then loads it over its own
    host link; otherwise it goes from device to device and the receiver pays nothing more.
    """

    setup_ms: float
    bytes_per_s: float
    via_store: bool = True

    def __post_init__(self) -> None:
        """Refuse a link that carries nothing."""
        if self.bytes_per_s <= 0 or self.setup_ms < 0:
            raise ValueError("bytes_per_s must be positive and setup_ms not negative")


class HandoffFit(_Data, frozen=True, tag_field="kind", tag="fit"):
    """A measured hand-off, device to device: the receiver pays nothing more.

    ``floor_ms`` up to ``floor_tokens``, then ``offset_ms + us_per_token · tokens``.
    """

    floor_ms: float
    floor_tokens: int
    offset_ms: float
    us_per_token: float


class GridCell(_Data, frozen=True):
    """One measured decode step: median over a run."""

    batch: int
    ctx_tokens: int
    kv_tokens: int
    ms: float


class HardwareProfile(_Data, frozen=True):
    """One engine: a model on one kind of GPU.

    Attributes:
        name, gpu, model: as people name them; ``tensor_parallel`` GPUs make one engine.
        source: one sentence for reports.
        parts: confidence and source of each part named in ``PARTS``.
        kv_capacity_tokens: KV tokens the device holds.
        host_capacity_tokens: KV tokens the host tier holds beside its mirror of the device.
        kv_bytes_per_token: KV bytes of one token, all layers, all GPUs.
        max_context_tokens: longest prompt plus output.
        chunk_tokens: token budget of one step.
        mixed_slowdown: time of a step with prefill and decode over the sum of the two alone; with
            a measured table ``mixed``, over what that table says (1.0: as measured).
        host_link_bytes_per_s: host to device, for parked KV and for KV from the store.
        power_low, power_high: the least and the most that the power may be (docs/profiles.md);
            None: a quarter less and more than ``power``.
        decode_grid: measured cells the decode part was fitted to; empty where it is a table.
    """

    name: str
    gpu: str
    model: str
    tensor_parallel: int
    source: str
    parts: dict[str, Part]
    kv_capacity_tokens: int
    host_capacity_tokens: int
    kv_bytes_per_token: int
    max_context_tokens: int
    chunk_tokens: int
    mixed_slowdown: float
    host_link_bytes_per_s: float
    prefill: PrefillTable | PrefillScan
    decode: DecodeTable | DecodeKnee
    handoff: HandoffAffine | HandoffFit
    power: PowerModel
    power_low: PowerModel | None = None
    power_high: PowerModel | None = None
    mixed: MixedTable | None = None
    decode_grid: tuple[GridCell, ...] = ()

    def __post_init__(self) -> None:
        """Refuse figures that no engine can have, naming the field."""
        missing = [part for part in PARTS if part not in self.parts]
        if missing:
            raise ValueError(f"parts lacks {', '.join(missing)}: give confidence and source")
        for field in (
            "tensor_parallel",
            "kv_capacity_tokens",
            "kv_bytes_per_token",
            "max_context_tokens",
            "chunk_tokens",
            "host_link_bytes_per_s",
        ):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} is {getattr(self, field)}: it must be positive")
        if self.host_capacity_tokens < 0:
            raise ValueError(f"host_capacity_tokens is {self.host_capacity_tokens}: 0 means none")
        if self.mixed_slowdown <= 0:
            raise ValueError(f"mixed_slowdown is {self.mixed_slowdown}: 1.0 means none")

    def replace(self, **changes: Any) -> Self:
        """A copy with these fields changed and checked.

        Raises:
            ProfileError: a field does not exist or its value is impossible.
        """
        try:
            return msgspec.structs.replace(self, **changes)
        except (TypeError, ValueError) as error:
            raise ProfileError(f"profile {self.name}: {error}") from error

    def power_at(self, level: PowerLevel) -> PowerModel:
        """The power model at one end of its band, or in its middle."""
        if level is PowerLevel.MID:
            return self.power
        given = self.power_low if level is PowerLevel.LOW else self.power_high
        return given or _scaled(self.power, 0.75 if level is PowerLevel.LOW else 1.25)

    def capped(self, cap_w: float, *, exponent: float = 1.0) -> Self:
        """The same engine with each board's power limited to ``cap_w``.

        Prefill is bound by compute: its steps take longer by the share of power they miss. Decode
        steps of batches that stay below the limit take what they did, the others longer by
        ``(watts / cap_w) ** exponent``. Both are assumptions (docs/profiles.md).

        Raises:
            ProfileError: the limit is not above idle power, or the exponent not between 0 and 1.
        """
        stretch = max(1.0, self.power.prefill_w / cap_w) if cap_w > 0 else 1.0
        note = f"; limited to {cap_w:g} W (derived: prefill {stretch:.2f} times as long)"
        parts = dict(self.parts)
        for name in ("prefill", "decode"):
            confidence = max(parts[name].confidence, Confidence.DERIVED, key=_doubt)
            parts[name] = Part(confidence=confidence, source=parts[name].source + note)
        parts["power"] = Part(
            confidence=Confidence.ASSUMED, source=f"{parts['power'].source}; limited to {cap_w:g} W"
        )
        try:
            bands = {
                field: self.power_at(level).capped(cap_w, exponent=exponent)
                for field, level in _BANDS.items()
            }
        except ValueError as error:
            raise ProfileError(f"profile {self.name}: {error}") from error
        return self.replace(
            name=f"{self.name}@{cap_w:g}W",
            parts=parts,
            prefill=_stretched(self.prefill, stretch),
            **bands,
        )

    def handoff_s(self, tokens: int) -> float:
        """Seconds for ``tokens`` of KV to leave this engine, on an idle link."""
        if tokens <= 0:
            return 0.0
        form = self.handoff
        if isinstance(form, HandoffAffine):
            return form.setup_ms / 1e3 + tokens * self.kv_bytes_per_token / form.bytes_per_s
        if tokens <= form.floor_tokens:
            return form.floor_ms / 1e3
        return form.offset_ms / 1e3 + form.us_per_token / 1e6 * tokens

    def ingress_s(self, tokens: int) -> float:
        """Seconds for ``tokens`` of KV from the store to reach this device, on an idle link."""
        form = self.handoff
        return self.restore_s(tokens) if isinstance(form, HandoffAffine) and form.via_store else 0.0

    def restore_s(self, tokens: int) -> float:
        """Seconds to bring ``tokens`` of parked KV back from the host, on an idle link."""
        return tokens * self.kv_bytes_per_token / self.host_link_bytes_per_s

    def link(self) -> Link:
        """The whole hand-off, out and in, as the scheduler counts it: set-up plus bytes.

        A measured fit's floor for short prompts does not fit that form and is left out.
        """
        form = self.handoff
        if isinstance(form, HandoffAffine):
            per_byte_s = 1.0 / form.bytes_per_s
            if form.via_store:
                per_byte_s += 1.0 / self.host_link_bytes_per_s
            setup_s = form.setup_ms / 1e3
        else:
            per_byte_s = form.us_per_token / 1e6 / self.kv_bytes_per_token
            setup_s = form.offset_ms / 1e3
        return Link(
            setup_s=setup_s,
            bytes_per_s=1.0 / per_byte_s,
            kv_bytes_per_token=self.kv_bytes_per_token,
        )

    def speeds(self) -> EngineSpeeds:
        """What the scheduler assumes of this engine before it has reported anything.

        Prefill speed is that of a cold prompt of 8,192 tokens in this engine's chunks; the decode
        line goes through an empty batch of 1 and a batch of 16 that fills half the KV; that batch
        beside a whole chunk gives the slowdown of mixed steps.
        """
        from conserve_serving.engines.steptime import StepTimes  # noqa: PLC0415 - it imports us

        times = StepTimes(self)
        prompt, at, prefill_s = 8192, 0, 0.0
        while at < prompt:
            new = min(self.chunk_tokens, prompt - at)
            prefill_s += times.prefill_s(new, at)
            at += new
        half = self.kv_capacity_tokens // 2
        return EngineSpeeds(
            prefill_tokens_per_s=prompt / prefill_s,
            decode_step_s=times.decode_s(1, 1),
            decode_step_s_per_kv_token=(times.decode_s(16, half) - times.decode_s(16, 16)) / half,
            mixed_slowdown=times.mixed_slowdown(self.chunk_tokens, 16, half),
        )


_BANDS: Final = {
    "power_low": PowerLevel.LOW,
    "power": PowerLevel.MID,
    "power_high": PowerLevel.HIGH,
}


def _doubt(confidence: Confidence) -> int:
    return list(Confidence).index(confidence)


def _scaled(power: PowerModel, factor: float) -> PowerModel:
    """Every figure in watts times ``factor``, within the board's limit."""
    watts = ("idle_w", "prefill_w", "decode_p0_w", "decode_ps_w")
    top_w = math.inf if power.cap_w is None else power.cap_w
    return msgspec.structs.replace(
        power, **{name: min(getattr(power, name) * factor, top_w) for name in watts}
    )


def _stretched(form: PrefillTable | PrefillScan, factor: float) -> PrefillTable | PrefillScan:
    """Prefill steps that take ``factor`` times as long."""
    if isinstance(form, PrefillTable):
        ms = tuple(tuple(value * factor for value in row) for row in form.ms)
        return msgspec.structs.replace(form, ms=ms)
    times = ("floor_ms", "offset_ms", "us_per_prefix_token", "us_per_new_token")
    return msgspec.structs.replace(form, **{name: getattr(form, name) * factor for name in times})


def _check_rising(name: str, values: tuple[int, ...]) -> None:
    if any(later <= earlier for earlier, later in pairwise(values)):
        raise ValueError(f"{name} must rise")


def _check_grid(
    row_name: str,
    rows: tuple[int, ...],
    column_name: str,
    columns: tuple[int, ...],
    ms: tuple[tuple[float, ...], ...],
) -> None:
    for name, axis in ((row_name, rows), (column_name, columns)):
        if len(axis) < 2:
            raise ValueError(f"{name} needs at least 2 values")
        _check_rising(name, axis)
    if len(ms) != len(rows) or any(len(row) != len(columns) for row in ms):
        raise ValueError(f"ms must have {len(rows)} rows of {len(columns)} values")
    if any(value <= 0 for row in ms for value in row):
        raise ValueError("ms must be positive")


def list_profiles() -> list[str]:
    """Names of the profiles that come with the package, sorted."""
    folder = resources.files("conserve_serving.engines") / "profiles"
    return sorted(
        entry.name.removesuffix(".json")
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    )


def parse_profile(data: bytes, *, origin: str) -> HardwareProfile:
    """A profile from JSON.

    Args:
        data: the file's bytes.
        origin: how to name the file in an error.

    Raises:
        ProfileError: it is not JSON, or a field is missing, unknown or impossible.
    """
    try:
        return msgspec.json.decode(data, type=HardwareProfile)
    except msgspec.DecodeError as error:
        raise ProfileError(f"profile {origin}: {error}") from error


@cache
def load_profile(name: str) -> HardwareProfile:
    """One of the profiles that come with the package.

    Raises:
        ProfileError: there is none of that name.
    """
    names = list_profiles()
    if name not in names:
        raise ProfileError(f"no hardware profile {name!r}: choose one of {', '.join(names)}")
    path = resources.files("conserve_serving.engines") / "profiles" / f"{name}.json"
    return parse_profile(path.read_bytes(), origin=name)
