"""`conserve engine`: one engine of the cluster file, on the machine where it is typed.

The same file describes engines on several machines: `conserve up` or `conserve serve` runs where
the gateway is, and this where the engines are.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from conserve_serving.cli.children import Child
from conserve_serving.cli.cluster_file import read_config
from conserve_serving.cli.commands import engine_command, engine_spec
from conserve_serving.cli.errors import EXIT_FAILED, EXIT_OK, BadInputError
from conserve_serving.cli.ports import DEFAULT_PORT, is_ours, url_host
from conserve_serving.cli.sglang_tiers import ACK_PATH, sglang_engines, store_settings
from conserve_serving.cli.stopping import StopSignals
from conserve_serving.cli.store_place import make_store
from conserve_serving.cli.up import make_run_dir
from conserve_serving.engines.sglang.flags import SglangEngine, StoreSettings
from conserve_serving.gateway.config import Config


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The cluster's configuration file (TOML); the same on all machines.",
)
@click.option("--id", "id_", required=True, help="Which engine: p0, d0, d1 … (`config --check`).")
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for its log. Default: a new one under the system's temporary folder.",
)
def engine(config_path: Path, id_: str, run_dir: Path | None) -> int:
    """Run one SGLang engine of a cluster here, in the foreground, and keep it running.

    Ctrl-C stops it. The gateway, elsewhere, finds it at the address that its tier's urls name.
    """
    config = read_config(config_path)
    wanted, store = plan_engine(config, id_, environ=os.environ)
    folder = make_run_dir(run_dir)
    if store.path:
        make_store(Path(store.path))
    click.echo(f"starting {id_}; its log is {folder / f'{id_}.log'}", err=True)
    return asyncio.run(_run(wanted, store, folder))


def plan_engine(
    config: Config, id_: str, *, environ: Mapping[str, str]
) -> tuple[SglangEngine, StoreSettings]:
    """The engine of that id, and how it hands KV over.

    Args:
        config: the configuration.
        id_: its id.
        environ: the environment it inherits.

    Raises:
        BadInputError: there is no such engine, it belongs on another machine, or the file lacks
            what engines started one by one have to be told.
    """
    engines = {engine.id: engine for engine in sglang_engines(config, environ=environ)}
    if id_ not in engines:
        raise BadInputError(
            f"no SGLang engine is called {id_!r}",
            remedy=f"use one of {', '.join(engines)}" if engines else 'write engine = "sglang"',
        )
    wanted = engines[id_]
    if not wanted.port:
        raise BadInputError(
            f"{id_} has no address: the gateway could not find it",
            remedy='name one in its tier, for each engine: urls = ["http://HOST:PORT"]',
        )
    if not is_ours(wanted.host):
        raise BadInputError(
            f"{id_} listens on {wanted.host}, which is not this machine",
            remedy="start it there, or correct urls in its tier",
        )
    gateway = config.gateway
    ack_url = f"http://{url_host(gateway.host)}:{gateway.port or DEFAULT_PORT}{ACK_PATH}"
    nearby = wanted.host.startswith("127.") or wanted.host in {"localhost", "::1"}
    store = store_settings(config, ack_url, far_away=[] if nearby else [wanted])
    if not store.path and store.transport == "file":
        raise BadInputError(
            "engines started one by one do not know each other's store",
            remedy="set handoff.path to a folder that all of them share",
        )
    return wanted, store


async def _run(engine: SglangEngine, store: StoreSettings, folder: Path) -> int:
    spec = engine_spec(
        engine, engine_command(engine, store), log_path=folder / f"{engine.id}.log", echo=_echo
    )
    child = Child(spec, notify=_notify)

    signals = StopSignals(child.kill)
    stop = asyncio.create_task(signals.stopping.wait())
    kept = asyncio.create_task(_keep(child, engine))
    try:
        await asyncio.wait([stop, kept], return_when=asyncio.FIRST_COMPLETED)
        if kept.done():
            await kept
    finally:
        stop.cancel()
        kept.cancel()
        await asyncio.gather(stop, kept, return_exceptions=True)
        in_time = await child.stop()
    _notify(f"{engine.id} has stopped")
    return EXIT_OK if in_time and signals.count < 2 else EXIT_FAILED


async def _keep(child: Child, engine: SglangEngine) -> None:
    port = await child.start()
    _notify(f"{engine.id} is ready at http://{url_host(engine.host)}:{port}")
    await child.watch()


def _echo(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()


def _notify(message: str) -> None:
    click.echo(message, err=True)
