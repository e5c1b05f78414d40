"""Sessions on the engines: what keeps an idle conversation's KV on the device between its turns.

A conversation has a session on one engine at most, opened before its first turn there, closed when
the scheduler parks it (its KV may then go to the host tier) or releases it (its KV then leaves the
engine), and opened again by its next turn. When the conversation ends, its pages leave the store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from xxhash import xxh3_128_hexdigest

from conserve_serving.core.types import ConversationId
from conserve_serving.engines.http_errors import EngineHttpError, EngineRefused
from conserve_serving.gateway.conversations import Conversation
from conserve_serving.gateway.engine import Engine

_log = logging.getLogger("conserve.gateway.sessions")


class Background:
    """Tasks nobody waits for; kept from being lost, and their failures from being silent."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        """Run ``work``; ``what`` names it in logs."""
        task = asyncio.create_task(work, name=what)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s failed", task.get_name(), exc_info=error)

    async def join(self, timeout_s: float) -> None:
        """Wait for all of them, then cancel what is left."""
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)


def session_id(key: ConversationId) -> str:
    """The engine's name for a conversation: says nothing about tenant or client."""
    return f"cs-{xxh3_128_hexdigest(key.encode())}"


class Sessions:
    """Opens and closes sessions.

    Args:
        engine_of: the engine of an id, if it is known.
        background: runs closings, which nobody waits for.
        idle_timeout_s: engines end a session by themselves after this long (wall seconds).
    """

    def __init__(
        self,
        *,
        engine_of: Callable[[str], Engine | None],
        background: Background,
        idle_timeout_s: Callable[[], float],
    ) -> None:
        self._engine_of = engine_of
        self._background = background
        self._idle_timeout_s = idle_timeout_s
        self._closing: dict[ConversationId, asyncio.Task[None]] = {}

    def open_already(self, conversation: Conversation, engine: Engine) -> str | None:
        """The session's name if it is open there, without asking anybody."""
        if conversation.session == (engine.id, engine.epoch) and engine.keeps_sessions:
            return session_id(conversation.key)
        return None

    async def ensure(self, conversation: Conversation, engine: Engine) -> str | None:
        """Have a session open for ``conversation`` on ``engine``.

        Returns:
            What to send as ``session_id``; None where the engine keeps no sessions.

        Raises:
            EngineHttpError: the engine could not be reached.
        """
        if not engine.keeps_sessions:
            return None
        name = self.open_already(conversation, engine)
        if name is not None:
            return name
        here, name = (engine.id, engine.epoch), session_id(conversation.key)
        if conversation.session is not None:
            self.close(conversation)
        await self.settle(conversation)  # opening must not overtake the closing
        conversation.session = here
        capacity = engine.description.max_context_tokens if engine.description else 0
        try:
            await engine.client.open_session(
                name, capacity_tokens=capacity, timeout_s=self._idle_timeout_s()
            )
        except EngineRefused as error:
            if error.status in (404, 405, 501):
                _log.warning("engine %s keeps no sessions: %s", engine.id, error)
                engine.keeps_sessions = False
                conversation.session = None
                return None
            # Refused because it is open already: a concurrent turn, or an earlier gateway, did it.
        except BaseException:
            conversation.session = None
            raise
        return name

    async def settle(self, conversation: Conversation) -> None:
        """Return when what ended before under this conversation's name has been cleared away."""
        closing = self._closing.get(conversation.key)
        if closing is not None:
            await asyncio.wait([closing])

    def close(self, conversation: Conversation) -> None:
        """Let the engine park the conversation's KV, or evict it. Returns at once."""
        if conversation.session is None:
            return
        engine_id, epoch = conversation.session
        conversation.session = None
        engine = self._engine_of(engine_id)
        if engine is None or engine.epoch != epoch or not engine.serving:
            return
        self._run(conversation.key, engine, engine.client.close_session)

    def release(self, conversation: Conversation, engine_id: str) -> None:
        """Have the conversation's KV leave an engine. Returns at once."""
        engine = self._engine_of(engine_id)
        calls: list[Callable[[str], Awaitable[None]]] = []
        if conversation.session is not None and conversation.session[0] == engine_id:
            if engine is not None and engine.epoch == conversation.session[1]:
                calls.append(engine.client.close_session)
            conversation.session = None
        if engine is None or not engine.serving:
            return
        if engine.has_store:
            calls.append(engine.client.free_session)
        if calls:
            self._run(conversation.key, engine, *calls)

    def end(self, conversation: Conversation, engines: Iterable[Engine]) -> None:
        """The conversation is over: have its pages leave the store. Returns at once.

        Args:
            conversation: with no turn running.
            engines: those that serve.
        """
        if not conversation.in_store:
            return
        conversation.in_store = False
        able = [engine for engine in engines if engine.has_store]
        able.sort(key=lambda engine: engine.id != conversation.decoder)

        async def forget(name: str) -> None:
            for engine in able:  # any of them can do it for all
                try:
                    await engine.client.forget_pages(name)
                    break
                except EngineHttpError as error:
                    if engine is able[-1]:
                        raise
                    _log.warning("clearing the store by %s: %s", engine.id, error)

        if able:
            self._run(conversation.key, able[0], forget)

    def _run(
        self, key: ConversationId, engine: Engine, *calls: Callable[[str], Awaitable[None]]
    ) -> None:
        before = self._closing.get(key)
        task = self._background.start(
            self._call(engine, key, before, calls), f"close session on {engine.id}"
        )
        self._closing[key] = task

    async def _call(
        self,
        engine: Engine,
        key: ConversationId,
        before: asyncio.Task[None] | None,
        calls: Iterable[Callable[[str], Awaitable[None]]],
    ) -> None:
        mine = asyncio.current_task()
        if before is not None:
            await asyncio.wait([before])
        try:
            for call in calls:
                await call(session_id(key))
        except EngineHttpError as error:
            _log.warning("closing a session on %s: %s", engine.id, error)
        finally:
            if self._closing.get(key) is mine:
                del self._closing[key]
