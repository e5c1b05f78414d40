"""The gateway's parts by themselves: configuration, identity, lineage, tokens, taps, clocks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_serving.core.decisions import CloseTurn, Place
from conserve_serving.core.events import (
    EngineJoined,
    PlacementHint,
    TimerFired,
    TurnArrived,
    TurnFinished,
)
from conserve_serving.core.journal import from_record
from conserve_serving.core.policies import make_policy
from conserve_serving.core.scheduler import Scheduler
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.types import (
    ConversationId,
    EngineId,
    EngineSpeeds,
    Link,
    Tier,
    TurnId,
)
from conserve_serving.gateway.config import Config, explain, load_config, parse_config
from conserve_serving.gateway.errors import ConfigError, InvalidRequestError, normalise_upstream
from conserve_serving.gateway.handoffs import Acknowledgement, Handoffs
from conserve_serving.gateway.identity import IdentityResolver
from conserve_serving.gateway.lineage import Lineage, Match, PrefixMark, Relation
from conserve_serving.gateway.metrics import Histogram
from conserve_serving.gateway.observe import MixedSteps
from conserve_serving.gateway.placement import PlacementSigner
from conserve_serving.gateway.request import Api, TurnRequest, parse_turn
from conserve_serving.gateway.runtime import Journal, ModelClock, Runtime
from conserve_serving.gateway.sources import DEFAULT_ORDER, expand
from conserve_serving.gateway.usage import StreamTap, parse_usage


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def chat(*texts: str, **fields: Any) -> TurnRequest:
    messages = [{"role": "user", "content": text} for text in texts]
    return parse_turn(Api.CHAT, json.dumps({"model": "m", "messages": messages, **fields}).encode())


def ids(*tokens: int) -> TurnRequest:
    return parse_turn(Api.COMPLETIONS, json.dumps({"model": "m", "prompt": list(tokens)}).encode())


# --- configuration ---------------------------------------------------------------------------
def test_every_setting_is_explained_and_the_defaults_are_legal() -> None:
    settings = list(explain())
    assert len({(s.section, s.name) for s in settings}) == len(settings)
    for setting in settings:
        assert setting.description, setting.name
        assert setting.type and setting.default
    assert parse_config("") == Config()
    assert [tier.role for tier in Config().tiers] == [Tier.PREFILL, Tier.DECODE]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[gateway]\nprot = 1", ["gateway.prot", "did you mean 'port'"]),
        ("[gatway]\nport = 1", ["gatway", "did you mean 'gateway'"]),
        ("[gateway]\nport = 99999", ["gateway.port", "65535"]),
        ("[gateway]\nhost = 3", ["gateway.host", "string"]),
        ("[scheduler]\npolicy = 'best'", ["scheduler.policy", "conserve"]),
        ("[[tiers]]\nrole = 'decode'\nengine = 'attach'", ["urls is missing"]),
        ("[[tiers]]\nrole = 'decode'\nprofile = 'tpu'", ["tiers.0.profile", "a40-qwen3-0.6b"]),
        ("[[tiers]]\nrole = 'decode'\nurls = ['https://x']", ["tiers.0.urls", "http://host:port"]),
        ("[[tiers]]\ncount = 1", ["tiers.0.role", "missing"]),
        ("[gateway\n", ["not TOML"]),
    ],
)
def test_bad_configuration_names_the_key_and_the_remedy(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(text, origin="c.toml")
    for part in [*parts, "c.toml"]:
        assert part in str(raised.value)


def test_missing_file_is_a_config_error(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        load_config(tmp_path / "nothing.toml")


# --- identity --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("headers", "body", "conversation", "source"),
    [
        ({"x-conserve-conversation-id": "a", "x-session-id": "b"}, {}, "a", "conserve"),
        ({"x-session-id": "b", "x-dynamo-session-id": "c"}, {}, "c", "header:x-dynamo-session-id"),
        ({"x-my-alias": "z", "x-dynamo-session-id": "c"}, {}, "z", "header:x-my-alias"),
        ({"x-claude-code-session-id": "s"}, {}, "s", "header:x-claude-code-session-id"),
        ({"x-correlation-id": "b", "x-client-request-id": "c"}, {}, None, ""),
        ({"x-session-id": " "}, {"session_id": "b"}, "b", "body:session_id"),
        ({}, {"conversation": {"id": "k"}}, "k", "body:conversation.id"),
        ({}, {"conversation": "k"}, "k", "body:conversation"),
        ({}, {"prompt_cache_key": "p"}, "p", "body:prompt_cache_key"),
        ({}, {"metadata": {"session_id": "q", "user": "u"}}, "q", "body:metadata.session_id"),
        ({}, {"metadata": {"topic": "x"}}, None, ""),
        ({}, {"session_id": 7}, None, ""),
        ({"baggage": "a=1, session.id=b%20c;p=1"}, {}, "sha256-", "baggage"),
        ({}, {"user": "someone", "safety_identifier": "x"}, None, ""),
        ({}, {}, None, ""),
    ],
)
def test_where_the_id_is_found(
    headers: dict[str, str], body: dict[str, Any], conversation: str | None, source: str
) -> None:
    resolver = IdentityResolver(expand(DEFAULT_ORDER, ["X-My-Alias"]))
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    tags = resolver.resolve(raw, chat("hi", **body).identity)
    assert tags.source == source
    if conversation is None:
        assert tags.conversation is None
    else:
        assert tags.conversation is not None
        assert tags.conversation.startswith(conversation)


def test_sub_agent_of_a_session_is_its_own_conversation() -> None:
    headers = [(b"x-claude-code-session-id", b"s"), (b"x-claude-code-agent-id", b"a1")]
    tags = IdentityResolver().resolve(headers, dict)
    assert (tags.conversation, tags.parent) == ("s/a1", "s")


def test_tenants_are_told_apart_and_not_shown() -> None:
    resolver = IdentityResolver()
    first = resolver.tenant([(b"authorization", b"Bearer secret")])
    assert first == resolver.tenant([(b"authorization", b"Bearer secret")])
    assert first != resolver.tenant([(b"authorization", b"Bearer other")])
    assert "secret" not in first
    assert resolver.tenant([]) == ""


@pytest.mark.parametrize(
    "header", ["x-conserve-turn-index", "x-conserve-first-turn-tokens", "x-conserve-parent-id"]
)
def test_illegal_own_headers_are_named(header: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        IdentityResolver().resolve([(header.encode(), b"-1 ")], dict)
        IdentityResolver().resolve([(header.encode(), b"a b")], dict)
    assert raised.value.param is not None
    assert raised.value.param.lower() == header


# --- lineage ---------------------------------------------------------------------------------
def _match(lineage: Lineage, request: TurnRequest, salt: str = "s") -> Match:
    return lineage.match(request, PrefixMark(request), salt=salt)


def _see(lineage: Lineage, conversation: str, request: TurnRequest) -> None:
    lineage.remember(ConversationId(conversation), _match(lineage, request))


def test_lineage_tells_extend_replay_fork_and_new_apart() -> None:
    lineage = Lineage(100)
    _see(lineage, "a", chat("sys", "1"))
    extended = _match(lineage, chat("sys", "1", "r", "2"))
    assert (extended.relation, extended.conversation) == (Relation.EXTEND, "a")
    lineage.remember(ConversationId("a"), extended)
    assert _match(lineage, chat("sys", "1", "r", "2")).relation is Relation.REPLAY
    fork = _match(lineage, chat("sys", "1", "other", "2"))
    assert (fork.relation, fork.conversation) == (Relation.FORK, "a")
    assert _match(lineage, chat("sys", "x")).relation is Relation.NEW
    assert _match(lineage, chat("sys", "1"), salt="other tenant").relation is Relation.NEW
    assert _match(lineage, chat("sys", "1", tools=[{"a": 1}])).relation is Relation.NEW


@given(
    st.lists(st.integers(0, 2**17), min_size=1, max_size=900),
    st.lists(st.integers(0, 2**17), max_size=900),
)
def test_lineage_of_token_ids(first: list[int], more: list[int]) -> None:
    lineage = Lineage(100)
    _see(lineage, "a", ids(*first))
    match = _match(lineage, ids(*first, *more))
    if not more:
        assert match.relation is Relation.REPLAY
    elif len(json.dumps(first)) > 1024 + 1:
        assert (match.relation, match.conversation) == (Relation.EXTEND, "a")


def test_lineage_is_bounded_and_forgets_the_oldest() -> None:
    lineage = Lineage(10)
    for number in range(50):
        _see(lineage, f"c{number}", chat(f"hello {number}"))
    assert len(lineage) == 10
    assert _match(lineage, chat("hello 0")).relation is Relation.NEW
    assert _match(lineage, chat("hello 49", "r")).relation is Relation.EXTEND
    assert len(lineage._latest) <= 10


def _compare(mark: PrefixMark, request: TurnRequest) -> tuple[Relation, int]:
    return mark.compare(PrefixMark(request), request)


@given(
    st.lists(st.text(max_size=3000), min_size=1, max_size=6),
    st.lists(st.text(max_size=3000), max_size=3),
)
def test_prefix_mark_recognises_every_extension(first: list[str], more: list[str]) -> None:
    mark = PrefixMark(chat(*first))
    relation, kept = _compare(mark, chat(*first, *more))
    assert relation is (Relation.EXTEND if more else Relation.REPLAY)
    assert kept == len(chat(*first).content) - 1


def test_prefix_mark_measures_what_a_rewrite_keeps() -> None:
    texts = [f"message {number} " + "x" * 1000 for number in range(40)]
    mark = PrefixMark(chat(*texts))
    changed = [*texts]
    changed[20] = "compacted"
    relation, kept = _compare(mark, chat(*changed))
    assert relation is Relation.REWRITE
    assert 16_000 < kept < 21_500
    assert _compare(mark, chat("summary")) == (Relation.REWRITE, 0)
    assert _compare(mark, chat(*texts, tools=[{"new": 1}])) == (Relation.REWRITE, 0)


# --- placement tokens ------------------------------------------------------------------------
HINT = PlacementHint(engine=EngineId("d1"), epoch=3, context_tokens=900, turns=4, transfers=1)


def _sign(signer: PlacementSigner) -> str:
    fields = {name: getattr(HINT, name) for name in HINT.__dataclass_fields__}
    return signer.sign(ConversationId("c"), **fields).decode()


def test_placement_token_round_trip() -> None:
    signer = PlacementSigner(b"k" * 16)
    token = _sign(signer)
    assert signer.read(ConversationId("c"), token) == HINT
    assert signer.read(ConversationId("d"), token) is None
    assert PlacementSigner(b"other").read(ConversationId("c"), token) is None


@given(st.data())
def test_forged_placement_tokens_are_not_believed(data: st.DataObject) -> None:
    signer = PlacementSigner(b"k" * 16)
    token = _sign(signer)
    forged = data.draw(st.one_of(st.text(max_size=80), st.binary(max_size=60).map(bytes.hex)))
    position = data.draw(st.integers(0, len(token) - 1))
    letter = data.draw(st.sampled_from("ABCabc012-_"))
    altered = token[:position] + letter + token[position + 1 :]
    assert signer.read(ConversationId("c"), forged) is None
    # The last letter's unused bits may change without changing a byte.
    assert altered == token or signer.read(ConversationId("c"), altered) in (
        (None,) if position < len(token) - 1 else (None, HINT)
    )


# --- taps ------------------------------------------------------------------------------------
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 2,
    "prompt_tokens_details": {"cached_tokens": 8},
}


def _stream(*events: Any) -> bytes:
    return b"".join(
        b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n"
        for e in events
    )


@given(seed=st.integers(0, 2**32), remove=st.booleans())
def test_tap_passes_everything_but_the_usage_event_however_it_is_cut(
    seed: int, remove: bool
) -> None:
    tokens = [
        {"choices": [{"text": t}], "usage": None}
        for t in ("a", '"usage":{"prompt_tokens":1}', "\n\n")
    ]
    usage = {"choices": [], "usage": USAGE}
    sent = _stream(*tokens, usage, b"[DONE]")
    wanted = _stream(*tokens, b"[DONE]") if remove else sent
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, len(sent)), rng.randrange(6)))
    tap = StreamTap(remove=remove)
    got = b"".join(
        tap.feed(sent[start:end]) for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)
    )
    assert got + tap.flush() == wanted
    counted = tap.usage()
    assert counted is not None
    assert (counted.prompt_tokens, counted.output_tokens, counted.cached_tokens) == (9, 2, 8)
    assert not tap.error()


def test_tap_of_a_broken_stream_has_no_counts() -> None:
    tap = StreamTap(remove=True)
    assert tap.feed(_stream({"choices": [{"text": "a"}]}) + b"data: {") == _stream(
        {"choices": [{"text": "a"}]}
    )
    assert tap.flush() == b"data: {"
    assert tap.usage() is None


def test_usage_of_a_plain_reply() -> None:
    counted = parse_usage(json.dumps({"choices": [{}], "usage": USAGE}).encode())
    assert counted is not None
    assert counted.cached_tokens == 8
    assert parse_usage(b'{"choices": []}') is None
    assert parse_usage(b"not json") is None


# --- errors of engines -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (b'{"object":"error","message":"bad top_p","code":400}', "bad top_p", 400),
        (b'{"error":{"message":"no"}}', "no", None),
        (b'{"detail":"Not Found"}', "Not Found", None),
        (
            b'{"message":"Input is longer than the model\'s context length"}',
            "Input is longer than the model's context length",
            "context_length_exceeded",
        ),
        (b"<html>", "the engine answered 400: <html>", 400),
    ],
)
def test_engine_errors_become_openai_errors(body: bytes, message: str, code: Any) -> None:
    error = json.loads(normalise_upstream(400, body))["error"]
    assert error["message"] == message
    assert error.get("code") == code


# --- hand-offs -------------------------------------------------------------------------------
async def test_acknowledgements_early_late_twice_and_shared() -> None:
    handoffs = Handoffs()
    ack = Acknowledgement(engine="p0", key="k", tokens=64, duration_s=0.5)
    first, second = handoffs.expect("k"), handoffs.expect("k")
    assert not first.done()
    assert handoffs.acknowledge(ack)
    assert first.result() == second.result() == ack
    assert handoffs.acknowledge(ack)  # twice does no harm
    handoffs.release("k", ConversationId("c"))
    handoffs.release("k", ConversationId("c"))
    assert handoffs.waiting == 0
    assert not handoffs.acknowledge(ack)  # late
    assert handoffs.unexpected == 1
    assert not handoffs.expect("k").done()  # stored once is not stored now: each prefill is told
    handoffs.release("k", ConversationId("c"))


async def test_every_rank_acknowledges_its_part_and_the_smallest_part_counts() -> None:
    handoffs = Handoffs()
    future = handoffs.expect("k")
    part = Acknowledgement(engine="p0", key="k", tokens=128, duration_s=0.1, rank=1, ranks=2)
    handoffs.acknowledge(part)
    handoffs.acknowledge(part)  # the same rank again is not the other one
    assert not future.done()
    handoffs.acknowledge(replace(part, rank=0, tokens=64, duration_s=0.3))
    assert (future.result().tokens, future.result().duration_s) == (64, 0.3)
    handoffs.release("k", ConversationId("c"))


async def test_one_ranks_failure_is_enough() -> None:
    handoffs = Handoffs()
    future = handoffs.expect("k")
    handoffs.acknowledge(
        Acknowledgement(engine="p0", key="k", tokens=0, error="store_full", rank=1, ranks=2)
    )
    assert future.result().error == "store_full"
    handoffs.release("k", ConversationId("c"))


# --- clock and runtime -----------------------------------------------------------------------
def test_model_clock_runs_at_the_clusters_speed_and_never_back() -> None:
    wall = Clock()
    clock = ModelClock(wall)
    wall.now_s = 2.0
    clock.set_speed(10.0)
    assert clock.now_s() == pytest.approx(2.0)
    wall.now_s = 3.0
    assert clock.now_s() == pytest.approx(12.0)
    clock.set_speed(1.0)
    assert clock.now_s() == pytest.approx(12.0)


class _Timers:
    """Calls asked for later, called by the test."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def __call__(self, delay_s: float, call: Callable[[], None]) -> _Timers:
        self.calls.append((delay_s, call))
        return self

    def cancel(self) -> None:
        self.calls.pop()


class _Inbox:
    def __init__(self) -> None:
        self.got: list[Any] = []

    def deliver(self, decision: Any) -> None:
        self.got.append(decision)


def _join(name: str, tier: Tier, capacity: int = 10_000) -> EngineJoined:
    return EngineJoined(
        engine=EngineId(name),
        epoch=1,
        tier=tier,
        kv_capacity_tokens=capacity,
        host_capacity_tokens=0,
        page_tokens=16,
        max_context_tokens=10_000,
        speeds=EngineSpeeds(prefill_tokens_per_s=1000, decode_step_s=0.01),
        link=Link(setup_s=0.01, bytes_per_s=1e9, kv_bytes_per_token=1000),
    )


def test_runtime_delivers_journals_and_sets_one_timer(tmp_path: Any) -> None:
    wall, timers, inbox = Clock(), _Timers(), _Inbox()
    settings = SchedulerSettings(max_hold_s=5.0)
    path = tmp_path / "journal.jsonl"
    clock = ModelClock(wall)
    clock.set_speed(10.0)
    runtime = Runtime(
        Scheduler(settings, make_policy("collocated", settings)),
        clock,
        call_later=timers,
        on_residency=lambda decision: None,
        journal=Journal(path.open("w")),
    )
    runtime.handle(_join("d0", Tier.DECODE))
    turn = TurnId("t1")
    runtime.register(turn, inbox)
    arrived = TurnArrived(turn=turn, conversation=ConversationId("c"), prompt_tokens=100)
    runtime.handle(arrived)
    (place,) = inbox.got
    assert isinstance(place, Place)
    assert runtime.is_live(turn)
    runtime.handle(
        TurnFinished(
            turn=turn, plan=place.plan, prompt_tokens=100, output_tokens=5, cached_tokens=0
        )
    )
    assert isinstance(inbox.got[1], CloseTurn)
    assert not runtime.is_live(turn)
    assert runtime.scheduler.counters.outcomes == {"finished": 1}
    ((delay_s, call),) = timers.calls  # the conversation's expiry, in wall seconds
    assert delay_s == pytest.approx(settings.idle_timeout_s / 10.0, abs=0.01)
    wall.now_s += delay_s
    timers.calls.clear()
    call()
    assert runtime.scheduler.open_conversations == 0
    runtime.close()
    entries = [from_record(json.loads(line)) for line in path.read_text().splitlines()]
    assert [type(event) for _, event, _ in entries] == [
        EngineJoined,
        TurnArrived,
        TurnFinished,
        TimerFired,
    ]
    # The journal replays: a fresh scheduler decides the same.
    again = Scheduler(settings, make_policy("collocated", settings))
    for now_s, event, decisions in entries:
        assert again.handle(event, now_s=now_s) == decisions


# --- observation -----------------------------------------------------------------------------
def test_mixed_steps_are_counted_on_one_neighbour_of_one_prefill() -> None:
    mixed, neighbour, other = MixedSteps(), object(), object()
    for number in range(4):
        mixed.event(neighbour, 1, number * 0.01)
        mixed.event(other, 1, number * 0.01)
    mixed.prefill_started()
    for number in range(1, 6):
        mixed.event(neighbour, 1, 0.03 + number * 0.05)
    mixed.prefill_ended(tokens=1000, active_tokens=500)
    steps = mixed.take()
    assert steps is not None
    assert (steps.mixed_steps, steps.mixed_prefill_tokens, steps.mixed_kv_tokens) == (5, 1000, 2500)
    assert steps.mixed_s == pytest.approx(0.25)
    assert mixed.take() is None
    mixed.prefill_started()
    mixed.prefill_started()  # two at once cannot be told apart
    mixed.event(neighbour, 9, 9.0)
    mixed.prefill_ended(tokens=1000, active_tokens=1)
    mixed.prefill_ended(tokens=1000, active_tokens=1)
    assert mixed.take() is None


def test_histogram_is_cumulative() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 3.0):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert histogram.sum == 6.0
