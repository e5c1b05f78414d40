"""A program that runs a grid without end, for the tests that end it: grid_main.py RESULTS."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import grid_runs
from grid_cells import cells

from conserve_serving.lab.grid import Results, run_cells

if __name__ == "__main__":
    done = run_cells(
        cells(seeds=range(4)),
        results=Results(Path(sys.argv[1]), resume=True),
        jobs=2,
        on_done=lambda _: os.write(1, b"done\n"),
        run=grid_runs.endless,
    )
    os.write(1, f"{len(done.rows)} {done.interrupted}\n".encode())
