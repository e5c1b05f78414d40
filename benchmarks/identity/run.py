"""What it costs the gateway to find out whose turn a request is, and to translate other APIs.

    python benchmarks/identity/run.py            # the tables of docs/benchmarks.md
    python benchmarks/identity/run.py --json

In one process, no network: the functions the gateway calls for every turn, on histories of the
sizes agents have. Medians of CPU time over interleaved rounds; the parsing that every request needs
anyway is measured beside them, so that the share can be read off within one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from conserve_serving.core.types import ConversationId
from conserve_serving.gateway.apis.chat import Answer
from conserve_serving.gateway.apis.messages_answer import MessagesAnswer
from conserve_serving.gateway.apis.messages_request import parse_messages
from conserve_serving.gateway.apis.responses_answer import ResponsesAnswer
from conserve_serving.gateway.apis.responses_request import parse_responses
from conserve_serving.gateway.identity import IdentityResolver
from conserve_serving.gateway.lineage import Lineage, PrefixMark
from conserve_serving.gateway.request import Api, TurnRequest, parse_turn

SIZES = (2_000, 20_000, 200_000, 1_000_000, 2_000_000)
MESSAGE_BYTES = 2_000
ROUNDS = 7
OPEN_CONVERSATIONS = 2_000
PLAIN = [
    (b"host", b"gateway"),
    (b"user-agent", b"OpenAI/Python 3.54.0"),
    (b"content-type", b"application/json"),
    (b"authorization", b"Bearer key"),
    (b"x-stainless-lang", b"python"),
    (b"x-stainless-retry-count", b"0"),
]
TEXT = 'A line of an agent\'s history, with "quotes" and a\nnewline. '


def history(size: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Messages of about ``size`` bytes in all, user and assistant in turn."""
    count = max(4, size // MESSAGE_BYTES)
    text = TEXT * max(1, size // count // len(TEXT))
    roles = ("user", "assistant")
    return [
        {"role": roles[n % 2], "content": f"{start + n} {text}"} for n in range(count + count % 2)
    ]


def request(messages: list[dict[str, Any]], **fields: Any) -> TurnRequest:
    """A parsed chat completion."""
    return parse_turn(Api.CHAT, json.dumps({"model": "m", "messages": messages, **fields}).encode())


def median_us(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median CPU time of each, in microseconds, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, run in work.items():
            start, calls = time.process_time(), 0
            while (spent := time.process_time() - start) < 0.02 or calls < 3:
                run()
                calls += 1
            times[name].append(spent / calls * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def identity(size: int, lineage: Lineage) -> dict[str, Any]:
    """One row: a conversation's tail turn at this size of history."""
    before = history(size)
    after = [*before, *history(2 * MESSAGE_BYTES, start=10_000)]
    branch = [*before[:-2], *history(2 * MESSAGE_BYTES, start=20_000)]
    lineage.remember(ConversationId(f"it{size}"), _match(lineage, request(before[:-2])))
    lineage.remember(ConversationId(f"it{size}"), _match(lineage, request(before)))
    tail, fork, fresh = request(after), request(branch), request(history(size, start=77))
    body = tail.body
    times = median_us(
        {
            "parse": lambda: parse_turn(Api.CHAT, body),
            "mark": lambda: PrefixMark(tail),
            "extend": lambda: _match(lineage, tail),
            "fork": lambda: _match(lineage, fork),
            "new": lambda: _match(lineage, fresh),
        }
    )
    relations = [_match(lineage, asked).relation.value for asked in (tail, fork, fresh)]
    if relations != ["extend", "fork", "new"]:
        raise SystemExit(f"not what was to be measured: {relations}")
    return {"body_bytes": len(body), **times}


def _match(lineage: Lineage, asked: TurnRequest) -> Any:
    return lineage.match(asked, PrefixMark(asked), salt="tenant\0m")


def sources() -> dict[str, float]:
    """Reading an id from where clients put it."""
    resolver = IdentityResolver()
    nothing = request(history(2000)).identity
    keyed = request(history(2000), prompt_cache_key="k").identity
    codex = [*PLAIN, (b"session-id", b"s"), (b"thread-id", b"t"), (b"originator", b"codex")]
    own = [*PLAIN, (b"x-conserve-conversation-id", b"c"), (b"x-conserve-turn-id", b"t")]
    return median_us(
        {
            "X-ConServe-Conversation-ID": lambda: resolver.resolve(own, nothing),
            "an agent's header": lambda: resolver.resolve(codex, nothing),
            "a field of the body": lambda: resolver.resolve(PLAIN, keyed),
            "nothing (then lineage)": lambda: resolver.resolve(PLAIN, nothing),
        }
    )


def translation(size: int) -> dict[str, Any]:
    """Reading a request of each API of this size, up to the turn that the gateway serves."""
    messages = history(size)
    chat = json.dumps({"model": "m", "messages": messages}).encode()
    other = json.dumps({"model": "m", "max_tokens": 9, "messages": messages}).encode()
    items = json.dumps({"model": "m", "input": messages}).encode()

    def responses() -> object:
        asked = parse_responses(items)
        body = json_encode({**asked.fields, "messages": asked.new})
        return parse_turn(Api.CHAT, body)

    return median_us(
        {
            "chat": lambda: parse_turn(Api.CHAT, chat),
            "messages": lambda: parse_messages(other).turn(),
            "responses": responses,
        }
    )


def per_event() -> dict[str, float]:
    """Translating one event of a stream."""
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    choice = {"index": 0, "delta": {"content": " token"}, "logprobs": None, "finish_reason": None}
    event = b"data: " + json.dumps({**chunk, "choices": [choice]}).encode() + b"\n\n"
    answers: dict[str, Answer] = {
        "messages": MessagesAnswer(id="msg_x", model="m", thinks=False, stops=()),
        "responses": ResponsesAnswer(
            id="resp_x",
            model="m",
            created_s=1,
            custom=frozenset(),
            echo={},
            on_whole=lambda *_: None,
        ),
    }

    def feed(answer: Answer) -> Callable[[], object]:
        return lambda: answer.feed(event)

    return median_us({name: feed(answer) for name, answer in answers.items()})


def json_encode(value: object) -> bytes:
    """The encoder the gateway uses."""
    import msgspec  # noqa: PLC0415 -- only here

    return msgspec.json.encode(value)


def _table(head: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print figures instead of tables")
    as_json = parser.parse_args().json
    lineage = Lineage(200_000)
    for number in range(OPEN_CONVERSATIONS):  # others of the same tenant, with the same start
        asked = request([{"role": "system", "content": TEXT * 40}, *history(6000, start=number)])
        lineage.remember(ConversationId(f"c{number}"), _match(lineage, asked))
    figures = {
        "source_us": sources(),
        "identity_us": {size: identity(size, lineage) for size in SIZES},
        "translation_us": {size: translation(size) for size in SIZES},
        "event_us": per_event(),
    }
    if as_json:
        print(json.dumps(figures, indent=1))
        return
    _table(["id read from", "µs"], [[k, f"{v:.1f}"] for k, v in figures["source_us"].items()])
    _table(
        ["history", "parsing anyway µs", "id known µs", "extend µs", "fork µs", "new µs"],
        [
            [
                f"{size / 1000:,.0f} kB",
                *(f"{row[k]:.0f}" for k in ("parse", "mark", "extend", "fork", "new")),
            ]
            for size, row in figures["identity_us"].items()
        ],
    )
    _table(
        ["history", "chat µs", "Messages µs", "Responses µs"],
        [
            [
                f"{size / 1000:,.0f} kB",
                *(f"{row[k]:.0f}" for k in ("chat", "messages", "responses")),
            ]
            for size, row in figures["translation_us"].items()
        ],
    )
    _table(["one event", "µs"], [[k, f"{v:.1f}"] for k, v in figures["event_us"].items()])


if __name__ == "__main__":
    main()
