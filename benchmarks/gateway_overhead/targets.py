"""What is measured: the workers directly, the ConServe gateway, and smg; as processes, pinned."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SMG_VERSION = "1.13.0"
#: smg's own environment: it and other routers install scripts of the same name.
SMG_HOME = Path(tempfile.gettempdir()) / f"conserve-bench-smg-{SMG_VERSION}"
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Target:
    """Something that answers ``/v1/chat/completions``.

    Attributes:
        ports: where; several for the workers themselves.
        id_header: how it learns which conversation a request belongs to.
        pid: the measured process; None for the workers.
    """

    name: str
    ports: list[int]
    id_header: str
    pid: int | None

    def cpu_s(self) -> float:
        """CPU time of the process so far, all threads, user and system."""
        if self.pid is None:
            return 0.0
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S

    def rss_bytes(self) -> int:
        """Resident memory of the process."""
        fields = Path(f"/proc/{self.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def cores() -> tuple[int, int]:
    """The core for what is measured, and the one for everything else."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise SystemExit("gateway_overhead needs two cores: one for what it measures, one for load")
    return usable[0], usable[1]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def _process(command: list[str], core: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # noqa: PLW1509 -- no threads here
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, path: str, log: Path) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            with contextlib.closing(connection):
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise SystemExit(f"no answer on {path}; its log:\n{log.read_text()[-3000:]}")
        time.sleep(0.1)


@contextlib.contextmanager
def workers(core: int, logs: Path) -> Iterator[Target]:
    """Two dummy engines in one process."""
    ports = [free_port(), free_port()]
    log = logs / "workers.log"
    with _process(
        [sys.executable, str(HERE / "worker.py"), *map(str, ports)], core, log
    ) as process:
        _wait(process, ports[0], "/health", log)
        yield Target("direct", ports, "X-Bench", None)


@contextlib.contextmanager
def conserve(engines: Target, core: int, logs: Path) -> Iterator[Target]:
    """The ConServe gateway, attached to the workers as decoders."""
    port = free_port()
    urls = ", ".join(f'"http://127.0.0.1:{p}"' for p in engines.ports)
    config = logs / "conserve.toml"
    config.write_text(
        f'[gateway]\nport = {port}\nlog_level = "warning"\n\n'
        f'[[tiers]]\nrole = "decode"\nengine = "attach"\nurls = [{urls}]\n'
    )
    log = logs / "conserve.log"
    command = [sys.executable, "-m", "conserve_serving.gateway", "--config", str(config)]
    with _process(command, core, log) as process:
        _wait(process, port, "/ready", log)
        yield Target("conserve", [port], "X-ConServe-Conversation-ID", process.pid)


@contextlib.contextmanager
def smg(engines: Target, core: int, logs: Path) -> Iterator[Target]:
    """PyPI smg, sticky by routing key."""
    port = free_port()
    log = logs / "smg.log"
    command = [
        str(SMG_HOME / "bin" / "smg"), "launch",
        "--host", "127.0.0.1", "--port", str(port),
        "--worker-urls", *(f"http://127.0.0.1:{p}" for p in engines.ports),
        "--policy", "manual", "--assignment-mode", "min_group",
        "--prometheus-port", str(free_port()),
        "--disable-tokenizer-autoload", "--log-level", "error",
    ]  # fmt: skip
    with _process(command, core, log) as process:
        _wait(process, port, "/readiness", log)
        yield Target("smg", [port], "x-smg-routing-key", process.pid)


def set_up_smg() -> None:
    """Install smg in an environment of its own, unless it is there."""
    if (SMG_HOME / "bin" / "smg").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(SMG_HOME)], check=True)
    pip = [str(SMG_HOME / "bin" / "pip"), "install", "--quiet", f"smg=={SMG_VERSION}"]
    subprocess.run(pip, check=True)
