"""The measuring scripts are no package: their folder is looked into, as when they are run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# One thread: with more, torch's threads wait for each other in turns where cores are shared.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "hardware"))
