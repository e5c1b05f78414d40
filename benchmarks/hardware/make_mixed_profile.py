"""From a result of ``measure.py`` to a table that a hardware profile carries. Needs no torch.

    python benchmarks/hardware/make_mixed_profile.py h100.json                       # show it
    python benchmarks/hardware/make_mixed_profile.py h100.json --profile h100-qwen3-8b --out FILE

The second writes the profile with ``mixed`` filled in and marked *measured*; with ``--power`` also
its power. A result of a CPU, of fewer layers or of another model is refused for that.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from grid import CALLS
from result import ResultError, read_result
from shapes import SHAPES

from conserve_serving.engines.errors import ProfileError
from conserve_serving.engines.mixed import MixedTable
from conserve_serving.engines.power import PowerModel
from conserve_serving.engines.profile import Confidence, HardwareProfile, Part, load_profile

_AXES: Final = ("chunk_tokens", "batch", "ctx_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A table and how far to trust it.

    Attributes:
        table: for the profile.
        cells: measured cells behind it.
        filled: places of the grid that nothing was measured for, taken from their neighbour.
        left_out: chunk sizes with too few cells.
        widest: largest half width of a cell's 95 % interval.
        by_prefix: largest difference between the prefixes of one place and their median.
        drift: largest change of the slowdown between a cell and its repeat; None without repeats.
        repeats: how many there were.
    """

    table: MixedTable
    cells: int
    filled: int
    left_out: tuple[int, ...]
    widest: float
    by_prefix: float
    drift: float | None
    repeats: int

    def in_words(self) -> str:
        """For the profile's source."""
        drift = "no repeats"
        if self.drift is not None:
            drift = f"{self.repeats} repeats within {self.drift:.1%}"
        left_out = ", ".join(map(str, self.left_out))
        return (
            f"{self.cells} cells, 95 % intervals within ±{self.widest:.3f}, prefixes within "
            f"{self.by_prefix:.3f} of their median, {drift}, {self.filled} places filled from "
            "their neighbour" + (f", chunks left out: {left_out}" if left_out else "")
        )


def make_table(result: dict[str, Any], calls: str = CALLS[0]) -> Made:
    """The table of a result.

    Args:
        result: of ``measure.py``, whole.
        calls: the mixed steps that it is of.

    Cells that differ only in the prefix before the chunk become one, their median: the engine
    model does not tell them apart. A place without a cell (no room for so much KV, no time) gets
    the value of the nearest cell of the same chunk. A chunk with cells for less than half of the
    places is left out.

    Raises:
        ResultError: nothing was measured.
    """
    at: dict[tuple[int, ...], list[float]] = defaultdict(list)
    widest = 0.0
    for entry in result["cells"]:
        seen = entry["slowdown"].get(calls)
        if seen is None:
            raise ResultError(f"attention was not measured in {calls}: see --mixed-attention")
        at[tuple(entry["cell"][axis] for axis in _AXES)].append(seen["median"])
        widest = max(widest, (seen["high"] - seen["low"]) / 2)
    if not at:
        raise ResultError("no cell was measured: run measure.py for longer")
    values = {place: statistics.median(seen) for place, seen in at.items()}
    by_prefix = max(abs(s - values[place]) for place, seen in at.items() for s in seen)
    chunks = sorted({place[0] for place in values})
    batches, contexts = (sorted({place[axis] for place in values}) for axis in (1, 2))
    enough = len(batches) * len(contexts) / 2
    kept = [c for c in chunks if sum(place[0] == c for place in values) >= enough] or chunks
    filled = 0
    planes = []
    for chunk in kept:
        rows = []
        for batch in batches:
            row = []
            for ctx in contexts:
                value = values.get((chunk, batch, ctx))
                if value is None:
                    filled += 1
                    value = _neighbour(values, chunk, batch, ctx)
                row.append(round(value, 4))
            rows.append(tuple(row))
        planes.append(tuple(rows))
    changes = [abs(entry["over_first"]["slowdown"][calls] - 1.0) for entry in result["repeats"]]
    return Made(
        table=MixedTable(
            chunk_tokens=tuple(kept),
            batch=tuple(batches),
            ctx_tokens=tuple(contexts),
            slowdown=tuple(planes),
        ),
        cells=len(result["cells"]),
        filled=filled,
        left_out=tuple(chunk for chunk in chunks if chunk not in kept),
        widest=widest,
        by_prefix=by_prefix,
        drift=max(changes, default=None),
        repeats=len(changes),
    )


def _neighbour(values: dict[tuple[int, ...], float], chunk: int, batch: int, ctx: int) -> float:
    """The nearest measured place of the same chunk, by the ratio of its batch and its context."""

    def distance(place: tuple[int, ...]) -> tuple[float, float]:
        across = abs(math.log(place[1] / batch))
        along = abs(math.log(place[2] / ctx))
        return (2 * across + along, place[2])  # contexts are more alike than batches

    return values[min((place for place in values if place[0] == chunk), key=distance)]


def fit_power(result: dict[str, Any], boards: int) -> PowerModel:
    """Watts of the power model (`engines.power`) from the power states of a result.

    Decode is ``p0 + (ps − p0)(1 − exp(−batch / h))``, least squares: for each ``h`` the best ``p0``
    and ``ps`` have a closed form, and ``h`` is looked for on a grid from 0.5 to 256 requests.

    Raises:
        ResultError: idle, prefill or three batches of decode are missing.
    """
    watts = {(entry["state"], entry["batch"]): entry["watts"] for entry in result["power"]}
    decode = sorted((b, w) for (state, b), w in watts.items() if state == "decode")
    idle = watts.get(("idle_loaded", None))
    prefill = [w for (state, _), w in watts.items() if state == "prefill"]
    if idle is None or not prefill or len(decode) < 3:
        raise ResultError(
            "power needs idle_loaded, prefill and at least three batches of decode: "
            "run measure.py with --power-s and more --budget-s"
        )
    fits = (_fit_line(decode, 0.5 * 2 ** (step / 16)) for step in range(16 * 9 + 1))
    _, h, p0, ps = min(fits)
    return PowerModel(
        idle_w=round(idle, 1),
        prefill_w=round(statistics.mean(prefill), 1),
        decode_p0_w=round(p0, 1),
        decode_ps_w=round(ps, 1),
        decode_h=round(h, 2),
        boards=boards,
    )


def _fit_line(points: Sequence[tuple[int, float]], h: float) -> tuple[float, float, float, float]:
    """Squared error, h, p0 and ps of the least squares with this ``h``."""
    xs = [1.0 - math.exp(-batch / h) for batch, _ in points]
    ys = [watts for _, watts in points]
    mean_x, mean_y = statistics.mean(xs), statistics.mean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = 0.0
    if spread > 1e-12:
        slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    p0 = mean_y - slope * mean_x
    error = sum((p0 + slope * x - y) ** 2 for x, y in zip(xs, ys, strict=True))
    return error, h, p0, p0 + slope


def into_profile(
    result: dict[str, Any],
    profile: HardwareProfile,
    *,
    calls: str = CALLS[0],
    power: bool = False,
) -> HardwareProfile:
    """The profile with what was measured in place of what was assumed.

    Its factor ``mixed_slowdown`` becomes 1.0: as measured.

    Args:
        result: of ``measure.py``, whole.
        profile: of the same GPU, model and tensor parallelism.
        calls: the mixed steps that the table is of.
        power: replace the power model as well. Its band is then the usual quarter less and more:
            one board on one day says nothing of others.

    Raises:
        ResultError: it was measured on something else; the message says what differs.
    """
    _must_match(result["config"], profile)
    made = make_table(result, calls)
    parts = dict(profile.parts)
    where = _where(result)
    parts["mixed"] = Part(
        confidence=Confidence.MEASURED,
        source=f"{where}, attention of mixed steps in {calls.replace('_', ' ')}; "
        f"{made.in_words()}; docs/hardware.md",
    )
    changes: dict[str, Any] = {"mixed": made.table, "mixed_slowdown": 1.0}
    if power:
        changes["power"] = fit_power(result, profile.tensor_parallel)
        changes["power_low"] = changes["power_high"] = None
        parts["power"] = Part(
            confidence=Confidence.MEASURED,
            source=f"{where}; NVML, {_seconds(result)} s a state; decode fitted; docs/hardware.md",
        )
    return profile.replace(parts=parts, **changes)


def _must_match(config: dict[str, Any], profile: HardwareProfile) -> None:
    if config["device"] != "cuda":
        raise ResultError(f"measured on device {config['device']!r}: a profile is of a GPU")
    shape = config["shape"]
    name, _, ranks = shape["name"].partition("/tp")
    model = profile.model.rsplit("/", 1)[-1].lower()
    if name != model or int(ranks or 1) != profile.tensor_parallel:
        raise ResultError(
            f"measured with model {shape['name']}, profile {profile.name} is of {model} on "
            f"{profile.tensor_parallel} GPUs"
        )
    if shape["layers"] != SHAPES[name].layers:
        raise ResultError(
            f"measured with {shape['layers']} of {SHAPES[name].layers} layers: measure all"
        )
    kinds = [word for word in profile.gpu.lower().split() if any(map(str.isdigit, word))]
    if kinds and kinds[0] not in config["name"].lower():
        raise ResultError(
            f"measured on {config['name']}, profile {profile.name} is of {profile.gpu}"
        )


def _where(result: dict[str, Any]) -> str:
    config, sessions = result["config"], result["sessions"]
    graphs = ", ".join(config["graphs"]) or "none"
    return (
        f"benchmarks/hardware at {_all(s['git'] for s in sessions)}, "
        f"{_all(s['date'][:10] for s in sessions)}, {config['name']}, driver "
        f"{_all((s['board'] or {}).get('driver') for s in sessions)}, torch {config['torch']}, "
        f"{config['attention']}, {config['dtype']}, {config['kv']} KV, "
        f"CUDA graphs: {graphs}, random weights, no SGLang"
    )


def _all(values: Iterable[Any]) -> str:
    return " and ".join(dict.fromkeys("unknown" if v is None else str(v) for v in values))


def _seconds(result: dict[str, Any]) -> str:
    return f"{min(entry['seconds'] for entry in result['power']):.0f}"


def show(made: Made) -> str:
    """The table for people."""
    lines = [made.in_words()]
    table = made.table
    for chunk, plane in zip(table.chunk_tokens, table.slowdown, strict=True):
        lines.append(f"\nchunk {chunk}: batch down, context across")
        lines.append(" " * 8 + "".join(f"{ctx:9d}" for ctx in table.ctx_tokens))
        for batch, row in zip(table.batch, plane, strict=True):
            lines.append(f"{batch:8d}" + "".join(f"{value:9.3f}" for value in row))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line.

    Raises:
        ResultError, ProfileError: it cannot be made; the message says why.
    """
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("result", type=Path, help="written by measure.py")
    parser.add_argument("--profile", help="name of the profile that gets the table")
    parser.add_argument(
        "--mixed-attention", choices=CALLS, help="of which mixed steps (default: the first there)"
    )
    parser.add_argument("--power", action="store_true", help="its power as well")
    parser.add_argument("--out", type=Path, help="where that profile is written")
    options = parser.parse_args(argv)
    result = read_result(options.result)
    there = result["config"]["mixed_attention"]
    for calls in there:
        print(f"attention of mixed steps in {calls.replace('_', ' ')}: ", end="")
        print(show(make_table(result, calls)) + "\n")
    if options.power or options.profile is None:
        try:
            print(f"power: {fit_power(result, 1)}")
        except ResultError as error:
            print(f"no power model: {error}")
    if options.profile is None:
        return
    if options.out is None:
        parser.error("--profile needs --out")
    profile = into_profile(
        result,
        load_profile(options.profile),
        calls=options.mixed_attention or there[0],
        power=options.power,
    )
    text = msgspec.json.format(msgspec.json.encode(profile), indent=1)
    options.out.write_bytes(text + b"\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    try:
        main()
    except (ResultError, ProfileError) as problem:
        sys.exit(f"make_mixed_profile.py: {problem}")
