"""What several folders share: how property tests run, and the session's real SGLang engines."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

if importlib.util.find_spec("hypothesis"):  # not in every environment
    from hypothesis import settings

    # A slow machine is no failure: no test is a timed one.
    settings.register_profile("project", deadline=None)
    settings.load_profile("project")


def _load_testbed() -> ModuleType:
    """``tests/sglang/testbed.py``: test folders are not packages."""
    name = "sglang_testbed"
    path = Path(__file__).parent / "sglang" / "testbed.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


testbed = _load_testbed()


@pytest.fixture(scope="session")
def sglang_testbed(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Any]:
    """One prefiller and two decoders of real SGLang for the whole session (a `Testbed`)."""
    missing = testbed.why_not()
    if missing is not None:
        pytest.skip(missing)
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")

    def narrate(text: str) -> None:
        if reporter is not None:
            reporter.write_line(text)

    kept = os.environ.get("CONSERVE_TESTBED")
    if kept is not None:
        bed = testbed.attach(Path(kept))
    else:
        bed = testbed.open_testbed(tmp_path_factory.mktemp("sglang"), narrate)
    pytestconfig.stash[_BED] = bed
    try:
        yield bed
    finally:
        if kept is not None:
            bed.acks.close()
        else:
            bed.close()


@contextlib.contextmanager
def _conserve_up(run_dir: Path) -> Iterator[str]:
    argv = [sys.executable, "-m", "conserve_serving.cli", "up", "--port", "0", "--speed", "50"]
    argv += ["--announce", "--exit-with-parent", "--run-dir", str(run_dir)]
    with (run_dir / "up.log").open("wb") as log:
        up = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
        assert up.stdin is not None and up.stdout is not None
        try:
            ready = up.stdout.readline()  # one line when it is up, none when it cannot be
            if not ready:
                pytest.fail(f"conserve up: {(run_dir / 'up.log').read_text()}")
            yield str(json.loads(ready)["url"])
            up.stdin.close()
            assert up.wait(timeout=30) == 0
        finally:
            up.kill()
            up.wait()
            up.stdin.close()
            up.stdout.close()


@pytest.fixture(scope="session")
def conserve_up() -> Callable[[Path], contextlib.AbstractContextManager[str]]:
    """Starts `conserve up` (emulated engines, 50 times as fast) in a folder; gives its URL."""
    return _conserve_up


_BED = pytest.StashKey[Any]()


@pytest.fixture
def bed(sglang_testbed: Any) -> Iterator[Any]:
    """The test bed at rest: all engines alive with empty caches, no acknowledgement pending."""
    sglang_testbed.acks.reset()
    sglang_testbed.revive()
    for engine in sglang_testbed.engines.values():
        engine.flush()
    yield sglang_testbed
    sglang_testbed.acks.forward_to(None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """A failed test of the engines shows the ends of their logs."""
    report = yield
    bed = item.config.stash.get(_BED, None)
    if report.failed and bed is not None and "sglang_testbed" in getattr(item, "fixturenames", ()):
        report.sections.append(("engine logs", bed.tails()))
    return report
