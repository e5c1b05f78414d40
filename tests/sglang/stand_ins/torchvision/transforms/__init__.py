"""Stand-in: the names that are imported, and the one enumeration that is looked into."""

import enum
from collections.abc import Callable
from typing import Any


class InterpolationMode(enum.Enum):
    """Ways to scale a picture."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"torchvision.{name}: not installed (this is the stand-in)")

    return missing
