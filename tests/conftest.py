"""What several folders share: how property tests run, and the session's real SGLang engines."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
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
