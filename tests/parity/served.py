"""The real gateway with emulated engines, for as long as a test needs it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

from conserve_serving.core.decisions import Decision
from conserve_serving.core.journal import from_record
from conserve_serving.core.types import Tier
from conserve_serving.engines.emulated import EmulatedEngine, EngineConfig, Role
from conserve_serving.engines.http import HttpPool
from conserve_serving.gateway.config import parse_config
from conserve_serving.gateway.server import GatewayServer


@contextlib.asynccontextmanager
async def served(
    engines: Iterable[tuple[str, Tier]],
    *,
    policy: str,
    profile: str,
    speed: float,
    folder: Path,
    kv_tokens: int | None = None,
    host_tokens: int | None = None,
    gateway_settings: str = "",
) -> AsyncIterator[GatewayServer]:
    """A gateway that serves on these engines and writes the journal that `decided` reads."""
    config = parse_config(
        f"""
        [gateway]
        port = 0
        decision_journal = "{journal_of(folder)}"
        {gateway_settings}
        [scheduler]
        policy = "{policy}"
        """
    )
    server = GatewayServer(config)
    listening = asyncio.Event()
    serving = asyncio.create_task(server.serve(on_listening=lambda _: listening.set()))
    await listening.wait()
    wanted = list(engines)
    async with contextlib.AsyncExitStack() as stack:
        pool = HttpPool("127.0.0.1", server.port)
        stack.callback(pool.close)
        for name, tier in wanted:
            engine = await stack.enter_async_context(
                EmulatedEngine(
                    EngineConfig(
                        profile=profile,
                        model_name="m",
                        engine_id=name,
                        speed=speed,
                        role=Role(tier.value),
                        store_dir=folder / "store",
                        ack_url=f"{server.url}/conserve/v1/handoffs",
                        kv_capacity_tokens=kv_tokens,
                        host_capacity_tokens=host_tokens,
                    )
                )
            )
            body = json.dumps({"id": name, "url": engine.url, "tier": tier.value}).encode()
            async with await pool.request(
                "POST", "/conserve/v1/engines", [(b"content-type", b"application/json")], body
            ) as response:
                assert response.status == 201
        gateway = server.gateway
        assert gateway is not None
        while len(gateway.fleet.serving()) < len(wanted):
            await gateway.fleet.wait_change()
        yield server
        server.stop()
        assert await serving


def journal_of(folder: Path) -> Path:
    """Where the gateway's decisions are written."""
    return folder / "decisions.jsonl"


def decided(folder: Path) -> Iterator[list[Decision]]:
    """What the gateway decided, event by event."""
    for line in journal_of(folder).read_text().splitlines():
        yield from_record(json.loads(line))[2]
