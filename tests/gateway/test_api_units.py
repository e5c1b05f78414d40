"""Parts of the translated APIs by themselves: answers however they are cut, what is stored."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec import Raw

from conserve_serving.gateway.apis.chat import Answer
from conserve_serving.gateway.apis.client import TranslatedClient
from conserve_serving.gateway.apis.items import ITEMS, chat_messages
from conserve_serving.gateway.apis.messages_answer import MessagesAnswer, error_body
from conserve_serving.gateway.apis.responses_answer import ResponsesAnswer
from conserve_serving.gateway.apis.store import Entry, History, ResponseStore

APIS = ("messages", "responses")


def make(api: str, *, thinks: bool = True, custom: frozenset[str] = frozenset()) -> Answer:
    if api == "messages":
        return MessagesAnswer(id="msg_x", model="m", thinks=thinks, stops=("END",))
    return ResponsesAnswer(
        id="resp_x", model="m", created_s=1, custom=custom, echo={}, on_whole=lambda *_: None
    )


def chunk(delta: dict[str, Any] | None = None, **choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta or {}, **choice}], "usage": None}


def call(index: int | None, arguments: str, name: str | None = None) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    id = f"call_{name}" if name else None
    return chunk({"tool_calls": [{"index": index, "id": id, "function": function}]})


USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 100,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 60},
    },
}
STORY = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"reasoning_content": "hm, "}),
    chunk({"reasoning_content": "well"}),
    chunk({"content": "Let me 🙂 "}),
    chunk({"content": "\n\ndata: look"}),
    call(0, "", "first"),
    call(0, '{"a":'),
    call(0, " 1}"),
    call(1, "{}", "second"),
    chunk(finish_reason="tool_calls"),
    USAGE,
]


def stream(*parts: Any, done: bool = True) -> bytes:
    text = b"".join(b"data: " + json.dumps(part).encode() + b"\n\n" for part in parts)
    return text + (b"data: [DONE]\n\n" if done else b"")


def events(data: bytes) -> list[Any]:
    return [json.loads(e.split(b"data: ", 1)[1]) for e in data.split(b"\n\n") if e]


@given(seed=st.integers(0, 2**32), api=st.sampled_from(APIS))
def test_a_stream_is_translated_the_same_however_it_is_cut(seed: int, api: str) -> None:
    sent = stream(*STORY)
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, len(sent)), rng.randrange(12)))
    answer, whole = make(api), make(api)
    got = b"".join(
        answer.feed(sent[start:end])
        for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)
    )
    assert got + answer.end() == whole.feed(sent) + whole.end()


@pytest.mark.parametrize("api", APIS)
def test_nothing_is_held_back(api: str) -> None:
    answer = make(api)
    for part in STORY[1:-2]:
        assert answer.feed(stream(part, done=False)), part
    assert not answer.feed(stream(*STORY[-2:], done=False))  # what comes now is the end
    assert answer.feed(b"data: [DONE]\n\n")


def test_messages_events() -> None:
    got = events(make("messages").feed(stream(*STORY)))
    starts = [e for e in got if e["type"] == "content_block_start"]
    assert [s["content_block"]["type"] for s in starts] == [
        "thinking",
        "text",
        "tool_use",
        "tool_use",
    ]
    assert [s["index"] for s in starts] == [0, 1, 2, 3]
    opened: list[int] = []
    for event in got[1:-2]:  # one block at a time, each delta in its own
        if event["type"] == "content_block_start":
            opened.append(event["index"])
        assert event["index"] == opened[-1]
    assert got[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert got[-2]["usage"] == {
        "input_tokens": 40,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 60,
        "output_tokens": 7,
    }


def test_thinking_is_for_those_who_asked() -> None:
    got = events(make("messages", thinks=False).feed(stream(*STORY)))
    assert all("thinking" not in json.dumps(event) for event in got)
    assert [e["index"] for e in got if e["type"] == "content_block_start"] == [0, 1, 2]


def test_responses_events_and_whole_agree() -> None:
    answer = make("responses")
    got = events(answer.feed(stream(*STORY)))
    assert [e["sequence_number"] for e in got] == list(range(len(got)))
    final = got[-1]["response"]
    done = [e["item"] for e in got if e["type"] == "response.output_item.done"]
    assert final["output"] == done
    assert [item["type"] for item in done] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    whole = make("responses")
    message = {
        "content": "Let me 🙂 \n\ndata: look",
        "reasoning_content": "hm, well",
        "tool_calls": [
            {"id": "call_first", "function": {"name": "first", "arguments": '{"a": 1}'}},
            {"id": "call_second", "function": {"name": "second", "arguments": "{}"}},
        ],
    }
    reply = {
        "choices": [{"message": message, "finish_reason": "tool_calls"}],
        "usage": USAGE["usage"],
    }
    assert json.loads(whole.read(json.dumps(reply).encode())) == final
    # What the model said comes back as the one message that it was.
    (said,) = chat_messages(ITEMS.decode(json.dumps(done)))
    assert msgspec.json.decode(msgspec.json.encode(said)) == {
        "role": "assistant",
        "content": message["content"],
        "reasoning_content": "hm, well",
        "tool_calls": [
            {"id": c["id"], "type": "function", "function": c["function"]}
            for c in message["tool_calls"]  # type: ignore[attr-defined]
        ],
    }


@pytest.mark.parametrize(
    ("finish", "matched", "reason"),
    [
        ("stop", None, ("end_turn", None)),
        ("stop", "END", ("stop_sequence", "END")),
        ("stop", "<|im_end|>", ("end_turn", None)),
        ("stop", 151645, ("end_turn", None)),
        ("length", None, ("max_tokens", None)),
        ("content_filter", None, ("refusal", None)),
        ("something new", None, ("end_turn", None)),
    ],
)
def test_stop_reasons(finish: str, matched: Any, reason: tuple[str, str | None]) -> None:
    last = chunk(finish_reason=finish, matched_stop=matched)
    got = events(make("messages").feed(stream(chunk({"content": "x"}), last)))
    delta = got[-2]["delta"]
    assert (delta["stop_reason"], delta["stop_sequence"]) == reason


def test_cut_answers_are_incomplete() -> None:
    last = chunk(finish_reason="length")
    got = events(make("responses").feed(stream(chunk({"content": "x"}), last)))
    assert got[-1]["type"] == "response.incomplete"
    assert got[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert got[-1]["response"]["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    "broken",
    [
        b"data: {nonsense\n\n",
        b'data: {"choices": 7}\n\n',
        b'data: {"error": {"message": "no", "code": 500}}\n\n',
        b'data: {"error": "no"}\n\n',
        stream(call(0, "{", "a"), call(1, "{", "b"), call(0, "}"), done=False),
        stream(chunk(finish_reason="abort")),
        b"data: " + b"[" * 100_000 + b"\n\n",
        b"data: \xff\n\n",
    ],
)
def test_what_makes_no_sense_ends_the_stream_once(api: str, broken: bytes) -> None:
    answer = make(api)
    out = answer.feed(stream(chunk({"content": "x"}), done=False) + broken)
    out += answer.feed(stream(chunk({"content": "y"}))) + answer.end()
    got = events(out)
    assert [e["type"] for e in got].count("error" if api == "messages" else "response.failed") == 1
    assert got[-1]["type"] in ("error", "response.failed")
    assert "y" not in [e.get("delta") for e in got]


@pytest.mark.parametrize("api", APIS)
def test_empty_answer_is_an_answer(api: str) -> None:
    answer = make(api)
    got = events(answer.feed(stream(chunk(finish_reason="stop"), USAGE)))
    assert got[-1]["type"] in ("message_stop", "response.completed")


@pytest.mark.parametrize(
    ("arguments", "input"),
    [
        ('{"a": [1, "x"]}', {"a": [1, "x"]}),
        ("", {}),
        ("{broken", {"unparsable_arguments": "{broken"}),
        ("[1]", {"unparsable_arguments": "[1]"}),
    ],
)
def test_input_of_a_tool_is_an_object(arguments: str, input: Any) -> None:
    message = {"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": arguments}}]}
    reply = json.dumps({"choices": [{"message": message}]}).encode()
    assert json.loads(make("messages").read(reply))["content"][0]["input"] == input


def test_custom_tools_carry_text() -> None:
    answer = make("responses", custom=frozenset({"patch"}))
    parts = [call(0, '{"input": "*** Beg', "patch"), call(0, 'in"}'), chunk(finish_reason="stop")]
    got = events(answer.feed(stream(*parts)))
    done = next(e for e in got if e["type"] == "response.custom_tool_call_input.done")
    assert done["input"] == "*** Begin"
    assert got[-1]["response"]["output"][0]["input"] == "*** Begin"


def test_calls_an_engine_does_not_number() -> None:
    got = make("messages")
    got.feed(stream(call(None, '{"a":', "f"), call(None, "1}"), call(None, "{}", "g")))
    assert [(b.name, b.text) for b in got.blocks] == [("f", '{"a":1}'), ("g", "{}")]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": None, "completion_tokens": None, "prompt_tokens_details": None},
        {"prompt_tokens": -5, "prompt_tokens_details": {"cached_tokens": 9}},
        {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": None}},
    ],
)
def test_counts_an_engine_does_not_have(api: str, usage: Any) -> None:
    answer = make(api)
    got = events(answer.feed(stream(chunk({"content": "x"}), {"choices": [], "usage": usage})))
    assert got[-1]["type"] in ("message_stop", "response.completed")


def test_errors_in_anthropics_form() -> None:
    body = b'{"error": {"message": "too many", "type": "rate_limit_error"}}'
    error = json.loads(error_body(429, body))
    assert error["error"] == {"type": "rate_limit_error", "message": "too many"}
    assert json.loads(error_body(418, b"<html>"))["error"]["message"] == "<html>"


# --- the client ------------------------------------------------------------------------------
class Heard:
    """A client that writes down what it is sent."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.started = self.finished = False

    def start(self, status: int, headers: Any, block: bytes = b"") -> None:
        self.status, self.headers, self.started = status, headers, True

    def send(self, data: bytes) -> bool:
        self.body += data
        return False

    async def drained(self) -> None: ...

    def finish(self, data: bytes = b"") -> None:
        self.body += data
        self.finished = True


def test_back_pressure_is_passed_on() -> None:
    heard = Heard()
    client = TranslatedClient(heard, make("messages"), stream=True, headers=[])
    client.start(200, [(b"content-type", b"text/event-stream")])
    assert client.send(b"data: {")  # nothing was sent: nothing can be behind
    assert not client.send(stream(*STORY, done=False)[7:])
    client.finish(b"data: [DONE]\n\n")
    assert events(heard.body)[-1]["type"] == "message_stop"


def test_length_is_that_of_the_translation() -> None:
    heard = Heard()
    client = TranslatedClient(heard, make("messages"), stream=False, headers=[(b"a", b"b")])
    client.start(200, [(b"content-length", b"3")])
    assert client.started and not heard.started
    client.finish(b'{"choices": [{"message": {"content": "x"}}]}')
    assert (b"content-length", b"%d" % len(heard.body)) in heard.headers
    assert len([h for h in heard.headers if h[0] == b"content-length"]) == 1


# --- what is stored --------------------------------------------------------------------------
class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def store(**limits: Any) -> tuple[Clock, ResponseStore]:
    clock = Clock()
    limits = {"ttl_s": 10.0, "max_entries": 100, "max_bytes": 10**9, **limits}
    return clock, ResponseStore(clock=clock, **limits)


def entry(history: History | None = None, body: bytes = b"{}") -> Entry:
    return Entry(body=body, history=history, conversation="c")


def test_stored_entries_expire_after_their_last_use() -> None:
    clock, kept = store()
    kept.put("response", "t", "a", entry())
    kept.put("response", "t", "b", entry())
    clock.now_s = 9.0
    assert kept.get("response", "t", "a") is not None
    clock.now_s = 11.0
    assert kept.get("response", "t", "b") is None
    assert kept.get("response", "t", "a") is not None
    assert kept.get("conversation", "t", "a") is None
    assert kept.get("response", "other", "a") is None


def test_stored_entries_are_bounded_by_number_and_bytes() -> None:
    _, kept = store(max_entries=2)
    for id in "abc":
        kept.put("response", "t", id, entry())
    assert [kept.get("response", "t", id) is None for id in "abc"] == [True, False, False]
    _, kept = store(max_bytes=5000)
    for number in range(100):
        kept.put("response", "t", str(number), entry(History([Raw(b"x" * 1000)], None)))
        assert kept.bytes <= 5000
    assert 1 <= len(kept) <= 5


def test_a_long_conversation_costs_its_own_length() -> None:
    _, kept = store(max_entries=10_000)
    history: History | None = None
    for number in range(1000):
        history = History([Raw(b"m%d" % number)], history)
        kept.put("response", "t", str(number), entry(history))
    assert kept.bytes < 1000 * 250
    assert history is not None
    assert [bytes(m) for m in history.whole()] == [b"m%d" % n for n in range(1000)]
    for number in range(999):  # earlier ones may be forgotten: the last still has it all
        assert kept.delete("response", "t", str(number))
    last = kept.get("response", "t", "999")
    assert last is not None and last.history is not None
    assert len(last.history.whole()) == 1000
    assert kept.delete("response", "t", "999")
    assert kept.bytes == 0


class Storing(RuleBasedStateMachine):
    """Whatever is put, continued and deleted: the bytes are those of what can be reached."""

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.kept = store(max_entries=8, max_bytes=20_000)

    @rule(id=st.integers(0, 9), size=st.integers(0, 3000), previous=st.integers(0, 9))
    def put(self, id: int, size: int, previous: int) -> None:
        before = self.kept.get("response", "t", str(previous))
        history = History([Raw(b"x" * size)], before.history if before else None)
        self.kept.put("response", "t", str(id), entry(history, b"y" * 10))

    @rule(id=st.integers(0, 9))
    def delete(self, id: int) -> None:
        self.kept.delete("response", "t", str(id))

    @rule(seconds=st.floats(0, 4))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @invariant()
    def bytes_are_those_reachable(self) -> None:
        found: dict[int, int] = {}
        bodies = 0
        for kept in self.kept._entries.values():
            bodies += len(kept.body)
            history = kept.history
            while history is not None:
                found[id(history)] = history.size
                history = history.previous
        assert self.kept.bytes == bodies + sum(found.values())
        assert len(self.kept) <= 8
        assert self.kept.bytes <= 20_000 or len(self.kept) == 0


TestStoring = Storing.TestCase
