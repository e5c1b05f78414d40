"""What the Python environment that is to run SGLang has, found out without importing SGLang."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

#: The version this code was written against and tested with.
SUPPORTED_VERSION: Final = "0.5.23"
#: Starting an interpreter on a busy machine with a cold disk.
_TIMEOUT_S: Final = 60.0

_PROBE: Final = """
import importlib.metadata as metadata, importlib.util as util, json, os, sys

def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

def found(module):
    try:
        return util.find_spec(module) is not None
    except ImportError:
        return False

plugins = {entry.name for entry in metadata.entry_points(group="sglang.srt.plugins")}
wanted = os.environ.get("SGLANG_PLUGINS")
print(json.dumps({
    "python": "%d.%d.%d" % sys.version_info[:3],
    "sglang": version("sglang") or ("unknown" if found("sglang") else None),
    "torch": version("torch"),
    "conserve": found("conserve_serving.engines.sglang.store"),
    "plugin": "conserve" in plugins,
    "plugin_allowed": not wanted or "conserve" in [name.strip() for name in wanted.split(",")],
}))
"""

#: Runs a command with an environment: exit code, standard output, standard error.
Runner = Callable[[list[str], Mapping[str, str]], tuple[int, str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonEnvironment:
    """One interpreter and what it can import.

    Attributes:
        python: its version.
        sglang: SGLang's version; None: it is not there.
        torch: PyTorch's version; None: it is not there.
        conserve: whether SGLang can load our store from there.
        plugin: whether SGLang finds our plug-in there; it does when our package is installed, not
            merely on the path.
        plugin_allowed: whether SGLANG_PLUGINS lets SGLang load it.
    """

    python: str
    sglang: str | None
    torch: str | None
    conserve: bool
    plugin: bool
    plugin_allowed: bool


class PythonUnusableError(Exception):
    """The interpreter cannot be run; the message says how it failed."""


def run_command(argv: list[str], env: Mapping[str, str]) -> tuple[int, str, str]:
    """The real `Runner`.

    Raises:
        OSError: there is no such program, or it cannot be run.
        subprocess.TimeoutExpired: it did not end.
    """
    done = subprocess.run(  # noqa: S603 - the interpreter that the configuration names
        argv,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def probe(python: str, env: Mapping[str, str], *, run: Runner = run_command) -> PythonEnvironment:
    """Ask an interpreter what it has.

    Args:
        python: path of the interpreter.
        env: variables it is to get beyond ours (``PYTHONPATH`` decides what it can import).
        run: runs a command.

    Raises:
        PythonUnusableError: it cannot be run, or does not answer.
    """
    try:
        code, out, err = run([python, "-c", _PROBE], env)
    except OSError as error:
        raise PythonUnusableError(f"{python} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise PythonUnusableError(f"{python} did not answer within {_TIMEOUT_S:g} s") from None
    try:
        answer = json.loads(out.splitlines()[-1]) if code == 0 else None
    except (ValueError, IndexError):
        answer = None
    if not isinstance(answer, dict):
        last = err.strip().splitlines()[-1:] or ["no output"]
        raise PythonUnusableError(f"{python} failed (exit code {code}): {last[0]}")
    return PythonEnvironment(**answer)


def what_is_missing(python: str, found: PythonEnvironment) -> tuple[str, str] | None:
    """What keeps SGLang from being started there: what, and the remedy; None: nothing."""
    if found.sglang is None:
        return (
            f"SGLang is not installed in the environment of {python}",
            f"{python} -m pip install sglang=={SUPPORTED_VERSION}, or name the interpreter of the "
            "environment that has it: python = … in the tier",
        )
    if not found.conserve:
        return (
            f"SGLang's environment ({python}) cannot import our hand-off store",
            f"{python} -m pip install --no-deps conserve-agents",
        )
    if not found.plugin:
        return (
            f"SGLang's environment ({python}) does not list our plug-in: ConServe is on its path "
            "but not installed there, or too old",
            f"{python} -m pip install --no-deps --upgrade conserve-agents",
        )
    if not found.plugin_allowed:
        return (
            "SGLANG_PLUGINS keeps SGLang from loading our plug-in",
            "add conserve to it (tiers.env, or the environment of this shell)",
        )
    return None


def version_warning(found: PythonEnvironment) -> str | None:
    """What to say of an SGLang that is not the version we know; None: it is."""
    if found.sglang in (None, "unknown", SUPPORTED_VERSION):
        return None
    return f"SGLang {found.sglang} is there; ConServe was tested with {SUPPORTED_VERSION} only"
