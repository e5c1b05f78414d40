"""Stand-in for ``torchaudio``: imported by SGLang's multimodal code, used by no text model."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise NotImplementedError(f"torchaudio.{name}: not installed (this is the stand-in)")
