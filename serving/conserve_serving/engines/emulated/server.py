"""The emulated engine as a server, in a process of its own or inside a test."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

import uvicorn

from conserve_serving.engines.emulated.app import EngineApp
from conserve_serving.engines.emulated.config import EngineConfig
from conserve_serving.engines.emulated.errors import EngineConfigError
from conserve_serving.engines.emulated.runtime import Clock
from conserve_serving.engines.emulated.service import EngineService
from conserve_serving.engines.listener import listen

#: SGLang's: uvicorn closes connections that were idle for this long.
_KEEP_ALIVE_S: Final = 5
_BACKLOG: Final = 2048
#: Between two of uvicorn's ticks, which keep its date header up to date.
_TICK_S: Final = 0.1
#: Longest wait for responses under way when the server stops.
_STOP_S: Final = 2


class EmulatedEngine:
    """A running emulated engine.

    Use as ``async with EmulatedEngine(config) as engine: … engine.url …``. Inside a process with
    other things to do it shares their event loop; for realistic timing run it as a process
    (``python -m conserve_serving.engines.emulated``).

    Args:
        config: how it is set up.
        clock: model time; the wall clock at ``config.speed`` by default.

    Attributes:
        service: the engine behind the endpoints, for tests and reports.
    """

    def __init__(self, config: EngineConfig, *, clock: Clock | None = None) -> None:
        self._config = config
        self._clock = clock
        self._socket: socket.socket | None = None
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None
        self.service: EngineService
        self.app: EngineApp
        self.port = 0

    @property
    def url(self) -> str:
        """``http://host:port``, once started."""
        return f"http://{self._config.host}:{self.port}"

    async def start(self) -> None:
        """Listen, and return when requests can come.

        Raises:
            EngineConfigError: the address cannot be listened on.
            ProfileError, StoreError: see :class:`EngineService`.
        """
        self._socket = _listen(self._config.host, self._config.port)
        self.port = int(self._socket.getsockname()[1])
        self._config = replace(self._config, port=self.port)
        try:
            self.service = EngineService(self._config, clock=self._clock)
        except BaseException:  # whatever it was, the port is given back; raised again
            self._socket.close()
            raise
        self.app = EngineApp(self.service)
        settings = uvicorn.Config(
            self.app,
            http="httptools",
            ws="none",
            loop="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_STOP_S,
            server_header=False,
        )
        self._server = _Server(settings)
        self._task = asyncio.get_running_loop().create_task(self._server.serve([self._socket]))
        ready = asyncio.get_running_loop().create_task(self._server.ready.wait())
        await asyncio.wait({ready, self._task}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._task.done():
            self._task.result()
            raise EngineConfigError("the server ended before it was ready")

    async def stop(self) -> None:
        """End every request, close every connection, stop listening."""
        self.app.draining = True
        await self.service.close()
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            self._server.stopping.set()
            await self._task

    async def serve(self) -> None:
        """Until the server stops by itself (a failure) or ``stop`` was called."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to its owner and says when it is ready."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()
        self.stopping = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        """As uvicorn's, but it ends as soon as it is told to."""
        ticks = 0
        while not await self.on_tick(ticks):
            ticks = (ticks + 1) % 864_000
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self.stopping.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        raise EngineConfigError(
            f"cannot listen on {host}:{port}: {error}; choose another --port, or 0 for a free one"
        ) from error
