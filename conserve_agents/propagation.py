"""Carrying the current conversation to where context variables do not go.

==================================  =====================================================
``asyncio.to_thread``, tasks        keep it by themselves
``threading.Thread(target=fn)``     ``Thread(target=propagate(fn))``
``ThreadPoolExecutor``, others      ``ContextExecutor(pool)``, or ``propagate(fn)``
``loop.run_in_executor(pool, fn)``  ``run_in_executor(pool, fn, …)``
``ProcessPoolExecutor``             ``ContextExecutor(pool)``: the conversation is handed over
another process, by any means       ``talk.handover()`` here, ``resume(token)`` there
a function that is one agent run    ``@in_conversation()``
==================================  =====================================================
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, Final, ParamSpec, TypeVar, cast

from conserve_agents.context import current_conversation, propagate
from conserve_agents.conversation import Conversation, conversation, resume

_P = ParamSpec("_P")
_R = TypeVar("_R")


class ContextExecutor(Executor):
    """An executor whose work belongs to the conversation it was submitted in.

    Around a ``ProcessPoolExecutor`` the conversation is handed over with each submission; around
    any other the whole context goes along. Everything else is the inner executor's.

    Args:
        inner: runs the work; it is shut down together with this one.
    """

    def __init__(self, inner: Executor) -> None:
        self._inner: Final = inner

    def submit(self, fn: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_R]:
        """As ``Executor.submit``; ``map`` comes here too."""
        if not _has_processes(self._inner):
            return self._inner.submit(propagate(fn), *args, **kwargs)
        talk = current_conversation()
        if talk is None:
            return self._inner.submit(fn, *args, **kwargs)
        return self._inner.submit(_handed_over, talk.handover(), fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As ``Executor.shutdown``."""
        self._inner.shutdown(wait, cancel_futures=cancel_futures)


def _has_processes(executor: Executor) -> bool:
    """Whether it is a process pool; whoever has made one has imported its module."""
    module = sys.modules.get("concurrent.futures.process")
    return module is not None and isinstance(executor, module.ProcessPoolExecutor)


def _handed_over(
    token: str, fn: Callable[..., _R], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _R:
    """Runs in the other process."""
    with resume(token).activate():
        return fn(*args, **kwargs)


async def run_in_executor(
    executor: Executor | None, fn: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs
) -> _R:
    """``loop.run_in_executor`` that keeps the conversation, and takes keyword arguments.

    Args:
        executor: where to run it; None: the loop's own thread pool.
        fn: what to run, with ``args`` and ``kwargs``.
    """
    call = functools.partial(fn, *args, **kwargs)
    if executor is None:
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(None, context.run, call)
    carrier = executor if isinstance(executor, ContextExecutor) else ContextExecutor(executor)
    return await asyncio.wrap_future(carrier.submit(call))


def in_conversation(
    id: str | Callable[..., str | None] | None = None, **options: Any
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator: every call of the function, sync or async, is a conversation.

        @in_conversation()
        def solve(task): …                       # a new one each time

        @in_conversation(lambda chat_id, text: chat_id, end_on_exit=False)
        async def answer(chat_id, text): …       # the chat's own, which goes on

    Args:
        id: see :class:`~conserve_agents.Conversation`, or a function of the call's arguments
            that gives it.
        options: as for :func:`~conserve_agents.conversation`.

    Raises:
        TypeError: the function is a generator: a context variable would leak to its consumer.
    """

    def decorate(fn: Callable[_P, _R]) -> Callable[_P, _R]:
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise TypeError(
                f"in_conversation: {fn.__qualname__} is a generator, whose conversation would leak "
                "to its consumer: enter conversation() around the loop that consumes it"
            )

        def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Conversation:
            return conversation(id(*args, **kwargs) if callable(id) else id, **options)

        if inspect.iscoroutinefunction(fn):

            @functools.wraps(fn)
            async def in_async(*args: _P.args, **kwargs: _P.kwargs) -> Any:
                async with enter(args, kwargs):
                    return await fn(*args, **kwargs)

            return cast("Callable[_P, _R]", in_async)

        @functools.wraps(fn)
        def in_sync(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with enter(args, kwargs):
                return fn(*args, **kwargs)

        return in_sync

    return decorate
