"""``python -m conserve_serving.gateway --config FILE [--port N] [--announce]``."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import sys
from pathlib import Path
from typing import Final

import uvloop

from conserve_serving.gateway.config import Config, load_config
from conserve_serving.gateway.errors import GatewayError
from conserve_serving.gateway.server import run

#: glibc's ``mallopt`` parameters (malloc.h), and what they are set to.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 32 * 1024 * 1024


def main() -> int:
    """Run one gateway. Exit codes: 0 stopped as asked, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m conserve_serving.gateway")
    parser.add_argument("--config", type=Path, help="configuration file (TOML)")
    parser.add_argument("--port", type=int, help="overrides gateway.port; 0 takes a free one")
    parser.add_argument(
        "--announce", action="store_true", help="print one JSON line once the port is open"
    )
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config) if arguments.config else Config()
        if arguments.port is not None:
            section = config.gateway.model_copy(update={"port": arguments.port})
            config = config.model_copy(update={"gateway": section})
        logging.basicConfig(
            level=config.gateway.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        # Conversations live long: looking through all of them for cycles again and again costs
        # more than it ever finds.
        gc.freeze()
        gc.set_threshold(20_000, 20, 100)
        _keep_freed_memory()
        return uvloop.run(run(config, announce=arguments.announce))
    except GatewayError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _keep_freed_memory() -> None:
    """Have glibc reuse the memory of large bodies instead of giving it back and faulting it in.

    Page faults were a third of what a 2 MB request cost. Elsewhere than on glibc: nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
