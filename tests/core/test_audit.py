"""A book that is off by a page is found, whichever it is."""

from __future__ import annotations

import pytest
from world import World

from conserve_serving.core.errors import InvariantError
from conserve_serving.core.types import EngineId


@pytest.mark.parametrize(
    "book",
    [
        "resident_tokens",
        "reserved_tokens",
        "parked_tokens",
        "parked_conversations",
        "idle_tokens",
        "active_tokens",
        "foreseen_tokens",
        "handing_over_tokens",
        "egress_tokens",
        "prefill_backlog_tokens",
        "tail_backlog_tokens",
    ],
)
def test_a_book_that_does_not_add_up_is_found(book: str) -> None:
    at = World()
    at.cluster("d0", "d1", host=100_000)
    at.first_turn("t0", "a")
    at.arrive("t1", "b", 9_000)
    for name in ("p0", "d0", "d1"):
        engine = at.scheduler.engines[EngineId(name)]
        right = getattr(engine, book)
        setattr(engine, book, right + engine.page_tokens)
        with pytest.raises(InvariantError, match=name):
            at.scheduler.check_invariants(recount=True)
        setattr(engine, book, right)
    at.scheduler.check_invariants(recount=True)
