"""A proxy between a client and the gateway: remembers every model call, and refuses some.

It stands where a load balancer would, so that a test sees what really crossed the wire, retries
included, while the real gateway answers.
"""

from __future__ import annotations

import http.client
import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from conserve_agents import wire

#: Request headers that belong to one connection, not to the request.
_HOP = frozenset({"connection", "content-length", "host", "keep-alive", "transfer-encoding"})
#: Status noted of a call whose answer was lost.
LOST = 0
_MODEL_CALLS = ("/chat/completions", "/completions", "/responses", "/messages")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A model call as it arrived, and the status it was answered with; header names lower case."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    status: int

    def tag(self, name: str) -> str | None:
        """A header of the request."""
        return self.headers.get(name.lower())

    @property
    def conversation(self) -> str | None:
        return self.tag(wire.CONVERSATION_ID)

    @property
    def turn_id(self) -> str | None:
        return self.tag(wire.TURN_ID)

    @property
    def turn_index(self) -> int:
        return int(self.tag(wire.TURN_INDEX) or 0)


class RecordingProxy:
    """The proxy; a context manager.

    Args:
        upstream: the gateway's address, with its ``/v1``.

    Attributes:
        calls: model calls in the order of their arrival.
        base_url: what a client is pointed at.
    """

    def __init__(self, upstream: str) -> None:
        parts = urllib.parse.urlsplit(upstream)
        self.upstream = (parts.hostname or "", parts.port or 80)
        self._calls: list[Call | None] = []
        self._lock = threading.Lock()
        self._arrived = 0
        self._refusals: dict[int, int] = {}
        self._lost: set[int] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.proxy = self  # type: ignore[attr-defined] # how a handler finds it
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def calls(self) -> list[Call]:
        return [call for call in self._calls if call is not None]

    def refuse(self, *numbers: int, status: int = 503) -> None:
        """Answer the model calls with these numbers (1: the next one) without the gateway."""
        with self._lock:
            self._refusals.update({self._arrived + number: status for number in numbers})

    def lose(self, *numbers: int) -> None:
        """Lose the answers to the model calls with these numbers: the gateway serves them, and the
        client's connection breaks."""
        with self._lock:
            self._lost.update(self._arrived + number for number in numbers)

    def loses(self, place: int) -> bool:
        """Whether the answer to the model call at ``place`` is to be lost."""
        return place + 1 in self._lost

    def arrive(self) -> tuple[int, int | None]:
        """A model call arrives: its place among them, and the status to refuse it with."""
        with self._lock:
            self._arrived += 1
            self._calls.append(None)
            return self._arrived - 1, self._refusals.pop(self._arrived, None)

    def note(self, place: int, call: Call) -> None:
        """The model call at ``place`` was answered."""
        self._calls[place] = call


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _pass(self) -> None:
        proxy: RecordingProxy = self.server.proxy  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.urlsplit(self.path).path
        if self.command != "POST" or not path.endswith(_MODEL_CALLS):
            self._forward(proxy, body)
            return
        place, refusal = proxy.arrive()
        # Known before the answer is sent: a client that has its answer finds its call noted.
        call = Call(
            path=path,
            headers={name.lower(): value for name, value in self.headers.items()},
            body=json.loads(body),
            status=LOST if proxy.loses(place) else refusal or 200,
        )
        proxy.note(place, call)
        if refusal is None:
            self._forward(proxy, body, lose=proxy.loses(place))
            return
        error = {"message": "refused on purpose", "type": "test", "param": None, "code": None}
        raw = json.dumps({"error": error}).encode()
        self.send_response(refusal)
        self.send_header("retry-after-ms", "1")  # the SDK's own: no test waits
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_GET = do_POST = do_DELETE = _pass  # noqa: N815 - names that http.server looks for

    def _forward(self, proxy: RecordingProxy, body: bytes, *, lose: bool = False) -> None:
        connection = http.client.HTTPConnection(*proxy.upstream, timeout=60)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            if lose:
                answer.read()
                return
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            for piece in _pieces(answer):
                self.wfile.write(piece)
        finally:
            connection.close()
            self.close_connection = True


def _pieces(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """What arrives, as it arrives."""
    while piece := answer.read1(65536):
        yield piece
