"""Stand-in for ``sgl_kernel``, SGLang's CUDA kernels: names that raise when they are called."""

from collections.abc import Callable
from typing import Any

__version__ = "0.0.0+standin"


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name}: needs a GPU (this is the stand-in)")

    missing.__name__ = name
    return missing
