"""What can be wrong with the hand-off store. Loaded inside SGLang: standard library only.

::

    StoreError
    ├── StoreConfigError    the configuration says something that cannot be
    └── LayoutMismatchError the store holds pages of another layout
"""

from __future__ import annotations


class StoreError(ValueError):
    """The store cannot be used; SGLang then refuses to start, with this text.

    A ``ValueError``, because that is what SGLang's cache controller expects of a back end.
    """

    def __init__(self, message: str) -> None:
        super().__init__(f"ConServe hand-off store: {message}")


class StoreConfigError(StoreError):
    """``--hicache-storage-backend-extra-config`` holds something unknown or impossible."""


class LayoutMismatchError(StoreError):
    """Pages of two engines would not mean the same bytes."""
