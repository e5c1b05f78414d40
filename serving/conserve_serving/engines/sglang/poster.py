"""Tells the gateway what became of prompts: a thread, so that no one in the engine ever waits.

Loaded inside SGLang: standard library only.
"""

from __future__ import annotations

import http.client
import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

_log = logging.getLogger(__name__)

_TRIES: Final = 5
_FIRST_PAUSE_S: Final = 0.05
_TIMEOUT_S: Final = 2.0


class Poster:
    """Sends JSON to one address, in order, with a bounded number of tries.

    Args:
        url: ``http://host:port/path``.
        sleep: waits between tries.

    Attributes:
        sent, lost: messages that arrived, and that were given up.
    """

    def __init__(self, url: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._sleep = sleep
        self._queue: queue.SimpleQueue[dict[str, object] | None] = queue.SimpleQueue()
        self._connection: http.client.HTTPConnection | None = None
        self.sent = 0
        self.lost = 0
        self._thread = threading.Thread(target=self._run, name="conserve-acks", daemon=True)
        self._thread.start()

    def send(self, message: dict[str, object]) -> None:
        """Queue a message. Returns at once."""
        self._queue.put(message)

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Send what is queued, then end."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (message := self._queue.get()) is not None:
            self._deliver(json.dumps(message).encode())
        if self._connection is not None:
            self._connection.close()

    def _deliver(self, body: bytes) -> None:
        why = ""
        for attempt in range(_TRIES):
            if attempt:
                self._sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                status = self._post(body)
            except (OSError, http.client.HTTPException) as error:
                why = str(error) or type(error).__name__
                self._connection = None  # the next try connects anew
                continue
            if status < 300:
                self.sent += 1
                return
            why = f"HTTP {status}"
            if 400 <= status < 500 and status not in (408, 429):
                break  # the gateway does not want it: asking again will not help
        self.lost += 1
        _log.warning("an acknowledgement was lost (%s): %s", why, body[:200])

    def _post(self, body: bytes) -> int:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(
                self._host, self._port, timeout=_TIMEOUT_S
            )
        self._connection.request(
            "POST", self._path, body=body, headers={"Content-Type": "application/json"}
        )
        response = self._connection.getresponse()
        response.read()
        return response.status
