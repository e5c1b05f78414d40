"""Whether a model's files are where a tier says, looked at without loading anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from conserve_serving.cli.findings import Findings, size

_WEIGHTS: Final = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's files on this machine."""

    folder: Path
    bytes: int


def check_model(model: str, environ: Mapping[str, str], into: Findings) -> Weights | None:
    """Look at a model.

    Args:
        model: a folder's path, or a name the hub knows.
        environ: variables the engine gets; they say where downloads are kept.
        into: takes the findings.

    Returns:
        Its files, when they are complete here.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _check_folder(folder, into)
    if folder.is_file():
        into.ok(f"{model}: one file ({size(folder.stat().st_size)})")
        return Weights(folder, folder.stat().st_size)
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        into.bad(f"{model}: there is no such folder", "correct model in the tier")
        return None
    cached = _cached(model, environ)
    if cached is not None:
        return _check_folder(cached, into)
    if environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        into.bad(
            f"{model}: not among the hub's downloads here, and HF_HUB_OFFLINE keeps SGLang from "
            "fetching it",
            f"unset HF_HUB_OFFLINE, or download it first: hf download {model}",
        )
        return None
    into.warn(
        f"{model}: not on this machine; SGLang will download it at the first start",
        f"download it first (hf download {model}), or raise ready_timeout_s in the tier",
    )
    return None


def _cached(model: str, environ: Mapping[str, str]) -> Path | None:
    """The newest complete download of a hub's model, where huggingface_hub keeps it."""
    home = environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    root = Path(environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    snapshots = root / f"models--{model.replace('/', '--')}" / "snapshots"
    try:
        found = sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime)
    except OSError:
        return None
    return found[-1] if found else None


def _check_folder(folder: Path, into: Findings) -> Weights | None:
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        missing.append("a tokenizer (tokenizer.json)")
    files = [file for pattern in _WEIGHTS for file in folder.glob(pattern)]
    total = sum(file.stat().st_size for file in files if file.is_file())
    if not files:
        missing.append("weights (*.safetensors)")
    missing += _missing_shards(folder)
    if missing:
        into.bad(
            f"{folder} lacks {', '.join(missing)}", "complete the download, or correct the tier"
        )
        return None
    into.ok(f"{folder}: configuration, tokenizer and {size(total)} of weights")
    return Weights(folder, total)


def _missing_shards(folder: Path) -> list[str]:
    """Files that the index of the weights names and that are not there."""
    index = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return []
    missing = sorted(name for name in named if not (folder / str(name)).is_file())
    return missing[:3] + ([f"and {len(missing) - 3} more shards"] if len(missing) > 3 else [])
