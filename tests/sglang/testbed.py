"""Real SGLang engines on the CPU, as processes: started together, killed as groups, logs kept.

Loaded by ``tests/conftest.py``. Engines run in the environment that ``make test-sglang`` makes
(``.venv-sglang``); nothing of SGLang is imported here.

Starting takes a minute or more. While writing tests, keep engines running between runs::

    python tests/sglang/testbed.py FOLDER &     # until it is interrupted
    CONSERVE_TESTBED=FOLDER python -m pytest -m sglang tests/sglang/test_....py
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
HERE: Final = Path(__file__).parent
VENV: Final = Path(os.environ.get("CONSERVE_SGLANG_VENV", ROOT / ".venv-sglang"))
PYTHON: Final = VENV / "bin" / "python"

MODEL_NAME: Final = "tiny"
PAGE_TOKENS: Final = 16
#: KV pool of an engine; also the longest prompt, as the model itself takes more.
KV_CAPACITY_TOKENS: Final = 20_000
#: Two cores, three engines, other work beside them.
START_TIMEOUT_S: Final = 420.0

#: What lets SGLang run on a CPU, and how the tiny model is served. Nothing of ConServe's.
CPU_FLAGS: Final = (
    *("--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native"),
    *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--disable-overlap-schedule", "--sleep-on-idle", "--skip-server-warmup"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
    *("--mem-fraction-static", "0.1", "--hicache-io-backend", "direct"),
    *("--hicache-mem-layout", "layer_first", "--max-running-requests", "16"),
    *("--tool-call-parser", "qwen25"),
)
#: What ConServe needs of an engine (docs/architecture.md).
CONSERVE_FLAGS: Final = (
    *("--enable-metrics", "--enable-cache-report", "--enable-hierarchical-cache"),
    *("--hicache-write-policy", "write_through"),
    *("--hicache-storage-prefetch-policy", "wait_complete"),
    *("--page-size", str(PAGE_TOKENS)),
    *("--enable-priority-scheduling", "--disable-priority-preemption"),
)
#: Of engines that hold conversations. SGLang's tree is another one without it, in Rust.
SESSION_FLAGS: Final = ("--enable-session-radix-cache",)


def why_not() -> str | None:
    """Why the test bed cannot run here; None: it can."""
    if not (VENV / ".ready").exists():
        return f"{VENV.name} is not set up: run make test-sglang"
    return None


def engine_environment(folder: Path) -> dict[str, str]:
    """Variables of an engine's process, the machine's own included; caches go to ``folder``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    return kept | {
        "PYTHONPATH": str(HERE / "stand_ins"),
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(VENV / "extensions"),
        "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(folder / "file-store"),
    }


def make_model(folder: Path) -> Path:
    """Write the tiny model, its tokenizer trained on the project's own pages."""
    pages = sorted((ROOT / "docs").rglob("*.md")) + sorted(ROOT.glob("*.md"))
    command = [PYTHON, HERE / "tiny_model.py", folder, *pages]
    done = subprocess.run(  # noqa: S603 -- our own script
        command, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"tiny_model.py failed:\n{done.stderr[-4000:]}")
    return folder


class EngineError(Exception):
    """An engine did not do what the test bed asked of it; carries the end of its log."""


@dataclass
class Engine:
    """One engine. Calls block: use them where no event loop runs, or in a thread.

    Attributes:
        name: its id at the gateway, ``p0``, ``d0``, …
        command, environment: how its process is started.
        log: what it prints.
    """

    name: str
    port: int
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    pid: int | None = None  # also its group
    keeper: Path | None = None  # who starts it, where `attach` found it

    @property
    def alive(self) -> bool:
        """Whether its first process lives."""
        if self.process is not None:
            return self.process.poll() is None
        return self.pid is not None and _group_lives(self.pid)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process; returns at once."""
        assert self.pid is None, f"{self.name} runs already"
        if self.keeper is not None:
            self._started_by_keeper(self.keeper)
            return
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603 -- our own command
                self.command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, to be killed as one
                preexec_fn=_die_with_parent,  # noqa: PLW1509 -- one prctl, no locks
            )
        self.pid = self.process.pid

    def wait_ready(self) -> None:
        """Until it is healthy.

        Raises:
            EngineError: its process ended, or it took too long.
        """
        until = time.monotonic() + START_TIMEOUT_S
        while True:
            if not self.alive:
                raise EngineError(f"{self.name} ended before it was ready{self.tail()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.call("GET", "/health", timeout_s=30)[0] == 200:
                    return
            if time.monotonic() > until:
                raise EngineError(f"{self.name} is not healthy after {START_TIMEOUT_S:g} s")
            time.sleep(0.3)

    def restart(self) -> None:
        """Kill it and start it again on the same port; returns when it is ready."""
        self.kill()
        self.start()
        self.wait_ready()

    def kill(self) -> None:
        """End the whole group at once, as a crash would; returns when all of it is gone."""
        if self.pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        while _group_lives(self.pid):
            time.sleep(0.01)
        self.process = self.pid = None

    def _started_by_keeper(self, folder: Path) -> None:
        while self.pid is None or not self.alive:
            time.sleep(0.1)
            self.pid = json.loads((folder / "bed.json").read_text())["engines"][self.name]["pid"]

    def call(
        self, method: str, path: str, body: object = None, *, timeout_s: float = 120.0
    ) -> tuple[int, bytes]:
        """One request: status and body, whatever the status is."""
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(  # noqa: S310 -- loopback
            f"{self.url}{path}",
            data,
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:  # noqa: S310
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def post(self, path: str, body: object) -> Any:
        """The JSON answer of a call that must work."""
        status, text = self.call("POST", path, body)
        if status != 200:
            raise EngineError(f"{self.name} {path}: {status}: {text[:500]!r}")
        return json.loads(text) if text else None

    def flush(self) -> None:
        """Empty its caches, device and host; waits for what is running."""
        until = time.monotonic() + 30
        while self.call("POST", "/flush_cache")[0] != 200:
            if time.monotonic() > until:
                raise EngineError(f"{self.name} would not flush its cache{self.tail()}")
            time.sleep(0.05)

    def tail(self, lines: int = 60) -> str:
        """The end of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return f"\n--- {self.log} ---\n" + "\n".join(text.splitlines()[-lines:])


class AckDesk:
    """Takes the engines' acknowledgements and passes them on; tests may hold or drop them.

    Engines are told one address when they start, gateways come and go: each test's says with
    ``forward_to`` where it is.

    Attributes:
        received: all since ``reset``, in order.
        dropping: take them, and tell nobody.
    """

    def __init__(self, port: int = 0) -> None:
        self.received: list[dict[str, Any]] = []
        self.dropping = False
        self._target: str | None = None
        self._held: list[bytes] | None = None
        self._changed = threading.Condition()
        desk = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = desk._take(body)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/conserve/v1/handoffs"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def forward_to(self, url: str | None) -> None:
        """Pass on to the gateway at ``url``; None: to nobody."""
        self._target = url

    def hold(self) -> None:
        """Keep what comes until ``release``."""
        self._held = []

    def release(self) -> None:
        """Pass on what was held, and hold no longer."""
        held, self._held = self._held or [], None
        for body in held:
            self._forward(body)

    def reset(self) -> None:
        """As new: nothing received, nothing held, forwarding to nobody."""
        self._target, self._held, self.dropping = None, None, False
        self.received.clear()

    def wait(self, count: int = 1, *, key: str | None = None, timeout_s: float = 30.0) -> None:
        """Until ``count`` have come (for the prompt that ``key`` names). Blocks.

        Raises:
            AssertionError: they have not, in time.
        """
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: sum(key in (None, ack["key"]) for ack in self.received) >= count,
                timeout_s,
            )
        assert arrived, f"acknowledgements of {key or 'anything'}: {self.received}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()  # the port may be taken again at once

    def _take(self, body: bytes) -> int:
        with self._changed:
            self.received.append(json.loads(body))
            self._changed.notify_all()
        if self.dropping:
            return 200
        held = self._held
        if held is not None:
            held.append(body)
            return 200
        return self._forward(body)

    def _forward(self, body: bytes) -> int:
        if self._target is None:
            return 200
        request = urllib.request.Request(  # noqa: S310 -- loopback
            f"{self._target}/conserve/v1/handoffs", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:  # noqa: S310
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 503


@dataclass
class Testbed:
    """The engines of a test session.

    Attributes:
        folder: model, logs and store.
        acks: where prefillers acknowledge.
        engines: all that were started, by name: ``p0``, ``d0``, ``d1`` and what tests added.
    """

    folder: Path
    model: Path
    acks: AckDesk = field(default_factory=AckDesk)
    engines: dict[str, Engine] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        """The hand-off store's folder."""
        return self.folder / "store"

    @property
    def page_tokens(self) -> int:
        return PAGE_TOKENS

    @property
    def prefiller(self) -> Engine:
        return self.engines["p0"]

    @property
    def decoders(self) -> list[Engine]:
        return [self.engines["d0"], self.engines["d1"]]

    def start(self, roles: Mapping[str, str], flags: Iterable[str] = ()) -> list[Engine]:
        """Start engines side by side, and return when all are ready.

        Args:
            roles: name → ``prefill``, ``decode`` or ``both``.
            flags: further flags for all of them; the last of several counts.

        Raises:
            EngineError: one did not come up.
        """
        started = [self.make(name, role, flags) for name, role in roles.items()]
        for engine in started:
            self.engines[engine.name] = engine
            engine.start()
        for engine in started:
            engine.wait_ready()
        return started

    def make(self, name: str, role: str, flags: Iterable[str] = ()) -> Engine:
        """An engine that is not started yet."""
        port, rendezvous = _free_ports(2)
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        command = [
            *(str(PYTHON), "-m", "sglang.launch_server", "--model-path", str(self.model)),
            *("--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)),
            *("--dist-init-addr", f"127.0.0.1:{rendezvous}"),
            *("--max-total-tokens", str(KV_CAPACITY_TOKENS)),
            *CPU_FLAGS,
            *CONSERVE_FLAGS,
            *(() if role == "prefill" else SESSION_FLAGS),
            *self.store_flags(name, role),
            *flags,
        ]
        return Engine(name, port, command, engine_environment(self.folder), log)

    def store_flags(self, name: str, role: str) -> list[str]:
        """Our hand-off store, for an engine in ``role``."""
        extra = {
            "backend_name": "conserve",
            "module_path": "conserve_serving.engines.sglang.store",
            "class_name": "HandoffStore",
            "interface_v1": 1,
            "prefetch_threshold": PAGE_TOKENS,
            "role": role,
            "engine": name,
            "path": str(self.store),
            "ack_url": self.acks.url,
        }
        return [
            *("--hicache-storage-backend", "dynamic"),
            *("--hicache-storage-backend-extra-config", json.dumps(extra)),
        ]

    def revive(self) -> None:
        """Start again whatever a test killed, all at once."""
        dead = [engine for engine in self.engines.values() if not engine.alive]
        for engine in dead:
            engine.kill()
            engine.start()
        for engine in dead:
            engine.wait_ready()

    def remove(self, name: str) -> None:
        """Kill an engine and forget it."""
        self.engines.pop(name).kill()

    def close(self) -> None:
        """Kill every engine's whole group."""
        for engine in self.engines.values():
            engine.kill()
        self.acks.close()

    def tails(self) -> str:
        """The ends of all logs, for a failing test."""
        return "".join(engine.tail() for engine in self.engines.values())


def attach(folder: Path) -> Testbed:
    """The engines that another process keeps running in ``folder``; see the module."""
    kept = json.loads((folder / "bed.json").read_text())
    bed = Testbed(folder, folder / "model", AckDesk(kept["ack_port"]))
    for name, fields in kept["engines"].items():
        fields["log"] = Path(fields["log"])
        environment = engine_environment(folder)
        bed.engines[name] = Engine(name, environment=environment, keeper=folder, **fields)
    return bed


def keep(folder: Path) -> None:
    """Start the engines, say where they are, and keep them alive until interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    bed = open_testbed(folder, print)
    bed.acks.close()  # its port is for those who attach
    file = folder / "bed.json"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        while True:
            for engine in bed.engines.values():
                if not engine.alive:
                    engine.kill()
                    engine.start()
            engines = {
                name: {"port": e.port, "pid": e.pid, "command": e.command, "log": str(e.log)}
                for name, e in bed.engines.items()
            }
            temporary = file.with_suffix(".new")
            temporary.write_text(json.dumps({"ack_port": bed.acks.port, "engines": engines}))
            temporary.replace(file)
            if signal.sigtimedwait({signal.SIGINT, signal.SIGTERM}, 0.5) is not None:
                return
    finally:
        file.unlink(missing_ok=True)
        for engine in bed.engines.values():
            engine.kill()


def open_testbed(folder: Path, narrate: Callable[[str], None]) -> Testbed:
    """One prefiller and two decoders, ready.

    Raises:
        EngineError: one did not come up.
    """
    began = time.monotonic()
    bed = Testbed(folder, make_model(folder / "model"))
    shutil.rmtree(bed.store, ignore_errors=True)
    try:
        bed.start({"p0": "prefill", "d0": "decode", "d1": "decode"})
    except BaseException:
        bed.close()
        raise
    narrate(f"three SGLang engines ready after {time.monotonic() - began:.0f} s; logs: {folder}")
    return bed


def _group_lives(group: int) -> bool:
    """Whether a process of the group is left that is not a zombie."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(pgrp) == group and state != "Z":
                    return True
    return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    """In the child: be killed when pytest is (SGLang's own children do the same)."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    keep(Path(sys.argv[1]).absolute())
