"""A gateway over the test bed's engines, and prompts that no other test has sent."""

from __future__ import annotations

import importlib.util
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_asyncio import is_async_test


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """LangChain's tests: none from a recording, and the async ones in one event loop.

    langchain-openai keeps one async client per address, and a client belongs to one loop.
    """
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "vcr"]
        if item.path.stem == "test_langchain_standard" and is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest.fixture
def random_ids(request: pytest.FixtureRequest) -> Iterator[Callable[[int], list[int]]]:
    """Makes prompts of a length, as token ids; the same in every run, other ones in every test."""
    source = random.Random(request.node.nodeid)
    yield lambda count: [source.randrange(300, 2000) for _ in range(count)]


def _gateway_process() -> Any:
    """The class in ``gateway_process.py``: test folders are not packages."""
    name = "sglang_gateway_process"
    if name not in sys.modules:
        path = Path(__file__).with_name("gateway_process.py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name].GatewayProcess


@pytest.fixture
def make_gateway(bed: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts gateways over the test bed's engines (all of them, unless the test names some).

    Acknowledgements go to the latest one. Waits until its engines have joined. The store is empty.
    """
    started: list[Any] = []
    for folder in ("pages", "conversations"):  # of tests whose conversations have not ended
        for entry in (bed.store / "tiny" / folder).iterdir():
            shutil.rmtree(entry)

    def make(
        *, prefillers: Any = None, decoders: Any = None, wait: bool = True, **settings: object
    ) -> Any:
        first = [bed.prefiller] if prefillers is None else prefillers
        rest = bed.decoders if decoders is None else decoders
        gateway = _gateway_process()(
            tmp_path / f"gateway{len(started)}",
            prefillers=[engine.url for engine in first],
            decoders=[engine.url for engine in rest],
            settings=settings,
        )
        started.append(gateway)
        bed.acks.forward_to(gateway.url)
        if wait:
            names = [f"p{n}" for n in range(len(first))] + [f"d{n}" for n in range(len(rest))]
            gateway.until_ready(*names)
        return gateway

    yield make
    for gateway in started:
        gateway.close()


@pytest.fixture
def gateway(make_gateway: Callable[..., Any]) -> Any:
    """One gateway over all engines."""
    return make_gateway()


@pytest.fixture(scope="module")
def module_gateway(sglang_testbed: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One gateway for all tests of a module: for those that leave nothing behind."""
    sglang_testbed.acks.reset()
    sglang_testbed.revive()
    gateway = _gateway_process()(
        tmp_path_factory.mktemp("gateway"),
        prefillers=[sglang_testbed.prefiller.url],
        decoders=[engine.url for engine in sglang_testbed.decoders],
    )
    sglang_testbed.acks.forward_to(gateway.url)
    try:
        gateway.until_ready("p0", "d0", "d1")
        yield gateway
    finally:
        gateway.close()
        sglang_testbed.acks.forward_to(None)
