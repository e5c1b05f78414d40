"""Acknowledgements: telling the gateway that every page of a prompt is stored.

SGLang's reply to a prefill comes before its pages are on the store, so the gateway waits for this
message before it calls the decoder. It is sent in the background with a bounded number of tries;
one that is lost costs the gateway its patience, never this engine a thing.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit

from conserve_serving.engines.http import HttpPool
from conserve_serving.engines.http_errors import EngineHttpError

_log = logging.getLogger(__name__)

_TRIES: Final = 5
_FIRST_PAUSE_S: Final = 0.05
_TIMEOUT_S: Final = 2.0

#: Sends a body and says with which HTTP status it was answered.
Post = Callable[[bytes], Awaitable[int]]


class AckSender:
    """Sends acknowledgements to one address.

    Args:
        url: ``http://host:port/path``.
        engine_id: this engine's name in the message.
        post, sleep: injected in tests.

    Attributes:
        sent, lost: messages that arrived, and that were given up.
    """

    def __init__(
        self,
        url: str,
        *,
        engine_id: str,
        post: Post | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._engine_id = engine_id
        self._sleep = sleep
        self._tasks: set[asyncio.Task[None]] = set()
        self._pool: HttpPool | None = None
        parts = urlsplit(url)
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if post is None:
            self._pool = HttpPool(parts.hostname or "", parts.port or 80)
            post = self._send
        self._post = post
        self.sent = 0
        self.lost = 0

    def send(self, *, key: str, tokens: int, duration_s: float) -> None:
        """Start telling that the prompt ``key`` names is stored.

        Args:
            key: the last full page's.
            tokens: how much of the prompt is there.
            duration_s: how long that took, in this engine's seconds.
        """
        body = json.dumps(
            {"engine": self._engine_id, "key": key, "tokens": tokens, "duration_s": duration_s}
        ).encode()
        task = asyncio.get_running_loop().create_task(self._deliver(body, key))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self) -> None:
        """Until every message so far has arrived or been given up."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    async def close(self) -> None:
        """Give up what has not been delivered."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._pool is not None:
            self._pool.close()

    async def _deliver(self, body: bytes, key: str) -> None:
        why = ""
        for attempt in range(_TRIES):
            if attempt:
                await self._sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                status = await self._post(body)
            except (EngineHttpError, OSError) as error:
                why = str(error)
                continue
            if status < 300:
                self.sent += 1
                return
            why = f"HTTP {status}"
            if 400 <= status < 500 and status not in (408, 429):
                break  # the gateway does not want it: asking again will not help
        self.lost += 1
        _log.warning("acknowledgement of hand-off %s lost: %s", key, why)

    async def _send(self, body: bytes) -> int:
        if self._pool is None:
            raise OSError("the sender was built without a pool")
        headers = [(b"content-type", b"application/json")]
        response = await self._pool.request(
            "POST", self._path, headers, body, head_timeout_s=_TIMEOUT_S
        )
        async with response:
            await response.read()
        return response.status
