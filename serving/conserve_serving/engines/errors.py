"""Errors of the engine side, one tree::

EngineError                      anything this package raises on purpose
├── ProfileError                 a hardware profile is missing or says something impossible
├── ModelError                   the engine model was asked for something it refuses
│   ├── DuplicateRequestError    the request id is already in the engine
│   └── RequestTooLargeError     the request can never run on this engine, however idle
└── ModelMisuseError             a driver called the model out of order (a bug of the driver)
"""

from __future__ import annotations


class EngineError(Exception):
    """Root of every error this package raises on purpose."""


class ProfileError(EngineError):
    """A hardware profile does not exist, cannot be read, or has an impossible field."""


class ModelError(EngineError):
    """The engine model refuses a request; the message names the field and the remedy."""


class DuplicateRequestError(ModelError):
    """A request with this id is still in the engine."""


class RequestTooLargeError(ModelError):
    """The request exceeds the KV pool or the context length and would never run."""


class ModelMisuseError(EngineError):
    """The driver broke the order of calls, for instance ``end_step`` before the step's end."""


class InvariantError(EngineError):
    """The KV pool's or the model's books do not add up: please report it."""
