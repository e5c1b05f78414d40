"""The conversation that calls made here belong to: one context variable, and how it travels."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

if TYPE_CHECKING:
    from conserve_agents.conversation import Conversation

_P = ParamSpec("_P")
_R = TypeVar("_R")

_current: Final[contextvars.ContextVar[Conversation | None]] = contextvars.ContextVar(
    "conserve_conversation", default=None
)


def current_conversation() -> Conversation | None:
    """The conversation that calls made here belong to, None outside of any."""
    return _current.get()


def set_current(value: Conversation | None) -> Conversation | None:
    """Make ``value`` current in this context; returns what was.

    Not a token to reset: a ``with`` block may be left in another context than it was entered in
    (async fixtures, generators), where a token would be refused.
    """
    before = _current.get()
    _current.set(value)
    return before


def propagate(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """``fn``, run in today's context wherever it is called: for thread pools.

    ``ThreadPoolExecutor.submit`` and ``run_in_executor`` lose context variables;
    ``asyncio.to_thread`` and asyncio tasks keep them.
    """
    context = contextvars.copy_context()

    @functools.wraps(fn)
    def in_context(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # A context cannot be entered twice at once: each call gets its own copy.
        return context.copy().run(fn, *args, **kwargs)

    return in_context
