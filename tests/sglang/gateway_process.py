"""A real gateway, as a process, over the test bed's engines."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

WAIT_S: Final = 60.0
#: First turns of the tiny model are short: everything from a few pages on is handed over.
SCHEDULER: Final = "[scheduler]\nhandoff_min_tokens = 64\nhandoff_floor_tokens = 64\n"


@dataclass
class Reply:
    """A whole response."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def choice(self) -> Any:
        return self.json()["choices"][0]

    @property
    def cached_tokens(self) -> int:
        details = self.json()["usage"]["prompt_tokens_details"]
        return int(details["cached_tokens"]) if details else 0


class GatewayProcess:
    """Starts with the constructor, ends with ``close``.

    Args:
        folder: for its configuration and its log.
        prefillers, decoders: URLs of engines; their ids are ``p0``, ``p1`` … and ``d0`` ….
        settings: lines of the ``[gateway]`` section.
    """

    def __init__(
        self,
        folder: Path,
        *,
        prefillers: Sequence[str],
        decoders: Sequence[str],
        settings: Mapping[str, object] | None = None,
    ) -> None:
        lines = ["[gateway]", "poll_interval_s = 0.2", "health_interval_s = 0.2"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in (settings or {}).items()]
        text = "\n".join(lines) + "\n" + SCHEDULER
        for role, urls in (("prefill", prefillers), ("decode", decoders)):
            if urls:
                text += (
                    f'[[tiers]]\nrole = "{role}"\nengine = "attach"\nurls = {json.dumps(urls)}\n'
                )
        folder.mkdir(exist_ok=True)
        config = folder / "gateway.toml"
        config.write_text(text)
        self.log = folder / "gateway.log"
        command = [sys.executable, "-m", "conserve_serving.gateway", "--config", str(config)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 -- our own command
                [*command, "--port", "0", "--announce"], stdout=subprocess.PIPE, stderr=log
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.log.read_text()
        self.port = int(json.loads(line)["port"])
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Stop it; whatever it still had to do must fit in the drain."""
        self._process.terminate()
        code = self._process.wait(WAIT_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        assert code == 0, self.log.read_text()

    # --- asking ------------------------------------------------------------------------------
    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request, its answer read to the end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            data = None if body is None else json.dumps(body).encode()
            sent = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, data, sent)
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, named, response.read())
        finally:
            connection.close()

    def complete(self, conversation: str, prompt: Sequence[int], tokens: int) -> Reply:
        """A turn of exactly so many greedy tokens, as token ids in and out."""
        body = {
            "model": "tiny",
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        return self.ask("POST", "/v1/completions", body, _named(conversation))

    def chat(self, conversation: str, messages: Sequence[Any], **more: Any) -> Reply:
        """A greedy chat turn."""
        body = {"model": "tiny", "messages": list(messages), "temperature": 0, **more}
        return self.ask("POST", "/v1/chat/completions", body, _named(conversation))

    def end(self, conversation: str) -> None:
        """End a conversation."""
        path = f"/conserve/v1/conversations/{urllib.parse.quote(conversation)}"
        assert self.ask("DELETE", path).status == 200

    def conversation(self, conversation: str) -> Any:
        """What the gateway says of a conversation."""
        path = f"/conserve/v1/conversations/{urllib.parse.quote(conversation)}"
        return self.ask("GET", path).json()

    def cluster(self) -> Any:
        """The cluster at a glance."""
        return self.ask("GET", "/conserve/v1/cluster").json()

    def engine(self, name: str) -> Any:
        """What the gateway says of an engine."""
        (engine,) = [one for one in self.cluster()["engines"] if one["id"] == name]
        return engine

    def counter(self, name: str) -> dict[str, int]:
        """One of the scheduler's counters by reason."""
        counts: dict[str, int] = self.cluster()["counters"][name]
        return counts

    def until(self, holds: Callable[[], Any], *, within_s: float = WAIT_S) -> Any:
        """Wait until something holds; what it gave.

        Raises:
            AssertionError: it does not, in time.
        """
        until = time.monotonic() + within_s
        while not (found := holds()):
            assert time.monotonic() < until, f"not within {within_s:g} s; see {self.log}"
            time.sleep(0.02)
        return found

    def until_ready(self, *names: str) -> None:
        """Wait until these engines serve."""
        self.until(lambda: all(self.engine(name)["state"] == "ready" for name in names))


def _named(conversation: str) -> dict[str, str]:
    return {"X-ConServe-Conversation-ID": conversation}
