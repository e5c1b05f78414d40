"""One run: what fits into its time, most telling first."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from bench import Bench
from board import Board, PowerError, PowerWatch
from grid import CALLS, Cell, middle, slowdown, take_turns
from result import Result

#: A stretch of work between two looks at the clock.
_STRETCH_S: Final = 0.2
#: How long a board settles before it is watched.
SETTLE_S: Final = 2.0
#: Share of the budget that power may take.
_POWER_SHARE: Final = 0.4


class Measurement:
    """Measures a grid, and power.

    Args:
        result: where figures go; its last session is this one.
        bench: what runs the steps.
        options: of `options.parse`.
        board: the GPU through NVML, None without.
        watch: its joules, None without.
        deadline_s: of `clock`; None: no limit.
        idle: lets a moment pass with nothing running.
    """

    def __init__(
        self,
        result: Result,
        bench: Bench,
        options: argparse.Namespace,
        *,
        board: Board | None,
        watch: PowerWatch | None,
        deadline_s: float | None,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = print,
        idle: Callable[[], int] | None = None,
    ) -> None:
        self._result, self._bench, self._options = result, bench, options
        self._board, self._watch = board, watch
        self._deadline_s, self._clock, self._say = deadline_s, clock, say
        self._idle = idle or rest
        self._session = len(result.data["sessions"]) - 1
        self._dice = random.Random(options.seed)  # noqa: S311 - an order, not a secret
        self._took_s: list[float] = []

    def run(self, cells: list[tuple[int, Cell]]) -> None:
        """Coarse grid, power, the rest of the grid, and some cells once more."""
        known = self._result.measured()
        wanted = [(level, cell) for level, cell in cells if cell not in known]
        if known:
            self._say(f"{len(known)} cells are there from before")
        left = self._grid([cell for level, cell in wanted if level == 0])
        if not left:
            self._power()
        left += self._grid([cell for level, cell in wanted if level > 0])
        if left:
            self._note(f"{len(left)} cells not measured: the time was up")
        self._repeat()

    def _note(self, text: str) -> None:
        self._say(text)
        self._result.data["sessions"][self._session]["notes"].append(text)
        self._result.save()

    def _left_s(self) -> float:
        return float("inf") if self._deadline_s is None else self._deadline_s - self._clock()

    # --- the grid ----------------------------------------------------------------------------
    def _grid(self, cells: list[Cell]) -> list[Cell]:
        """Measure these; returns those for which there was no time."""
        for number, cell in enumerate(cells):
            if self._left_s() < self._worst_s() + self._options.repeats * self._mean_s():
                return cells[number:]
            try:
                entry = self._cell(cell)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                self._note(f"out of memory: {cell.as_dict()}")
                continue
            self._result.add("cells", entry)
            times = (f"{k} {statistics.median(v['ms']):.3f}" for k, v in entry["parts"].items())
            slower = (
                f"{v['median']:.3f} ({v['low']:.3f}–{v['high']:.3f})"
                for v in entry["slowdown"].values()
            )
            self._say(
                f"chunk {cell.chunk_tokens:5d} on {cell.prefix_tokens:5d}, batch {cell.batch:4d} × "
                f"{cell.ctx_tokens:6d}: {', '.join(times)} ms; slowdown {', '.join(slower)}"
            )
        return []

    def _worst_s(self) -> float:
        return 1.5 * max(self._took_s, default=0.0)

    def _mean_s(self) -> float:
        return sum(self._took_s) / max(len(self._took_s), 1)

    def _cell(self, cell: Cell) -> dict[str, Any]:
        began_s = self._clock()
        before = None if self._board is None else self._board.now()
        parts = take_turns(
            self._bench.parts(cell),
            rounds=self._options.rounds,
            warmup=self._options.warmup,
            least_ms=self._options.min_ms,
            dice=self._dice,
        )
        after = None if self._board is None else self._board.now()
        self._took_s.append(self._clock() - began_s)
        return {
            "cell": cell.as_dict(),
            "session": self._session,
            "parts": parts,
            "slowdown": {
                calls: slowdown(*(parts[name]["ms"] for name in ("prefill", "decode", calls)))
                for calls in CALLS
                if calls in parts
            },
            "board": {"before": before, "after": after},
        }

    def _repeat(self) -> None:
        """Some cells of this session once more, as many as there is time for: did it drift?"""
        mine = [e for e in self._result.data["cells"] if e["session"] == self._session]
        again = self._dice.sample(mine, min(self._options.repeats, len(mine)))
        for first in again:
            if self._left_s() < self._worst_s():
                self._note("not all of the repeats at the end: the time was up")
                return
            entry = self._cell(Cell(**first["cell"]))
            ratio = {
                name: statistics.median(part["ms"]) / statistics.median(first["parts"][name]["ms"])
                for name, part in entry["parts"].items()
            }
            slower = {
                calls: seen["median"] / first["slowdown"][calls]["median"]
                for calls, seen in entry["slowdown"].items()
            }
            self._result.add("repeats", {**entry, "over_first": {**ratio, "slowdown": slower}})
            self._say(
                f"again: chunk {first['cell']['chunk_tokens']}, batch {first['cell']['batch']}: "
                + ", ".join(f"{name} × {value:.3f}" for name, value in ratio.items())
                + "; slowdown × "
                + ", ".join(f"{value:.3f}" for value in slower.values())
            )

    # --- power -------------------------------------------------------------------------------
    def _power(self) -> None:
        if self._watch is None or self._options.power_s <= 0:
            return
        done = {(e["state"], e.get("batch")) for e in self._result.data["power"]}
        axes = self._options.axes
        chunk, ctx = axes.chunk_tokens[-2:][0], axes.ctx_tokens[min(1, len(axes.ctx_tokens) - 1)]
        usual = middle(axes.batch)
        plan: list[tuple[str, Cell | None]] = [("idle_loaded", None)]
        for batch in (usual, *(b for b in axes.batch if b != usual)):
            cell = Cell(chunk_tokens=chunk, batch=batch, ctx_tokens=ctx)
            if not self._bench.fits(cell):
                self._note(f"power: batch {batch} of {ctx} tokens does not fit")
                continue
            if batch == usual:
                plan += [("prefill", cell), ("mixed", cell)]
            plan.append(("decode", cell))
        until_s = self._clock() + _POWER_SHARE * self._left_s()
        for state, at in plan:
            if (state, at and at.batch) in done:
                continue
            if self._clock() + self._options.power_s + SETTLE_S > until_s:
                self._note("not all power states: the time was up")
                return
            try:
                self._result.add("power", self._watched(state, at, self._watch))
            except PowerError as error:
                self._note(f"power of {state}: {error}")
                return

    def _watched(self, state: str, cell: Cell | None, watch: PowerWatch) -> dict[str, Any]:
        if cell is None:
            seen = watch.over(self._idle, warm_s=SETTLE_S, measure_s=self._options.power_s)
        else:
            parts = self._bench.parts(cell)
            run = parts[next(calls for calls in CALLS if calls in parts)]
            if state != "mixed":
                run = parts[state]
            run(2)
            each_s = run(1)[0] / 1e3
            count = max(1, round(_STRETCH_S / each_s))

            def work() -> int:
                run(count)
                return count

            seen = watch.over(work, warm_s=SETTLE_S, measure_s=self._options.power_s)
        entry = {
            "state": state,
            "session": self._session,
            "batch": None if cell is None else cell.batch,
            "cell": None if cell is None else cell.as_dict(),
            **seen,
            "board": None if self._board is None else self._board.now(),
        }
        per_step = seen["joules_per_step"]
        self._say(
            f"{state:12s} batch {entry['batch'] or 0:4d}  {seen['watts']:7.1f} W"
            + ("" if per_step is None else f"  {per_step:.4f} J a step")
        )
        return entry


def rest() -> int:
    """Nothing runs for a while."""
    time.sleep(_STRETCH_S)
    return 0
