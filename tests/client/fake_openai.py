"""A scripted OpenAI-compatible server on a real socket that remembers every request.

It stands in for the gateway where a test is about what the client sends: it answers chat and plain
completions and responses (streamed or not), tokenize, models, and the end of a conversation.
"""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from conserve_agents import wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A request as it arrived; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    def tag(self, name: str) -> str | None:
        return self.headers.get(name.lower())


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One scripted answer to a model call. ``after`` runs before it is sent."""

    text: str = "hello"
    tool_calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    after: Callable[[], object] | None = None


class FakeOpenAI:
    """The server; a context manager. ``script`` is used up first, then ``Reply()`` for ever."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.script: deque[Reply] = deque()
        self.end_status = 204
        self.placement: Callable[[Seen, int], str] = lambda seen, number: f"place-{number}"
        self.tokenize_status = 200
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.fake = self  # type: ignore[attr-defined] # how a handler finds it
        self.root = f"http://127.0.0.1:{self._server.server_port}"
        self.base_url = f"{self.root}/v1"

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
    def calls(self) -> list[Seen]:
        """Model calls, retries included."""
        ends = ("/completions", "/responses")
        return [s for s in self.seen if s.method == "POST" and s.path.endswith(ends)]

    @property
    def ended(self) -> list[str]:
        """Ids of conversations that were ended, in order."""
        prefix = "/conserve/v1/conversations/"
        return [
            urllib.parse.unquote(s.path.removeprefix(prefix))
            for s in self.seen
            if s.method == "DELETE" and s.path.startswith(prefix)
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    @property
    def fake(self) -> FakeOpenAI:
        return self.server.fake  # type: ignore[attr-defined,no-any-return]

    def _take(self) -> Seen:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        seen = Seen(
            method=self.command,
            path=self.path,
            headers={k.lower(): v for k, v in self.headers.items()},
            body=json.loads(raw) if raw else {},
        )
        self.fake.seen.append(seen)
        return seen

    def _send(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        raw = b"" if status == 204 else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        self._take()
        self._send(200, {"object": "list", "data": [{"id": "fake-model", "object": "model"}]})

    def do_DELETE(self) -> None:
        self._take()
        self._send(self.fake.end_status, {})

    def do_POST(self) -> None:
        seen = self._take()
        if seen.path == "/v1/tokenize":
            status = self.fake.tokenize_status
            self._send(status, {"tokens": [], "count": 4242, "max_model_len": 9})
            return
        if seen.path.endswith("/idle"):
            self._send(200, {})
            return
        reply = self.fake.script.popleft() if self.fake.script else Reply()
        if reply.after is not None:
            reply.after()
        headers = {
            wire.PLACEMENT: self.fake.placement(seen, len(self.fake.calls)),
            wire.TURN_INDEX: seen.tag(wire.TURN_INDEX) or "1",
            **reply.headers,
        }
        if reply.status != 200:
            error = {"message": "scripted", "type": "scripted", "param": None, "code": None}
            self._send(reply.status, {"error": error}, headers)
        elif seen.body.get("stream"):
            self._stream(reply, seen, headers)
        else:
            self._send(200, _whole(reply, seen), headers)

    def _stream(self, reply: Reply, seen: Seen, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        if seen.path.endswith("/responses"):
            for event in _events(reply, seen):
                head = f"event: {event['type']}\n".encode()
                self.wfile.write(head + b"data: " + json.dumps(event).encode() + b"\n\n")
        else:
            for chunk in _chunks(reply, seen):
                self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True


_USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


def _calls(reply: Reply) -> list[dict[str, Any]]:
    return [
        {
            "index": i,
            "id": f"call-{i}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for i, (name, arguments) in enumerate(reply.tool_calls)
    ]


def _response(reply: Reply, seen: Seen, status: str = "completed") -> dict[str, Any]:
    text = {"type": "output_text", "text": reply.text, "annotations": []}
    message = {"id": "m", "type": "message", "role": "assistant", "status": status}
    usage = {
        **{"input_tokens": 7, "output_tokens": 2, "total_tokens": 9},
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    return {
        **{"id": "r", "object": "response", "created_at": 1, "model": seen.body.get("model")},
        **{"status": status, "parallel_tool_calls": True, "tool_choice": "auto", "tools": []},
        "output": [{**message, "content": [text]}] if status == "completed" else [],
        "usage": usage if status == "completed" else None,
    }


def _events(reply: Reply, seen: Seen) -> list[dict[str, Any]]:
    done = _response(reply, seen)
    (message,) = done["output"]
    (text,) = message["content"]
    begun = {**message, "status": "in_progress", "content": []}
    place: dict[str, Any] = {"item_id": "m", "output_index": 0, "content_index": 0}
    part = {**text, "text": ""}
    begin = "response.output_item.added"
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": _response(reply, seen, "in_progress")},
        {"type": begin, "output_index": 0, "item": begun},
        {"type": "response.content_part.added", **place, "part": part},
        *(
            {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
            for piece in reply.text
        ),
        {"type": "response.output_text.done", **place, "text": reply.text, "logprobs": []},
        {"type": "response.content_part.done", **place, "part": text},
        {"type": "response.output_item.done", "output_index": 0, "item": message},
        {"type": "response.completed", "response": done},
    ]
    return [{**event, "sequence_number": n} for n, event in enumerate(events)]


def _whole(reply: Reply, seen: Seen) -> dict[str, Any]:
    if seen.path.endswith("/responses"):
        return _response(reply, seen)
    common = {"id": "r", "created": 1, "model": seen.body.get("model"), "usage": _USAGE}
    if "messages" not in seen.body:
        choice: dict[str, Any] = {"index": 0, "text": reply.text, "finish_reason": "stop"}
        return {**common, "object": "text_completion", "choices": [choice]}
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.tool_calls:
        message["tool_calls"] = _calls(reply)
    finish = "tool_calls" if reply.tool_calls else "stop"
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {**common, "object": "chat.completion", "choices": [choice]}


def _chunks(reply: Reply, seen: Seen) -> list[dict[str, Any]]:
    common = {
        "id": "r",
        "created": 1,
        "model": seen.body.get("model"),
        "object": "chat.completion.chunk",
    }
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": piece} for piece in reply.text]
    if reply.tool_calls:
        deltas.append({"tool_calls": _calls(reply)})
    chunks = [{**common, "choices": [{"index": 0, "delta": d}]} for d in deltas]
    finish = "tool_calls" if reply.tool_calls else "stop"
    last = {"index": 0, "delta": {}, "finish_reason": finish}
    chunks.append({**common, "choices": [last]})
    if (seen.body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**common, "choices": [], "usage": _USAGE})
    return chunks
