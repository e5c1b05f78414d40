"""One child process: start it, know when it is ready, keep its log, restart it, stop it.

Every child speaks the same small protocol (``child_protocol``): it prints one JSON line
``{"ready": true, "port": N}`` on stdout once it listens, and it exits when its stdin reaches the
end. The supervisor holds the other end of that pipe, so the kernel stops the child when the
supervisor is gone, however it went.

A child runs in a session of its own: Ctrl-C at the terminal reaches the supervisor only, which
then stops its children in the right order.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from conserve_serving.cli.child_protocol import (
    Note,
    Ready,
    last_failure,
    log_tail,
    parse,
    says_port_taken,
)
from conserve_serving.cli.errors import ChildFailedError, PortInUseError

#: Argument list of a child, given the port it is to listen on (0: any free one).
Command = Callable[[int], Sequence[str]]


class ChildState(enum.StrEnum):
    """Where a child is in its life."""

    STARTING = "starting"
    READY = "ready"
    BACKING_OFF = "backing off"
    GAVE_UP = "gave up"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """When a crashed child is started again.

    Attributes:
        first_s, longest_s: the pause doubles from the first to the longest with every crash.
        healthy_s: a child that was ready for this long counts as healthy: its crashes before
            that are forgotten.
        give_up_after: crashes in a row after which it is left alone.
    """

    first_s: float = 0.5
    longest_s: float = 15.0
    healthy_s: float = 30.0
    give_up_after: int = 6

    def pause_s(self, crashes: int) -> float:
        """Pause before the next start, after ``crashes`` crashes in a row (at least one)."""
        return min(self.longest_s, self.first_s * 2.0 ** (crashes - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What to run.

    Attributes:
        name: how people call it: an engine id, or ``gateway``.
        command: its argument list, given a port.
        port: port to listen on; 0 lets the child choose, and it keeps its choice when restarted.
        log_path: where its output goes; appended to.
        env: variables it gets beyond ours.
        ready_timeout_s: how long it may take to announce itself.
        slow_remedy: what to do when it takes longer.
        grace_s: how long it may take to end.
        backoff: how it is restarted.
        echo: also given its output.
    """

    name: str
    command: Command
    port: int
    log_path: Path
    env: Mapping[str, str] = field(default_factory=dict)
    ready_timeout_s: float = 60.0
    slow_remedy: str = "on a slow machine allow it more time"
    grace_s: float = 5.0
    backoff: Backoff = Backoff()
    echo: Callable[[bytes], None] | None = None


class Child:
    """A supervised process.

    Args:
        spec: what to run.
        notify: told, in one line, whenever something happens that a person should know.
        clock: monotonic seconds.
        sleep: waits out a back-off pause.
    """

    def __init__(
        self,
        spec: ChildSpec,
        *,
        notify: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.spec = spec
        self.state = ChildState.STOPPED
        self.port = spec.port
        self.restarts = 0
        self._notify = notify
        self._clock = clock
        self._sleep = sleep
        self._process: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None
        self._ready_since_s = 0.0

    @property
    def pid(self) -> int | None:
        """Process id while a process runs, else None."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    async def start(self) -> int:
        """Start the process and wait until it is ready.

        Returns:
            The port it listens on.

        Raises:
            PortInUseError: its port is taken.
            ChildFailedError: it ended, or said nothing, before it was ready; the message holds the
                end of its log. No process is left behind.
        """
        self.state = ChildState.STARTING
        spec = self.spec
        argv = spec.command(self.port)
        self._process = process = await asyncio.create_subprocess_exec(
            *argv,
            env={**os.environ, **spec.env},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=1 << 20,
        )
        stdout = _piped(process)
        log = _Log(spec.log_path, spec.echo)
        try:
            async with asyncio.timeout(spec.ready_timeout_s):
                port = await self._read_until_ready(stdout, log)
        except TimeoutError:
            await self._discard(process, log, patience_s=0.0)
            raise ChildFailedError(
                f"{spec.name} was not ready after {spec.ready_timeout_s:g} s",
                remedy=f"read {spec.log_path}; {spec.slow_remedy}",
                detail=log_tail(spec.log_path),
            ) from None
        except BaseException:  # cancelled or not, the log is closed; raised again
            log.close()
            raise
        if port is None:
            await self._discard(process, log, patience_s=5.0)
            raise self._failed_at_start(process.returncode)
        self.port = port
        self._pump = asyncio.create_task(_copy(stdout, log))
        self._ready_since_s = self._clock()
        self.state = ChildState.READY
        return port

    async def watch(self) -> None:
        """Restart the process whenever it ends, until cancelled.

        Raises:
            ChildFailedError: it crashed ``give_up_after`` times in a row.
        """
        crashes = 0
        backoff = self.spec.backoff
        while True:
            crashed_how = await self._wait_for_end()
            if self._clock() - self._ready_since_s >= backoff.healthy_s:
                crashes = 0
            while True:
                crashes += 1
                if crashes >= backoff.give_up_after:
                    self.state = ChildState.GAVE_UP
                    said = last_failure(self.spec.log_path)
                    remedy = f"{said.remedy}; " if said is not None else ""
                    raise ChildFailedError(
                        f"{self.spec.name} crashed {crashes} times in a row ({crashed_how})",
                        remedy=f"{remedy}read {self.spec.log_path}",
                        detail=log_tail(self.spec.log_path),
                    )
                pause_s = backoff.pause_s(crashes)
                self.state = ChildState.BACKING_OFF
                self._notify(
                    f"{self.spec.name} ended ({crashed_how}); starting it again in {pause_s:g} s"
                )
                await self._sleep(pause_s)
                try:
                    await self.start()
                except ChildFailedError as failure:
                    crashed_how = failure.what
                    continue
                self.restarts += 1
                self._notify(f"{self.spec.name} is back on port {self.port}")
                break

    async def stop(self) -> bool:
        """Ask the process to end, and make it end after its ``grace_s``.

        The caller has cancelled ``watch`` before. Safe to call more than once.

        Returns:
            Whether it ended by itself in time.
        """
        process = self._process
        in_time = True
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(self.spec.grace_s):
                    await process.wait()
            except TimeoutError:
                in_time = False
                self.kill()
                await process.wait()
        await self._end_pump()
        self.state = ChildState.STOPPED
        return in_time

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _wait_for_end(self) -> str:
        """Wait until the process has ended; how it ended, in words."""
        if self._process is None:
            raise RuntimeError("watch() follows start()")
        returncode = await self._process.wait()
        await self._end_pump()
        failure = last_failure(self.spec.log_path)
        return failure.what if failure is not None else describe_end(returncode)

    async def _read_until_ready(self, stdout: asyncio.StreamReader, log: _Log) -> int | None:
        """Copy output to the log until the ready line; its port, or None when output ended."""
        while line := await stdout.readline():
            log.write(line)
            said = parse(line)
            if isinstance(said, Ready):
                return said.port
            if isinstance(said, Note):
                self._notify(f"{self.spec.name}: {said.text}")
        return None

    async def _end_pump(self) -> None:
        """Let the rest of an ended process's output reach its log.

        Bounded, for a grandchild that inherited the pipe would keep it open.
        """
        if self._pump is not None:
            await asyncio.wait([self._pump], timeout=2.0)
            self._pump.cancel()
            self._pump = None

    async def _discard(
        self, process: asyncio.subprocess.Process, log: _Log, *, patience_s: float
    ) -> None:
        """Make sure that no process is left after a failed start."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await process.wait()
        self.kill()
        self._pump = asyncio.create_task(_copy(_piped(process), log))
        await process.wait()
        await self._end_pump()
        self.state = ChildState.STOPPED

    def _failed_at_start(self, returncode: int | None) -> ChildFailedError:
        spec = self.spec
        tail = log_tail(spec.log_path)
        failure = last_failure(spec.log_path)
        if failure is not None:
            return ChildFailedError(
                f"{spec.name}: {failure.what}",
                remedy=f"{failure.remedy} (the whole log is {spec.log_path})",
                detail=failure.evidence or "\n".join(tail.splitlines()[:-1]),
            )
        if self.port and says_port_taken(tail):
            return PortInUseError(
                f"port {self.port}, where {spec.name} was to listen, is in use",
                remedy="choose another port, or stop the program that listens there",
            )
        return ChildFailedError(
            f"{spec.name} ended before it was ready ({describe_end(returncode)})",
            remedy=f"its last words are above; the whole log is {spec.log_path}",
            detail=tail,
        )


def _piped(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    """The read end of the child's output, which ``start`` asked for."""
    if process.stdout is None:
        raise RuntimeError("the child was started without a pipe for its output")
    return process.stdout


def describe_end(returncode: int | None) -> str:
    """A process's return code in words."""
    if returncode is None:
        return "still running"
    if returncode < 0:
        try:
            return f"killed by {signal.Signals(-returncode).name}"
        except ValueError:
            return f"killed by signal {-returncode}"
    return f"exit code {returncode}"


class _Log:
    """A log file, and whoever else wants to see what goes there."""

    def __init__(self, path: Path, echo: Callable[[bytes], None] | None) -> None:
        self._file: BinaryIO = path.open("ab", buffering=0)
        self._echo = echo

    def write(self, output: bytes) -> None:
        """Append output. A full disk costs the log its lines, not the child its pipe."""
        with contextlib.suppress(OSError):
            self._file.write(output)
        if self._echo is not None:
            self._echo(output)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


async def _copy(stdout: asyncio.StreamReader, log: _Log) -> None:
    """Copy the rest of a child's output to its log, and close the log."""
    with contextlib.closing(log):
        while chunk := await stdout.read(64 * 1024):
            log.write(chunk)
