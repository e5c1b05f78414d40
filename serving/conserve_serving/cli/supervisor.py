"""The processes of one cluster: engines, and the gateway in front of them.

Order matters, and it is the same every time. Up: the gateway's port is chosen (engines need it
for their acknowledgements), all engines start side by side, the gateway's own configuration is
written with the engines' URLs, the gateway starts, and the cluster is up when every engine has
joined it. Down: the gateway drains while its engines still answer, then the engines stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from conserve_serving.cli.children import Backoff, Child, ChildSpec, ChildState
from conserve_serving.cli.commands import REAL_COMMANDS, Commands, EngineToStart, engine_spec
from conserve_serving.cli.errors import ChildFailedError, GatewayUnreachableError
from conserve_serving.cli.gateway_http import GatewayHttp
from conserve_serving.cli.ports import Reservation, url_host
from conserve_serving.cli.store_place import make_store
from conserve_serving.engines.sglang.flags import SglangEngine, StoreSettings

#: What the gateway gets beyond its own drain deadline before it is made to end.
DRAIN_MARGIN_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """What to start.

    Attributes:
        engines: those to start; a cluster may also attach to others that run already.
        store: how KV is handed over.
        remove_store: whether the store's folder is ours, and goes at the end.
        host, reserved: where the gateway listens; the port is kept free until the gateway starts.
        gateway_config: writes the text of the gateway's configuration file, given the URL of
            every engine by id.
        drain_s: how long the gateway finishes running turns after SIGTERM.
        admin_token: what the gateway asks of those who may see all conversations, if anything.
    """

    engines: tuple[EngineToStart, ...]
    store: StoreSettings
    remove_store: bool
    host: str
    reserved: Reservation
    gateway_config: Callable[[Mapping[str, str]], str]
    drain_s: float
    admin_token: str | None = None


class Supervisor:
    """Starts a cluster, keeps it running, and stops it.

    Attributes:
        url: where the gateway listens.
        model: name of the model served; None until the cluster is up.

    Args:
        plan: what to start.
        run_dir: an existing folder for logs and the gateway's configuration.
        notify: told, in one line, whenever something happens that a person should know.
        commands: how processes are called.
        clock, sleep: monotonic seconds, and waiting.
        ready_timeout_s: how long the gateway, every emulated engine, and then the whole cluster
            may take to be ready.
        attach_timeout_s: how long engines that run elsewhere are waited for.
        backoff: how crashed processes are restarted.
    """

    def __init__(
        self,
        plan: ClusterPlan,
        *,
        run_dir: Path,
        notify: Callable[[str], None],
        commands: Commands = REAL_COMMANDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        ready_timeout_s: float = 60.0,
        attach_timeout_s: float = 10.0,
        backoff: Backoff = Backoff(),  # noqa: B008 - frozen
    ) -> None:
        self.url = f"http://{url_host(plan.host)}:{plan.reserved.port}"
        self.run_dir = run_dir
        self.model: str | None = None
        self._plan = plan
        self._notify = notify
        self._clock = clock
        self._sleep = sleep
        self._ready_timeout_s = ready_timeout_s
        self._attach_timeout_s = attach_timeout_s
        self._store = Path(plan.store.path)
        self._config = run_dir / "gateway.toml"
        self._watches: list[asyncio.Task[None]] = []

        def child(spec: ChildSpec) -> Child:
            return Child(replace(spec, backoff=backoff), notify=notify, clock=clock, sleep=sleep)

        self.engines: dict[str, Child] = {}
        for engine in plan.engines:
            command = commands.engine(engine, plan.store)
            spec = engine_spec(engine, command, log_path=run_dir / f"{engine.id}.log")
            self.engines[engine.id] = child(spec)
        self.gateway = child(
            ChildSpec(
                name="gateway",
                command=commands.gateway(self._config),
                port=plan.reserved.port,
                log_path=run_dir / "gateway.log",
                ready_timeout_s=ready_timeout_s,
                grace_s=plan.drain_s + DRAIN_MARGIN_S,
            )
        )

    async def start(self) -> None:
        """Bring the cluster up.

        Raises:
            ChildFailedError: a process did not come up; everything has been stopped again.
        """
        make_store(self._store)
        for one in (self.gateway, *self.engines.values()):
            # An earlier run's last words in the same folder would explain this one's failures.
            one.spec.log_path.unlink(missing_ok=True)
        try:
            await self._start_engines()
            urls = {e.id: self._url(e) for e in self._plan.engines}
            self._config.touch(mode=0o600)  # it holds the key that signs placement tokens
            self._config.write_text(self._plan.gateway_config(urls), encoding="utf-8")
            self._plan.reserved.release()
            await self.gateway.start()
            await self._wait_until_joined()
        except BaseException:  # also when cancelled: no process is left behind; raised again
            self.kill()
            await self.stop()
            raise
        for one in (self.gateway, *self.engines.values()):
            self._watches.append(asyncio.create_task(one.watch(), name=f"watch {one.spec.name}"))

    async def run(self) -> None:
        """Keep the cluster running until cancelled.

        An engine that keeps crashing is left alone and reported: the cluster goes on without it.

        Raises:
            ChildFailedError: the gateway kept crashing, or every engine did.
        """
        pending = set(self._watches)
        gateway_watch = self._watches[0]
        while True:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for watch in done:
                failure = watch.exception()
                if not isinstance(failure, ChildFailedError):
                    raise failure or RuntimeError(f"{watch.get_name()} ended")
                if watch is gateway_watch or self.engines_given_up():
                    raise failure
                self._notify(f"{failure.what}; going on without it. {failure.remedy}")

    def engines_given_up(self) -> bool:
        """Whether this cluster started engines and none of them will come back."""
        states = [child.state for child in self.engines.values()]
        return bool(states) and all(state is ChildState.GAVE_UP for state in states)

    async def stop(self) -> bool:
        """Drain the gateway, then stop the engines. Safe to call more than once.

        Returns:
            Whether every process ended by itself in time.
        """
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        self._plan.reserved.release()
        drained = await self.gateway.stop()
        in_time = await asyncio.gather(*(child.stop() for child in self.engines.values()))
        if self._plan.remove_store:
            await asyncio.to_thread(shutil.rmtree, self._store, ignore_errors=True)
        return drained and all(in_time)

    def kill(self) -> None:
        """End every process at once; ``stop`` then returns quickly."""
        for child in (self.gateway, *self.engines.values()):
            child.kill()

    def gateway_http(self, *, timeout_s: float) -> GatewayHttp:
        """The gateway's own API, with the right to see everybody's conversations.

        Args:
            timeout_s: longest wait for an answer.
        """
        return GatewayHttp(self.url, timeout_s=timeout_s, api_key=self._plan.admin_token)

    def _url(self, engine: EngineToStart) -> str:
        host = url_host(engine.host) if isinstance(engine, SglangEngine) else "127.0.0.1"
        return f"http://{host}:{self.engines[engine.id].port}"

    async def _start_engines(self) -> None:
        """Start all side by side; the first that fails ends the wait for the others.

        SGLang may need minutes to load weights: nobody should wait for those to learn of a typing
        error that another engine found at once.
        """
        starts = [asyncio.create_task(child.start()) for child in self.engines.values()]
        try:
            for started in asyncio.as_completed(starts):
                await started
        finally:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)

    async def _wait_until_joined(self) -> None:
        """Wait until the gateway knows every engine that was started, and a while for others."""
        gateway = self.gateway_http(timeout_s=5.0)
        deadline_s = self._clock() + self._ready_timeout_s
        attached_s = self._clock() + min(self._attach_timeout_s, self._ready_timeout_s / 2)
        missing: list[str] = sorted(self.engines)
        while self._clock() < deadline_s:
            if self.gateway.pid is None:
                raise ChildFailedError(
                    "the gateway ended while it was joining its engines",
                    remedy=f"read {self.gateway.spec.log_path}",
                )
            with contextlib.suppress(GatewayUnreachableError):
                cluster = await asyncio.to_thread(gateway.cluster)
                for engine in cluster.engines:
                    if engine.id in self.engines and engine.state == "unfit":
                        raise ChildFailedError(
                            f"the gateway does not accept {engine.id}: {engine.note}",
                            remedy="correct its tier in the configuration file",
                        )
                joined = {engine.id for engine in cluster.engines if engine.is_up}
                missing = sorted(set(self.engines) - joined)
                late = [e for e in cluster.engines if e.id not in self.engines and not e.is_up]
                waiting = self._clock() < attached_s and any(e.state != "unfit" for e in late)
                if not missing and not waiting:
                    self.model = cluster.gateway.model
                    if late:
                        names = ", ".join(f"{e.id} ({e.state})" for e in late)
                        self._notify(f"going on without attached engines not here yet: {names}")
                    return
            await self._sleep(0.05)
        raise ChildFailedError(
            f"the gateway did not accept {', '.join(missing) or 'its engines'}"
            f" within {self._ready_timeout_s:g} s",
            remedy=f"read the logs in {self.run_dir}",
        )
