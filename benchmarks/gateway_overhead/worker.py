"""Dummy engines: they answer SGLang's API from memory, much faster than what is measured.

A request chooses its reply by fields every router passes on:

* ``max_tokens``: number of content events;
* ``seed``: microseconds between events (0: at once, each in a write of its own);
* ``temperature``: 1 makes the first event wait as well (the request is "in prefill").

Each event carries the monotonic time of its sending. ``GET /bench/log`` tells when requests came
and when their clients left, for the measurement of aborts.

    python worker.py PORT [PORT …]
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import cast

import uvloop

MODEL = "bench"
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_FIELDS = re.compile(rb'"(max_tokens|seed|temperature)": ?([0-9]+)')
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_LOADS = {
    "loads": [
        {
            "num_running_reqs": 0,
            "num_waiting_reqs": 0,
            "total_prefill_uncached_tokens": 0,
            "total_prefill_busy_us": 0,
            "decode_moments": None,
        }
    ]
}
_SERVER_INFO = {
    "served_model_name": MODEL,
    "model_path": MODEL,
    "page_size": 64,
    "max_total_num_tokens": 2_000_000_000,
    "context_length": 10_000_000,
    "enable_session_radix_cache": True,
    "enable_priority_scheduling": True,
    "version": "0.5.23",
}
_MODEL_INFO = {
    "served_model_name": MODEL,
    "model_path": MODEL,
    "is_generation": True,
    "disaggregation_mode": "null",
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
}
_MODELS = {
    "object": "list",
    "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "sglang",
              "root": MODEL, "max_model_len": 10_000_000}],
}  # fmt: skip
_METRICS = b'sglang:kv_used_tokens{tp_rank="0"} 0.0\nsglang:kv_evictable_tokens{tp_rank="0"} 0.0\n'
_FIXED: dict[bytes, bytes] = {
    b"/health": b"",
    b"/health_generate": b"",
    b"/v1/models": json.dumps(_MODELS).encode(),
    b"/server_info": json.dumps(_SERVER_INFO).encode(),
    b"/get_server_info": json.dumps(_SERVER_INFO).encode(),
    b"/model_info": json.dumps(_MODEL_INFO).encode(),
    b"/get_model_info": json.dumps(_MODEL_INFO).encode(),
    b"/v1/loads": json.dumps(_LOADS).encode(),
    b"/metrics": _METRICS,
    b"/open_session": b'"session"',
    b"/close_session": b"",
    b"/abort_request": b"",
}


class Log:
    """When requests came and when they were given up, in monotonic nanoseconds."""

    def __init__(self) -> None:
        self.received_ns: list[int] = []
        self.left_ns: list[int] = []


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(index: int) -> bytes:
    data = b'data: {"id":"c","object":"chat.completion.chunk","created":0,"model":"bench",'
    data += b'"choices":[{"index":0,"delta":{"content":"t=%d "},' % time.monotonic_ns()
    data += b'"finish_reason":null}]}\n\n'
    return (_HEAD if index == 0 else b"") + _chunk(data)


def _ending(prompt_tokens: int, events: int) -> bytes:
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": events,
        "total_tokens": prompt_tokens + events,
        "prompt_tokens_details": {"cached_tokens": max(0, prompt_tokens - 64)},
    }
    stop = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": MODEL}
    choices = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    last = json.dumps({**stop, "choices": choices, "usage": None})
    told = json.dumps({**stop, "choices": [], "usage": usage})
    data = f"data: {last}\n\ndata: {told}\n\ndata: [DONE]\n\n".encode()
    return _chunk(data) + b"0\r\n\r\n"


class Engine(asyncio.Protocol):
    """One connection. Parses just enough of HTTP for clients that send correct requests."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._path = b""  # of the request whose body is being read
        self._missing = 0  # bytes of it still to come
        self._chunked = False
        self._timer: asyncio.Handle | None = None
        self._streaming = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._streaming:
            self._log.left_ns.append(time.monotonic_ns())

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        if not self._path:
            head, found, body = b"".join(self._parts).partition(b"\r\n\r\n")
            if not found:
                return
            self._path = head.split(b" ", 2)[1].partition(b"?")[0]
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            self._missing = int(length[1]) if length else 0
            # smg streams large bodies on in chunks. They are not taken apart, only their end is
            # looked for: the fields stand in the first one, and nothing else is read.
            self._chunked = b"transfer-encoding: chunked" in head.lower()
            self._parts = [body]
            data = body
        self._missing -= len(data)
        if self._missing > 0:
            return
        if self._chunked and not b"".join(self._parts[-8:]).endswith(_LAST_CHUNK):
            return
        body, self._parts = b"".join(self._parts), []
        path, self._path = self._path, b""
        self._answer(path, body)

    def _answer(self, path: bytes, body: bytes) -> None:
        if path == b"/v1/chat/completions":
            self._log.received_ns.append(time.monotonic_ns())
            # Fields stand first as the load sends them, last where a router has reordered them.
            fields = dict(_FIELDS.findall(body[:512] + body[-4096:]))
            self._stream(
                events=int(fields.get(b"max_tokens", b"5")),
                gap_s=int(fields.get(b"seed", b"0")) / 1e6,
                wait=fields.get(b"temperature", b"0") == b"1",
                prompt_tokens=len(body) // 4,
            )
            return
        if path == b"/v1/tokenize":
            count = max(1, len(body) // 4)
            reply = b'{"tokens":[1%s],"count":%d}' % (b",1" * (count - 1), count)
        elif path == b"/generate":
            reply = b'{"meta_info":{"prompt_tokens":%d,"cached_tokens":0}}' % (len(body) // 2)
        elif path == b"/bench/log":
            log = {"received_ns": self._log.received_ns, "left_ns": self._log.left_ns}
            reply = json.dumps(log).encode()
        else:
            if path == b"/abort_request":
                self._log.left_ns.append(time.monotonic_ns())
            reply = _FIXED.get(path, b"{}")
        status = b"200 OK" if path in _FIXED or reply != b"{}" else b"404 Not Found"
        self._transport.write(
            b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (status, len(reply), reply)
        )

    def _stream(self, *, events: int, gap_s: float, wait: bool, prompt_tokens: int) -> None:
        self._streaming = True
        start_s = self._loop.time() + (gap_s if wait else 0.0)

        def send(index: int) -> None:
            if index < events:
                self._transport.write(_event(index))
                if gap_s:  # by the clock, so that a late event does not delay the rest
                    due_s = start_s + (index + 1) * gap_s
                    self._timer = self._loop.call_at(due_s, send, index + 1)
                else:
                    self._timer = self._loop.call_soon(send, index + 1)
                return
            self._timer = None
            self._streaming = False
            self._transport.write(_ending(prompt_tokens, events))

        if wait and gap_s:
            self._timer = self._loop.call_at(start_s, send, 0)
        else:
            send(0)


async def main(ports: list[int]) -> None:
    """Serve until killed; prints ``ready`` when all ports listen."""
    log = Log()
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(lambda: Engine(log), "127.0.0.1", port, backlog=1024)
        for port in ports
    ]
    print("ready", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    uvloop.run(main([int(port) for port in sys.argv[1:]]))
