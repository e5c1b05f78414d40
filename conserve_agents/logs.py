"""The package's logger, and warnings that do not repeat themselves."""

from __future__ import annotations

import logging
from typing import Final

log: Final = logging.getLogger("conserve_agents")
_seen: Final[set[str]] = set()


def warn_once(kind: str, message: str, *args: object) -> None:
    """Warn the first time something of this kind happens; repeat it at debug level after that.

    Args:
        kind: what counts as the same thing; a few fixed words, since they are remembered.
        message, args: as for ``logging``.
    """
    level = logging.DEBUG if kind in _seen else logging.WARNING
    _seen.add(kind)
    log.log(level, message, *args)
