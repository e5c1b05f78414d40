"""A cluster of small scripted programs, for the tests of what stands on the supervisor."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conserve_serving.cli.children import Backoff, Command
from conserve_serving.cli.commands import Commands, EmulatedEngine, EngineToStart
from conserve_serving.cli.ports import reserve_port
from conserve_serving.cli.supervisor import ClusterPlan, Supervisor
from conserve_serving.engines.sglang.flags import StoreSettings

SCRIPT = Path(__file__).with_name("scripted_child.py")
#: Far more than anything here takes; a test that needs it has failed.
PATIENCE_S = 20.0


def engine(id_: str) -> EmulatedEngine:
    return EmulatedEngine(id=id_, role="decode", profile="x", model="m", speed=1.0, page_tokens=64)


def scripted(*behaviours: str) -> Command:
    def command(port: int) -> list[str]:
        return [sys.executable, "-S", "-E", str(SCRIPT), "--port", str(port), *behaviours]

    return command


@dataclass
class Cluster:
    """A supervisor over scripted engines d0 and d1 and a scripted gateway."""

    folder: Path
    notices: list[str] = field(default_factory=list)
    heard: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    made: list[Supervisor] = field(default_factory=list)

    def notify(self, message: str) -> None:
        self.notices.append(message)
        self.heard.put_nowait(message)

    def supervisor(
        self,
        *,
        engine_does: Mapping[str, tuple[str, ...]] = {},
        gateway_does: tuple[str, ...] = (),
        knows: str = "d0,d1",
        ready_timeout_s: float = PATIENCE_S,
        attach_timeout_s: float = PATIENCE_S,
        drain_s: float = PATIENCE_S,
    ) -> Supervisor:
        order = self.folder / "order"

        def engine_program(engine: EngineToStart, store: StoreSettings) -> Command:
            assert Path(store.path).is_relative_to(self.folder)
            return scripted(*engine_does.get(engine.id, ()), "ready", f"log={order}:{engine.id}")

        def gateway_program(config: Path) -> Command:
            return scripted(*gateway_does, f"cluster={knows}", "ready", f"log={order}:gateway")

        plan = ClusterPlan(
            engines=(engine("d0"), engine("d1")),
            store=StoreSettings(
                transport="file",
                path=str(self.folder / "store"),
                ack_url="http://127.0.0.1:1/ack",
                max_age_s=60.0,
            ),
            remove_store=True,
            host="127.0.0.1",
            reserved=reserve_port("127.0.0.1", 0),
            gateway_config=lambda urls: "\n".join(f"{k} {v}" for k, v in urls.items()),
            drain_s=drain_s,
        )
        supervisor = Supervisor(
            plan,
            run_dir=self.folder,
            notify=self.notify,
            commands=Commands(engine=engine_program, gateway=gateway_program),
            ready_timeout_s=ready_timeout_s,
            attach_timeout_s=attach_timeout_s,
            backoff=Backoff(first_s=0.0, give_up_after=3),
        )
        self.made.append(supervisor)
        return supervisor

    async def hear(self, words: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while words not in await self.heard.get():
                pass


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Cluster]:
    scene = Cluster(tmp_path)
    yield scene
    for supervisor in scene.made:
        supervisor.kill()
        await supervisor.stop()
