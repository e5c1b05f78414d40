"""A cluster of small scripted programs: order, readiness, failure, drain."""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from conserve_serving.cli import ports as ports_module
from conserve_serving.cli import supervisor as supervisor_module
from conserve_serving.cli.children import ChildState
from conserve_serving.cli.commands import EmulatedEngine, engine_command
from conserve_serving.cli.errors import ChildFailedError, CliError, PortInUseError
from conserve_serving.cli.ports import reserve_port
from conserve_serving.engines.sglang.flags import StoreSettings

if TYPE_CHECKING:
    from conftest import Cluster

PATIENCE_S = 20.0
STORE = StoreSettings(
    transport="file", path="/run/store", ack_url="http://127.0.0.1:8000/ack", max_age_s=60.0
)


async def test_cluster_comes_up_and_drains_gateway_first(scene: Cluster) -> None:
    supervisor = scene.supervisor()
    await supervisor.start()
    config = (scene.folder / "gateway.toml").read_text()
    assert (scene.folder / "gateway.toml").stat().st_mode & 0o077 == 0, "it holds a key"
    for id_, child in supervisor.engines.items():
        assert f"{id_} http://127.0.0.1:{child.port}" in config
        assert child.state is ChildState.READY
    assert supervisor.url == f"http://127.0.0.1:{supervisor.gateway.port}"
    assert await supervisor.stop()
    order = (scene.folder / "order").read_text().split()
    assert order[0] == "gateway"
    assert sorted(order[1:]) == ["d0", "d1"]
    assert not (scene.folder / "store").exists()
    assert scene.notices == []


async def test_engine_that_does_not_start_stops_everything(scene: Cluster) -> None:
    supervisor = scene.supervisor(engine_does={"d1": ("say=bad profile", "crash=2")})
    with pytest.raises(ChildFailedError, match="d1 ended before it was ready") as caught:
        await supervisor.start()
    assert "bad profile" in caught.value.detail
    assert [child.pid for child in supervisor.engines.values()] == [None, None]
    assert supervisor.gateway.pid is None


async def test_gateway_that_never_joins_its_engines_is_reported(scene: Cluster) -> None:
    supervisor = scene.supervisor(knows="d0", ready_timeout_s=1.0)
    with pytest.raises(ChildFailedError, match="did not accept d1"):
        await supervisor.start()
    assert supervisor.gateway.pid is None


async def test_attached_engines_are_waited_for(scene: Cluster) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        knows.write_text("d0,d1,a0")  # it joins meanwhile

    knows = scene.folder / "knows"
    knows.write_text("d0,d1,a0:joining")
    supervisor = scene.supervisor(knows=f"@{knows}")
    supervisor._sleep = sleep
    await supervisor.start()
    assert pauses
    assert scene.notices == []


async def test_attached_engines_that_do_not_join_are_named_and_left(scene: Cluster) -> None:
    supervisor = scene.supervisor(knows="d0,d1,a0:joining,a1,a2:unfit", attach_timeout_s=0.2)
    await supervisor.start()
    (notice,) = scene.notices
    assert "a0 (joining)" in notice
    assert "a2 (unfit)" in notice
    assert "a1" not in notice
    assert await supervisor.stop()


async def test_crashed_engine_is_restarted_and_the_cluster_goes_on(scene: Cluster) -> None:
    supervisor = scene.supervisor()
    await supervisor.start()
    running = asyncio.create_task(supervisor.run())
    port = supervisor.engines["d0"].port
    supervisor.engines["d0"].kill()
    await scene.hear(f"d0 is back on port {port}")
    assert not running.done()
    running.cancel()


async def test_engine_that_keeps_crashing_is_left_alone(scene: Cluster) -> None:
    broken = scene.folder / "broken"
    supervisor = scene.supervisor(engine_does={"d0": (f"crash-if={broken}",)})
    await supervisor.start()
    running = asyncio.create_task(supervisor.run())
    broken.touch()
    supervisor.engines["d0"].kill()
    await scene.hear("going on without it")
    assert supervisor.engines["d0"].state is ChildState.GAVE_UP
    assert not running.done()
    running.cancel()


async def test_gateway_that_keeps_crashing_ends_the_run(scene: Cluster) -> None:
    broken = scene.folder / "broken"
    supervisor = scene.supervisor(gateway_does=(f"crash-if={broken}",))
    await supervisor.start()
    broken.touch()
    supervisor.gateway.kill()
    with pytest.raises(ChildFailedError, match="gateway crashed 3 times"):
        async with asyncio.timeout(PATIENCE_S):
            await supervisor.run()


async def test_gateway_that_does_not_drain_is_made_to_end(
    scene: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "DRAIN_MARGIN_S", 0.0)
    supervisor = scene.supervisor(gateway_does=("ignore-term",), drain_s=0.2)
    await supervisor.start()
    assert not await supervisor.stop()
    assert supervisor.gateway.pid is None


async def test_second_interrupt_ends_a_drain_at_once(scene: Cluster) -> None:
    supervisor = scene.supervisor(gateway_does=("ignore-term",))
    await supervisor.start()
    stopping = asyncio.create_task(supervisor.stop())
    await asyncio.sleep(0)  # the stop has begun
    supervisor.kill()
    async with asyncio.timeout(PATIENCE_S / 2):  # the gateway's grace is longer
        await stopping


def test_port_that_was_asked_for_must_be_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"port {port}") as caught:
            reserve_port("127.0.0.1", port)
        assert "--port" in caught.value.remedy
        reserved = reserve_port("127.0.0.1", 0)
        assert reserved.port not in {0, port}
        reserved.release()


def test_reserved_port_is_kept_from_those_who_take_any_until_it_is_released() -> None:
    reserved = reserve_port("127.0.0.1", 0)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", reserved.port))
    reserved.release()
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", reserved.port))


def test_default_port_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports_module, "DEFAULT_PORT", port)
        reserved = reserve_port("127.0.0.1", None)
        assert port < reserved.port < port + ports_module.PORTS_TRIED
        reserved.release()


def test_address_that_is_not_ours() -> None:
    with pytest.raises(CliError, match=r"cannot listen on 192\.0\.2\.1"):
        reserve_port("192.0.2.1", 0)


def test_engine_command_names_what_was_configured() -> None:
    plan = EmulatedEngine(
        id="d3",
        role="decode",
        profile="h100-qwen3-8b",
        model="qwen",
        speed=20.0,
        page_tokens=32,
        kv_capacity_tokens=1000,
        host_capacity_tokens=0,
    )
    argv = list(engine_command(plan, STORE)(4711))
    assert argv[:3] == [sys.executable, "-m", "conserve_serving.engines.emulated"]
    pairs = dict(zip(argv[3::2], argv[4::2], strict=False))
    assert pairs["--engine-id"] == "d3"
    assert pairs["--port"] == "4711"
    assert pairs["--speed"] == "20"
    assert pairs["--model"] == "qwen"
    assert pairs["--kv-capacity-tokens"] == "1000"
    assert pairs["--host-capacity-tokens"] == "0"
    assert pairs["--ack-url"] == "http://127.0.0.1:8000/ack"
