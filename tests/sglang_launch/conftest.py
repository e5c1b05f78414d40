"""Launchers of a stand-in for SGLang, as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STAND_IN = Path(__file__).with_name("stand_in")
#: Far more than anything here takes; a test that needs it has failed.
PATIENCE_S = 30.0


class LauncherProcess:
    """`python -m conserve_serving.engines.sglang.launch` over the stand-in."""

    def __init__(self, does: str, *flags: str, options: tuple[str, ...] = ()) -> None:
        env = {"PYTHONPATH": str(STAND_IN), "STAND_IN": does}
        argv = [sys.executable, "-m", "conserve_serving.engines.sglang.launch"]
        argv += ["--python", sys.executable, *options, "--", *flags]
        self.process = subprocess.Popen(  # noqa: S603 - our own module
            argv,
            env={**os.environ, "CONSERVE_ENGINE_ENV": json.dumps(env)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        self.stdout, self.stdin = self.process.stdout, self.process.stdin
        self.said: list[str] = []

    def until(self, key: str) -> dict[str, Any]:
        """The next message that has this key."""
        for line in self.stdout:
            self.said.append(line)
            if line.startswith("{") and key in (message := json.loads(line)):
                assert isinstance(message, dict)
                return message
        raise AssertionError(f"it never said {key!r}: {''.join(self.said)}")

    def wait(self) -> int:
        return self.process.wait(timeout=PATIENCE_S)


Launch = Callable[..., LauncherProcess]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts launchers; they are ended after the test."""
    made: list[LauncherProcess] = []

    def start(does: str, *flags: str, options: tuple[str, ...] = ()) -> LauncherProcess:
        made.append(one := LauncherProcess(does, *flags, options=options))
        return one

    yield start
    for launcher in made:
        launcher.process.kill()
        launcher.process.wait()
        launcher.stdout.close()
        launcher.stdin.close()
