"""A scripted gateway on a real socket, for the replayer's tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

PAGE = 16


@dataclass
class FakeGateway:
    """Answers completions token by token, finds prefixes in its "cache", and fails on request.

    ``faults`` maps (turn index, attempt) to what goes wrong there, for every conversation:
    ``("status", code, retry_after)``, ``reset``, ``die`` (connection dies mid-stream),
    ``error`` (an error event mid-stream), ``cut`` (ends without usage), ``short`` (one token too
    few), ``garbage`` (an event that is not JSON), ``stall`` (no byte until the client leaves).
    """

    faults: dict[tuple[int, int], Any] = field(default_factory=dict)
    token_ids: bool = True
    describes_cluster: bool = True
    decoder: Callable[[int], str] = lambda turn: "d0"
    requests: list[dict[str, Any]] = field(default_factory=list)
    prompts: dict[str, list[list[int]]] = field(default_factory=dict)
    contexts: dict[str, list[int]] = field(default_factory=dict)
    attempts: dict[tuple[str, int], int] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    energy_j: float = 0.0
    transfers: int = 0
    client_left: asyncio.Event = field(default_factory=asyncio.Event)
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""

    def cluster(self) -> dict[str, Any]:
        self.energy_j += 50.0
        return {
            "gateway": {"version": "0", "policy": "conserve", "tier_mode": "dedicated"},
            "speed": 1000.0,
            "engines": [
                {
                    "id": name,
                    "tier": tier,
                    "state": "up",
                    "profile": None,
                    "kv_capacity_tokens": 4096,
                    "kv_held_tokens": 100,
                    "page_tokens": PAGE,
                    "energy_j": self.energy_j,
                    "energy_source": "modelled: test",
                }
                for name, tier in (("p0", "prefill"), ("d0", "decode"))
            ],
            "counters": {"transfers_by_reason": {"first_turn": self.transfers}},
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.decode("latin-1").split("\r\n")
                method, path, _ = lines[0].split(" ")
                pairs = (line.split(": ", 1) for line in lines[1:] if line)
                headers = {name.lower(): value for name, value in pairs}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                await self._answer((method, path), headers, body, (reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client left: that is how connections end here
        finally:
            self.client_left.set()
            writer.close()

    async def _answer(self, target, headers, body, streams) -> None:
        (method, path), (reader, writer) = target, streams
        if path == "/v1/completions":
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                await self._complete(headers, json.loads(body), reader, writer)
            finally:
                self.in_flight -= 1
        elif path == "/v1/models":
            self._json(writer, 200, {"data": [{"id": "m", "max_model_len": 4096}]})
        elif path == "/conserve/v1/cluster" and self.describes_cluster:
            self._json(writer, 200, self.cluster())
        elif path == "/v1/tokenize":
            words = json.loads(body)["prompt"].split()
            self._json(writer, 200, {"tokens": [int(w) for w in words], "count": len(words)})
        elif method == "DELETE":
            self.ended.append(path.rsplit("/", 1)[1])
            self._json(writer, 200, {})
        else:
            self._json(writer, 404, {"error": {"message": "not here"}})

    def _json(self, writer, status: int, value: Any, *extra: str) -> None:
        body = json.dumps(value).encode()
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *extra, "", ""]
        writer.write("\r\n".join(lines).encode() + body)

    async def _complete(self, headers, request, reader, writer) -> None:
        conversation = headers["x-conserve-conversation-id"]
        turn = int(headers["x-conserve-turn-index"])
        attempt = self.attempts[conversation, turn] = self.attempts.get((conversation, turn), 0) + 1
        self.requests.append({"headers": headers, "body": request})
        fault = self.faults.get((turn, attempt))
        if isinstance(fault, tuple):
            _, status, retry_after = fault
            extra = [] if retry_after is None else [f"Retry-After: {retry_after}"]
            self._json(writer, status, {"error": {"message": "scripted"}}, *extra)
            return
        if fault == "reset":
            writer.transport.abort()
            raise ConnectionError
        prompt = request["prompt"]
        self.prompts.setdefault(conversation, []).append(prompt)
        known = self.contexts.get(conversation, [])
        shared = next(
            (i for i, (a, b) in enumerate(zip(known, prompt, strict=False)) if a != b),
            min(len(known), len(prompt)),
        )
        count = request["max_tokens"] - (fault == "short")
        output = [90_000 + turn * 1000 + i for i in range(count)]
        self.contexts[conversation] = prompt + output
        if turn == 1:
            self.transfers += 1
        writer.write(
            (
                "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                "Transfer-Encoding: chunked\r\n"
                f"X-ConServe-Decode-Engine: {self.decoder(turn)}\r\n"
                f"X-ConServe-Prefill-Engine: {'p0' if turn == 1 else self.decoder(turn)}\r\n"
                "X-ConServe-Transfers: 1\r\nX-ConServe-Overhead-Ms: 0.5\r\n"
                f"X-ConServe-Placement: token-{turn}\r\n\r\n"
            ).encode()
        )
        for i, token in enumerate(output):
            choice: dict[str, Any] = {"index": 0, "text": f"{token} "}
            if self.token_ids:
                choice["token_ids"] = [token]
            self._event(writer, {"choices": [choice]})
            if i == 0 and fault == "die":
                await writer.drain()
                writer.transport.abort()
                raise ConnectionError
            if i == 0 and fault == "error":
                self._event(writer, {"error": {"message": "engine died", "code": 500}})
                self._end(writer)
                return
            if i == 0 and fault == "garbage":
                self._event(writer, "{not json")
            if i == 0 and fault == "stall":
                await writer.drain()
                self.stalled.set()
                await reader.read()  # until the client leaves
                raise ConnectionError
        if fault != "cut":
            usage = {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(output),
                "prompt_tokens_details": {"cached_tokens": shared // PAGE * PAGE},
            }
            self._event(writer, {"choices": [], "usage": usage})
            self._event(writer, "[DONE]")
        self._end(writer)

    def _event(self, writer, value: Any) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        data = f"data: {text}\n\n".encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _end(self, writer) -> None:
        writer.write(b"0\r\n\r\n")


@pytest.fixture
async def gateway() -> AsyncIterator[FakeGateway]:
    fake = FakeGateway()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield fake
    server.close()


@pytest.fixture
def gateway_class() -> type[FakeGateway]:
    """For tests that start the gateway themselves."""
    return FakeGateway
