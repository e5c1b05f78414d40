"""The gateway as a process: announcing itself, draining, refusing to start."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from conserve_serving.engines.http import HttpPool


async def _start(config: Path, *flags: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "conserve_serving.gateway", "--config", str(config), *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


def _config(path: Path, url: str, drain_s: float = 10.0) -> Path:
    path.write_text(
        f"[gateway]\nport = 0\npoll_interval_s = 0.05\nhealth_interval_s = 0.05\n"
        f"drain_timeout_s = {drain_s}\n[[tiers]]\nrole = 'decode'\nengine = 'attach'\n"
        f"urls = ['{url}']\n"
    )
    return path


async def _ready(process: asyncio.subprocess.Process) -> HttpPool:
    assert process.stdout is not None
    line = json.loads(await process.stdout.readline())
    assert line["ready"] is True
    assert line["url"].endswith(f":{line['port']}")
    pool = HttpPool("127.0.0.1", line["port"])
    async with asyncio.timeout(10):
        while True:  # the engine joins a moment after the port opens
            response = await pool.request("GET", "/ready")
            await response.read()
            if response.status == 200:
                return pool


@pytest.mark.parametrize("drains", [True, False])
async def test_sigterm_lets_running_turns_finish_within_the_deadline(
    tmp_path: Path, fake_engine: Any, reply: Any, body: Any, drains: bool
) -> None:
    engine = await fake_engine().start()
    process = await _start(
        _config(tmp_path / "c.toml", engine.url, drain_s=10.0 if drains else 0.05), "--announce"
    )
    try:
        pool = await _ready(process)
        go = asyncio.Event()
        engine.replies.append(reply(after_first=go))
        sent = json.dumps(body("hi", stream=True)).encode()
        running = await pool.request("POST", "/v1/chat/completions", [], sent)
        await anext(aiter(running))
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            while drains:  # new turns are refused meanwhile, politely
                refused = await pool.request("POST", "/v1/chat/completions", [], sent)
                text = await refused.read()
                if refused.status == 503:
                    assert refused.header(b"retry-after") is not None
                    assert json.loads(text)["error"]["code"] == "draining"
                    break
            if drains:
                go.set()
                assert (await running.read()).endswith(b"data: [DONE]\n\n")
            else:
                await engine.until("/abort_request")
            assert await process.wait() == 0
        pool.close()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        await engine.kill()


async def test_port_in_use_is_one_clear_line(tmp_path: Path, fake_engine: Any) -> None:
    taken = await fake_engine().start()
    process = await _start(_config(tmp_path / "c.toml", taken.url), "--port", str(taken.port))
    _, text = await process.communicate()
    assert process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{taken.port}" in text.decode()
    assert "Traceback" not in text.decode()
    await taken.kill()


async def test_bad_configuration_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[gateway]\nprot = 1\n")
    process = await _start(path)
    _, text = await process.communicate()
    assert process.returncode == 1
    assert "did you mean 'port'?" in text.decode()
    assert "Traceback" not in text.decode()
