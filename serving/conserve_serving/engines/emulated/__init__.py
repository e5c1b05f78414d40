"""The emulated engine: an HTTP server that answers SGLang's API from the engine model.

Real: HTTP, tokens, prefix cache, scheduling, the hand-off protocol. Modelled: time and energy,
from a hardware profile. Scripted: the text.
"""

from conserve_serving.engines.emulated.config import EngineConfig, Role
from conserve_serving.engines.emulated.errors import (
    ApiError,
    EmulatedEngineError,
    EngineConfigError,
    StampMismatchError,
    StoreError,
)
from conserve_serving.engines.emulated.server import EmulatedEngine

__all__ = [
    "ApiError",
    "EmulatedEngine",
    "EmulatedEngineError",
    "EngineConfig",
    "EngineConfigError",
    "Role",
    "StampMismatchError",
    "StoreError",
]
