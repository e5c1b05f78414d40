"""Start one SGLang server, say when it is ready or why it is not, and leave nothing behind.

    python -m conserve_serving.engines.sglang.launch --python PY [--host H] [--port N] -- FLAG …

Runs in ConServe's environment; SGLang runs in ``PY``'s. Speaks the protocol of our supervised
processes: SGLang's output is relayed line by line, and these lines of JSON stand between:

    {"note": "loading weights"}                          what it is at, for people
    {"ready": true, "port": 30000}                       it answers
    {"failed": what, "remedy": …, "evidence": line}      the last line: why it ended

It ends when its standard input does, or on SIGTERM: SGLang gets SIGTERM and some seconds, then
everything in its process group is killed, by ``guard``, which also does so when this process is
killed itself. Variables for SGLang alone come as JSON in ``CONSERVE_ENGINE_ENV``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from conserve_serving.engines.client import EngineClient
from conserve_serving.engines.http_errors import BadReply, EngineHttpError, EngineRefused
from conserve_serving.engines.sglang.diagnose import Diagnosis, diagnose
from conserve_serving.engines.sglang.environment import (
    PythonUnusableError,
    probe,
    version_warning,
    what_is_missing,
)
from conserve_serving.engines.sglang.flags import ENV_VARIABLE, named_flags
from conserve_serving.engines.sglang.relay import Relay

#: SGLang looks every five seconds whether it has been told to stop.
_GRACE_S: Final = 12.0
_POLL_S: Final = 0.5
#: SGLang's own limit for the token it generates to find out how it is.
_HEALTH_TIMEOUT_S: Final = 25.0
_CONTROL_TIMEOUT_S: Final = 10.0
_STILL_EVERY_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to start.

    Attributes:
        python: interpreter of SGLang's environment.
        arguments: SGLang's, without host and port.
        env: variables for SGLang alone.
        host, port: where it is to listen.
        grace_s: time it has to end after SIGTERM.
    """

    python: str
    arguments: tuple[str, ...]
    env: Mapping[str, str]
    host: str
    port: int
    grace_s: float = _GRACE_S

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 -- compared only
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


class Launcher:
    """Runs one launch.

    Args:
        launch: what to start.
        write: takes lines for standard output.
    """

    def __init__(self, launch: Launch, *, write: Callable[[bytes], None]) -> None:
        self._launch = launch
        self._write = write
        self._relay = Relay(write, self._note)
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()

    def stop(self) -> None:
        """End SGLang; called again, at once."""
        if self._stop.is_set():
            self._kill.set()
        self._stop.set()

    async def run(self) -> int:
        """Run until SGLang has ended. The exit code: 0 when it was told to stop, else 1."""
        launch = self._launch
        argv = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))]
        argv += [launch.python, "-m", "sglang.launch_server", *launch.arguments]
        argv += ["--host", launch.host, "--port", str(launch.port)]
        process = await asyncio.create_subprocess_exec(
            *argv,
            env={**os.environ, **launch.env},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        relayed = asyncio.create_task(self._relay_output(process))
        ended = asyncio.create_task(process.wait())
        stop = asyncio.create_task(self._stop.wait())
        unusable = asyncio.create_task(self._announce_when_ready())
        waiting = {ended, stop, unusable}
        failure: Diagnosis | None = None
        try:
            while not ended.done() and not stop.done() and failure is None:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if unusable in done:
                    failure = unusable.result()
        finally:
            unusable.cancel()
            await self._end(process)
            stop.cancel()
            await asyncio.wait([relayed], timeout=_CONTROL_TIMEOUT_S)
            relayed.cancel()
        if failure is None and stop.done() and not stop.cancelled():
            return 0
        self._relay.end()
        self._fail(failure or self._why(process.returncode))
        return 1

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """SIGTERM, some seconds, and the end of the leash, which ends what is left."""
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            kill = asyncio.create_task(self._kill.wait())
            ended = asyncio.create_task(process.wait())
            await asyncio.wait(
                [kill, ended],
                timeout=self._launch.grace_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            kill.cancel()
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()

    async def _relay_output(self, process: asyncio.subprocess.Process) -> None:
        if process.stdout is None:
            raise RuntimeError("started without a pipe for its output")
        while chunk := await process.stdout.read(64 * 1024):
            self._relay.feed(chunk)

    async def _announce_when_ready(self) -> Diagnosis | None:
        """Say when SGLang answers. Returns why it cannot be used; never, when it can."""
        keys = [value for name, value in named_flags(self._launch.arguments) if name == "--api-key"]
        client = EngineClient(
            self._launch.url, api_key=keys[-1] if keys else None, timeout_s=_CONTROL_TIMEOUT_S
        )
        clock = asyncio.get_running_loop().time
        began_s = told_s = clock()
        try:
            while True:
                try:
                    await client.health(timeout_s=_HEALTH_TIMEOUT_S)
                    await client.describe()
                    break
                except BadReply as error:
                    return Diagnosis(
                        what=f"ConServe cannot use this engine: {error}",
                        remedy="correct the tier in the configuration file",
                    )
                except EngineHttpError as error:
                    if isinstance(error, EngineRefused) and error.status in (401, 403):
                        return Diagnosis(
                            what="this engine wants an API key that it was not given in flags",
                            remedy='write flags = ["--api-key", "KEY"] in the tier, and the same '
                            "as gateway.engine_api_key",
                        )
                    await asyncio.sleep(_POLL_S)
                if clock() - told_s >= _STILL_EVERY_S:
                    told_s = clock()
                    self._note(f"still starting after {told_s - began_s:.0f} s")
        finally:
            client.close()
        self._relay.forget()
        self._say({"ready": True, "port": self._launch.port})
        await asyncio.Event().wait()
        return None

    def _why(self, returncode: int | None) -> Diagnosis:
        how = describe_exit(returncode)
        return diagnose(self._relay.lines, ended=how) or Diagnosis(
            what=f"SGLang ended ({how})", remedy="the end of its log says more"
        )

    def _note(self, text: str) -> None:
        self._say({"note": text})

    def _fail(self, why: Diagnosis) -> None:
        self._say({"failed": why.what, "remedy": why.remedy, "evidence": why.evidence})

    def _say(self, message: Mapping[str, object]) -> None:
        self._write(json.dumps(message).encode() + b"\n")


def describe_exit(returncode: int | None) -> str:
    """A return code of the guard's in words."""
    if returncode is not None and returncode > 128:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(returncode - 128).name}"
    return f"exit code {returncode}"


def reserve(host: str, port: int) -> socket.socket:
    """A socket that keeps a port from everybody who takes any free one.

    It does not listen, so the server it is meant for can bind it as servers do (SO_REUSEADDR).

    Raises:
        OSError: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    keeper = socket.socket(family, socket.SOCK_STREAM)
    try:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind((host, port))
    except OSError:
        keeper.close()
        raise
    return keeper


def _write(line: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody reads any more: the leash ends us
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def _when_stdin_ends(then: Callable[[], None]) -> None:
    def wait() -> None:
        while os.read(0, 65536):
            pass
        then()

    threading.Thread(target=wait, name="stdin", daemon=True).start()


async def _run(launch: Launch) -> int:
    launcher = Launcher(launch, write=_write)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, launcher.stop)

    def stop() -> None:
        with contextlib.suppress(RuntimeError):  # the loop ended first
            loop.call_soon_threadsafe(launcher.stop)

    _when_stdin_ends(stop)
    return await launcher.run()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one engine. Exit codes: 0 stopped as asked, 1 failed."""
    parser = argparse.ArgumentParser(prog="python -m conserve_serving.engines.sglang.launch")
    parser.add_argument("--python", required=True, help="interpreter of SGLang's environment")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0: any free one")
    parser.add_argument("--grace-s", type=float, default=_GRACE_S, help="time to end on SIGTERM")
    parser.add_argument("flags", nargs="*", help="SGLang's flags, after --")
    arguments = parser.parse_args(argv)
    env: dict[str, str] = json.loads(os.environ.pop(ENV_VARIABLE, "{}"))

    def refuse(what: str, remedy: str) -> int:
        message = {"failed": what, "remedy": remedy, "evidence": ""}
        _write(json.dumps(message).encode() + b"\n")
        return 1

    try:
        found = probe(arguments.python, env)
    except PythonUnusableError as error:
        return refuse(str(error), "correct python in the tier")
    missing = what_is_missing(arguments.python, found)
    if missing is not None:
        return refuse(*missing)
    warning = version_warning(found)
    if warning is not None:
        _write(json.dumps({"note": warning}).encode() + b"\n")
    try:
        keeper = reserve(arguments.host, arguments.port)
    except OSError as error:
        return refuse(
            f"cannot listen on {arguments.host} port {arguments.port}: {error.strerror}",
            "choose another address in tiers.urls, or stop the program that listens there",
        )
    with keeper:
        launch = Launch(
            python=arguments.python,
            arguments=tuple(arguments.flags),
            env=env,
            host=arguments.host,
            port=keeper.getsockname()[1],
            grace_s=arguments.grace_s,
        )
        return asyncio.run(_run(launch))


if __name__ == "__main__":
    sys.exit(main())
