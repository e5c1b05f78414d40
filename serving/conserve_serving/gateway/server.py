"""Serving one gateway: the port, the signals, the drain.

On SIGTERM or SIGINT the gateway refuses new turns, lets running ones finish within
``gateway.drain_timeout_s``, and exits 0; a second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
from collections.abc import Callable

from conserve_serving.engines.listener import listen
from conserve_serving.gateway.app import App
from conserve_serving.gateway.config import Config
from conserve_serving.gateway.errors import GatewayError
from conserve_serving.gateway.gateway import Gateway
from conserve_serving.gateway.http_server import HttpServer

_log = logging.getLogger("conserve.gateway.server")


class PortInUseError(GatewayError):
    """The configured address cannot be listened on."""


class GatewayServer:
    """One gateway on one listening socket. Make and serve it in one event loop.

    Attributes:
        gateway: there while it serves.
        port: the port it listens on.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.gateway: Gateway | None = None
        self.port = 0
        self._stop = asyncio.Event()
        self._force = asyncio.Event()

    async def serve(self, *, on_listening: Callable[[GatewayServer], None] | None = None) -> bool:
        """Listen until `stop` is called, then drain.

        Args:
            on_listening: called once the port is open.

        Returns:
            Whether every running turn could finish.

        Raises:
            PortInUseError: the address is taken or not ours.
        """
        settings = self.config.gateway
        listener = _listen(settings.host, settings.port)
        self.port = listener.getsockname()[1]
        gateway = self.gateway = Gateway(self.config)
        server = HttpServer(
            App(gateway),
            max_body_bytes=settings.max_body_bytes,
            max_connections=settings.max_connections,
            on_response=gateway.metrics.count_response,
        )
        try:
            gateway.start()
            await server.start(listener)
            if on_listening is not None:
                on_listening(self)
            await self._stop.wait()
            return await self._drain(gateway)
        finally:
            await gateway.close()
            await server.stop()

    async def _drain(self, gateway: Gateway) -> bool:
        draining = asyncio.create_task(gateway.drain(self.config.gateway.drain_timeout_s))
        force = asyncio.create_task(self._force.wait())
        await asyncio.wait([draining, force], return_when=asyncio.FIRST_COMPLETED)
        force.cancel()
        if draining.done():
            return draining.result()
        draining.cancel()
        return False

    def stop(self) -> None:
        """Begin to drain; called again, stop at once."""
        if self._stop.is_set():
            self._force.set()
        self._stop.set()

    @property
    def url(self) -> str:
        """Where it listens."""
        host = self.config.gateway.host
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 -- compared only
        return f"http://{host}:{self.port}"


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        raise PortInUseError(
            f"cannot listen on {host}:{port}: {error.strerror}: choose another gateway.port"
        ) from error


async def run(config: Config, *, announce: bool) -> int:
    """Serve until a signal says otherwise. Returns the exit code: 0, also after a forced end.

    Args:
        config: checked configuration.
        announce: print ``{"ready": true, "port": …, "url": …}`` once the port is open.
    """
    server = GatewayServer(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)

    def listening(server: GatewayServer) -> None:
        _log.info("listening on %s", server.url)
        if announce:
            line = json.dumps({"ready": True, "port": server.port, "url": server.url})
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    drained = await server.serve(on_listening=listening)
    if not drained:
        _log.warning("stopped with turns still running")
    return 0
