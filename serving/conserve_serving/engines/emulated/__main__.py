"""``python -m conserve_serving.engines.emulated``: one emulated engine as a process.

Prints one JSON line when it listens (with ``--port 0`` or ``--announce``)::

    {"ready": true, "engine": "d0", "port": 40123, "pid": 4711, "url": "http://127.0.0.1:40123"}

Exit status: 0 after SIGTERM, SIGINT or (with ``--exit-with-parent``) the end of standard input;
2 when it cannot start with these settings.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import uvloop

from conserve_serving.engines.emulated.config import EngineConfig, Role
from conserve_serving.engines.emulated.server import EmulatedEngine
from conserve_serving.engines.errors import EngineError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until told to stop; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.WARNING,
        format=f"%(asctime)s {options.engine_id} %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    try:
        config = EngineConfig(
            profile=options.profile,
            model_name=options.model,
            engine_id=options.engine_id,
            host=options.host,
            port=options.port,
            speed=options.speed,
            role=Role(options.role),
            page_tokens=options.page_size,
            store_dir=Path(options.store) if options.store else None,
            ack_url=options.ack_url,
            kv_capacity_tokens=options.kv_capacity_tokens,
            host_capacity_tokens=options.host_capacity_tokens,
            max_running_requests=options.max_running_requests,
        )
        uvloop.run(_run(config, options))
    except EngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


async def _run(config: EngineConfig, options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with EmulatedEngine(config) as engine:
        if options.announce or options.port == 0:
            ready = {
                "ready": True,
                "engine": config.engine_id,
                "port": engine.port,
                "pid": os.getpid(),
                "url": engine.url,
            }
            sys.stdout.write(json.dumps(ready) + "\n")
            sys.stdout.flush()
        if options.exit_with_parent:
            # A thread, because standard input may be anything, a file or /dev/null included.
            threading.Thread(target=_wait_for_eof, args=(loop, stop), daemon=True).start()
        stopped = loop.create_task(stop.wait())
        served = loop.create_task(engine.serve())
        await asyncio.wait({stopped, served}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        served.cancel()


def _wait_for_eof(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    while os.read(0, 65536):
        pass
    loop.call_soon_threadsafe(stop.set)


def _parser() -> argparse.ArgumentParser:
    defaults = EngineConfig()
    parser = argparse.ArgumentParser(
        prog="python -m conserve_serving.engines.emulated",
        description="An emulated SGLang engine: real HTTP and real bookkeeping, modelled time.",
    )
    add = parser.add_argument
    add("--profile", default=defaults.profile, help="hardware profile (default: %(default)s)")
    add("--model", default=defaults.model_name, help="served model name")
    add("--engine-id", default=defaults.engine_id, help="name in hand-off acknowledgements")
    add("--host", default=defaults.host, help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=0, help="port; 0: any free one, printed as JSON")
    add("--speed", type=float, default=1.0, help="model seconds per second (default: 1.0)")
    add("--role", choices=[role.value for role in Role], default=defaults.role.value)
    add("--store", help="folder of the hand-off store, shared by prefillers and decoders")
    add("--ack-url", help="http:// address that hand-offs are acknowledged to")
    add("--page-size", type=int, default=defaults.page_tokens, help="KV page size in tokens")
    add("--kv-capacity-tokens", type=int, help="smaller KV pool than the profile's")
    add("--host-capacity-tokens", type=int, help="smaller host tier than the profile's")
    add("--max-running-requests", type=int, default=defaults.max_running_requests)
    add("--announce", action="store_true", help="print the JSON line for a given --port too")
    add("--exit-with-parent", action="store_true", help="stop at the end of standard input")
    return parser


if __name__ == "__main__":
    sys.exit(main())
