"""A gateway over the test bed's engines, and prompts that no other test has sent."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def random_ids(request: pytest.FixtureRequest) -> Iterator[Callable[[int], list[int]]]:
    """Makes prompts of a length, as token ids; the same in every run, other ones in every test."""
    source = random.Random(request.node.nodeid)
    yield lambda count: [source.randrange(300, 2000) for _ in range(count)]
