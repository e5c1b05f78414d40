"""What tagging costs the client each turn, by size of the history.

The session layer alone: what any integration pays. The OpenAI client: what it does beside the stock
client's work, timed inside whole calls against a transport that answers at once. CPU time, so that
a busy machine changes little. What the gateway pays to read identity: benchmarks/identity/run.py.

    python benchmarks/client_tagging/run.py [--turns 400] [--sizes-kb 2,20,200,1000]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai

from conserve_agents import BytesTokenCounter, Conversation, wire
from conserve_agents.openai import ConServeOpenAI, _observe
from conserve_agents.turns import prompt_of

#: CPU time of this thread: what other work on the machine does is not counted.
CLOCK = time.thread_time_ns
TARGET_US = 200.0
TARGET_KB = 200
#: About what a tool result or a message of a coding agent has.
MESSAGE_BYTES = 2_000
ANSWER = {
    "id": "r",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "ok"}}
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}
REPORT = {
    wire.TURN_INDEX: "7",
    wire.IDENTITY_SOURCE: "conserve",
    wire.PREFILL_ENGINE: "p0",
    wire.DECODE_ENGINE: "d0",
    wire.TRANSFERS: "1",
    wire.REASON: "pinned",
    wire.OVERHEAD_MS: "0.412",
    wire.PLACEMENT: "p" * 80,
}


def history(size_kb: int) -> list[dict[str, Any]]:
    """An agent's messages of about this many kilobytes: user, then assistant and tool in turn."""
    text = ("def look(path: Path) -> str:\n    return path.read_text()  # a line of a file\n" * 99)[
        :MESSAGE_BYTES
    ]
    messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
    while len(messages) * MESSAGE_BYTES < size_kb * 1000:
        number = len(messages)
        function = {"name": "read_file", "arguments": json.dumps({"path": text[:200]})}
        call = {"id": f"call-{number}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": text[:400], "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"call-{number}", "content": text})
    return messages


def timed(work: Callable[[], object], rounds: int) -> list[float]:
    """Microseconds of CPU of each of ``rounds`` runs."""
    spent = []
    for _ in range(rounds):
        start = CLOCK()
        work()
        spent.append((CLOCK() - start) / 1e3)
    return spent


def row(name: str, samples: list[float]) -> dict[str, Any]:
    """One line of the table."""
    ordered = sorted(samples)
    return {
        "what": name,
        "p50_us": statistics.median(ordered),
        "p99_us": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
    }


def session_layer(messages: list[Any], rounds: int) -> Iterator[dict[str, Any]]:
    """A tail turn and a first turn, without any client."""
    alone, shared = Conversation(), Conversation()
    body = {"model": "m", "messages": messages}
    for talk in (alone, shared):
        talk.headers_for(messages)
    shared.handover()

    def tail(talk: Conversation) -> None:
        tags = talk.headers_for(prompt_of(body))
        talk.observe(REPORT, turn_id=tags[wire.TURN_ID])

    yield row("session layer, tail turn (tag and answer)", timed(lambda: tail(alone), rounds))
    yield row(
        "the same, of a conversation shared between processes",
        timed(lambda: tail(shared), rounds),
    )
    counter = BytesTokenCounter()
    yield row(
        "first turn's length, bytes / 4", timed(lambda: counter.count(messages, None), rounds)
    )


def client(messages: list[Any], rounds: int) -> Iterator[dict[str, Any]]:
    """What our OpenAI client does beside the stock one's work: tag the options, read the answer."""
    httpx = sys.modules.get("httpx2") or sys.modules["httpx"]

    class Stopwatch(ConServeOpenAI):
        """Sends nothing; keeps how long its own part of each call took."""

        spent_us: list[float] = []  # noqa: RUF012 - one client, one list

        def _tagged(self, options: Any) -> Any:
            start = CLOCK()
            tagged = super()._tagged(options)
            self.spent_us.append((CLOCK() - start) / 1e3)
            return tagged

        def _process_response(self, **kwargs: Any) -> Any:
            start = CLOCK()
            _observe(kwargs["response"])
            self.spent_us[-1] += (CLOCK() - start) / 1e3
            return super()._process_response(**kwargs)

    def answer(request: Any) -> Any:
        return httpx.Response(200, json=ANSWER, headers=REPORT, request=request)

    ours = Stopwatch(
        base_url="http://g/v1",
        api_key="k",
        http_client=httpx.Client(transport=httpx.MockTransport(answer)),
    )
    whole: list[float] = []
    with Conversation(end_on_exit=False):
        for _ in range(rounds // 4 + 2):  # the SDK itself takes milliseconds at 200 kB
            whole += timed(lambda: ours.chat.completions.create(model="m", messages=messages), 1)
    yield row("OpenAI client, tail turn: what ours adds", ours.spent_us[1:])
    yield row("(the whole call in the SDK, without a network)", whole[1:])


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit status 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--turns", type=int, default=400, help="turns a size")
    parser.add_argument("--sizes-kb", default="2,20,200,1000")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    print(
        f"python {platform.python_version()}, openai {openai.__version__}, {args.turns} turns each"
    )
    print(f"{'history':>9}  {'p50 µs':>8}  {'p99 µs':>8}  what")
    table = []
    gc.collect()
    gc.freeze()
    for size_kb in map(int, args.sizes_kb.split(",")):
        messages = history(size_kb)
        for measure in (session_layer, client):
            for line in measure(messages, args.turns):
                table.append({"history_kb": size_kb, **line})
                print(
                    f"{size_kb:>6} kB  {line['p50_us']:>8.1f}  {line['p99_us']:>8.1f}  "
                    f"{line['what']}",
                    flush=True,
                )
    at_target = [
        line
        for line in table
        if line["history_kb"] == TARGET_KB and not line["what"].startswith("(")
    ]
    for line in at_target:
        verdict = "met" if line["p50_us"] < TARGET_US else "MISSED"
        print(f"{TARGET_US:.0f} µs at {TARGET_KB} kB {verdict}: {line['what']}")
    if args.json:
        args.json.write_text(json.dumps({"python": sys.version, "rows": table}, indent=1) + "\n")
    return int(any(line["p50_us"] >= TARGET_US for line in at_target))


if __name__ == "__main__":
    sys.exit(main())
