"""What this machine is and has: conditions for the result file, and what is missing."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def pick_device(wanted: str) -> torch.device:
    """The device to measure on.

    Raises:
        ValueError: there is no CUDA GPU and one was asked for.
    """
    there = torch.cuda.is_available()
    if wanted == "auto":
        wanted = "cuda" if there else "cpu"
    if wanted == "cuda" and not there:
        built = torch.version.cuda or "no CUDA"
        raise ValueError(
            f"--device cuda: torch {torch.__version__} (built for {built}) finds no GPU; "
            "--device cpu runs the same code, for tests"
        )
    return torch.device(wanted, 0) if wanted == "cuda" else torch.device(wanted)


def board_name() -> str:
    """How NVML is to find the GPU that CUDA calls 0, before CUDA is started.

    CUDA numbers GPUs by speed unless told otherwise, NVML by their place.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    return visible or "0"


def same_board(uuid: str, device: torch.device) -> bool | None:
    """Whether NVML's board is torch's GPU; None: this torch does not say."""
    own = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if own is None else str(own) in uuid


def software() -> dict[str, Any]:
    """Versions that times depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """The device by name and size."""
    if device.type != "cuda":
        return {
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "memory_bytes": facts.total_memory,
        "multiprocessors": facts.multi_processor_count,
        "capability": f"{facts.major}.{facts.minor}",
    }


def git_revision() -> str | None:
    """The tree's commit, marked when files differ from it; None where git cannot tell."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None


def conditions() -> dict[str, Any]:
    """When, with what and how this run was started."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "software": software(),
    }
