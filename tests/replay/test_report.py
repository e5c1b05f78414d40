"""The HTML report, the terminal table, and the command, end to end against a fake gateway."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from conserve_serving.cli.replay import replay
from conserve_serving.replay import charts
from conserve_serving.replay.cluster import Cluster, Engine
from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.replay.figures import figures
from conserve_serving.replay.records import (
    ClusterSample,
    ConversationRecord,
    RunResult,
    TurnRecord,
)
from conserve_serving.replay.report import format_number, format_seconds, render_report
from conserve_serving.replay.terminal import render_table
from conserve_serving.replay.workload import Arrivals, Workload

EVIL = "<script>alert('&')</script>"


def run_of(count: int, *, name: str = "c") -> RunResult:
    """``count`` conversations of two turns on three engines; the last one failed."""
    records = []
    for i in range(count):
        turns = (
            Turn(input_tokens=1000, new_input_tokens=1000, output_tokens=8),
            Turn(input_tokens=1050, new_input_tokens=42, output_tokens=8),
        )
        record = ConversationRecord(
            conversation=Conversation(id=f"{name}{i}", turns=turns), arrival_s=i * 0.5
        )
        for index, turn in enumerate(turns, 1):
            due = record.arrival_s + 3.0 * (index - 1)
            record.turns.append(
                TurnRecord(
                    index=index,
                    turn=turn,
                    due_s=due,
                    sent_s=due,
                    first_token_s=due + 0.5,
                    last_token_s=due + 2.0,
                    prompt_tokens=turn.input_tokens,
                    output_tokens=8,
                    cached_tokens=turn.kept_tokens,
                    decode_engine=f"d{i % 2}",
                    prefill_engine="p0" if index == 1 else f"d{i % 2}",
                    transfers=1,
                    reason="pinned",
                )
            )
        records.append(record)
    failed = records[-1].turns[-1]
    failed.first_token_s = failed.last_token_s = None
    failed.error = "http_503"
    samples = [
        ClusterSample(
            at_s=at_s,
            cluster=Cluster(
                engines=tuple(
                    Engine(
                        id=engine,
                        tier="prefill" if engine == "p0" else "decode",
                        profile="a40-qwen3-0.6b",
                        kv_held_tokens=int(at_s * 100),
                        kv_capacity_tokens=10_000,
                        parked_tokens=50,
                        energy_j=at_s * 100,
                        energy_source="modelled: x",
                    )
                    for engine in ("p0", "d0", "d1")
                )
            ),
        )
        for at_s in (0.0, 5.0, 10.0)
    ]
    return RunResult(
        workload=Workload(name=EVIL, conversations=tuple(r.conversation for r in records)),
        seed=0,
        arrivals=Arrivals.POISSON,
        rate_per_s=2.0,
        speed=10.0,
        gateway_url="http://x",
        model="m",
        connections=4,
        conversations=records,
        samples=samples,
        wall_s=1.0,
    )


class Checker(HTMLParser):
    """Collects what a browser would load, and checks that tags close."""

    VOID = frozenset({"meta", "br", "link", "img", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in {"src", "href"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("count", [1, 60, 1000])
def test_the_report_is_one_well_formed_file(count: int) -> None:
    result = run_of(count)
    html = render_report(result, figures(result, ideal=None, ideal_note="none"), ideal=None)
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert checker.loads == []
    assert "script" not in checker.tags and "url(" not in html and "@import" not in html
    assert EVIL not in html and "&lt;script&gt;" in html
    assert html.count("<title>") == count + 1  # the page's own, and one per lane
    assert "prefers-color-scheme: dark" in html
    assert len(html) < 3_000_000


def test_the_report_shows_figures_rows_and_errors() -> None:
    result = run_of(60)
    numbers = figures(result, ideal=None, ideal_note="no profile for x")
    html = render_report(result, numbers, ideal=None)
    assert "http_503 1" in html
    assert "3.50 s" in html  # TTFET p95
    assert "no profile for x" in html
    assert "<td>c59</td>" in html and "<td>c0</td>" in html
    assert re.search(r"<i class=\"e\d\"></i>p0", html)
    assert "peak 10%" in html


def test_long_tables_are_cut_and_say_so() -> None:
    result = run_of(1200)
    html = render_report(result, figures(result, ideal=None, ideal_note="-"), ideal=None)
    assert "The first 2,000 of 2,400 rows" in html


def test_timeline_bars_are_where_the_times_are() -> None:
    (record,) = run_of(2).conversations[:1]
    classes = charts.engine_classes(["d0", "d1", "p0"])
    svg = charts.timeline([record], classes, 10.0)
    scale = (1100 - 12 - 120) / 10.0
    waits = re.findall(r'class="(e\d) wait" d="M([\d.]+) [\d.]+h([\d.]+)', svg)
    assert waits[0][0] == classes["p0"]
    assert float(waits[0][1]) == pytest.approx(120.0)
    assert float(waits[0][2]) == pytest.approx(0.5 * scale, abs=0.06)
    decode = re.search(rf'class="{classes["d0"]}" d="M([\d.]+) [\d.]+h([\d.]+)', svg)
    assert decode is not None
    assert float(decode[1]) == pytest.approx(120 + 0.5 * scale, abs=0.06)
    assert float(decode[2]) == pytest.approx(1.5 * scale, abs=0.06)
    assert svg.count('class="handoff"') == 1  # one transfer: one tick


def test_many_conversations_share_lanes_by_decoder_without_overlap() -> None:
    records = run_of(400).conversations
    groups = charts.lanes(records)
    assert [engine for engine, _ in groups] == ["d0", "d1"]
    for engine, group in groups:
        assert len(group) < 20  # 5 s each, one a second: a handful at a time
        for lane in group:
            assert {record.turns[0].decode_engine for record in lane} == {engine}
            for before, after in itertools.pairwise(lane):
                assert before.turns[-1].last_token_s <= after.arrival_s
    assert sum(len(lane) for _, group in groups for lane in group) == 400


def test_ticks_are_round() -> None:
    assert charts.nice_ticks(10.0, 5) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert charts.nice_ticks(0.0) == [0.0]
    assert all(len(charts.nice_ticks(high)) <= 10 for high in (0.003, 1.0, 7.3, 99.0, 12345.0))


def test_numbers_as_people_read_them() -> None:
    assert [format_number(v) for v in (None, 0, 1234567, 0.01234, 61.987, 1.0, "x")] == [
        "–", "0", "1,234,567", "0.0123", "62.0", "1", "x"
    ]  # fmt: skip
    rounded_up = [format_number(v) for v in (0.09996, 0.9996, 9.996, 99.96, 999.6)]
    assert rounded_up == ["0.100", "1.00", "10.0", "100", "1,000"]
    assert [format_number(v) for v in (math.inf, math.nan)] == ["no limit", "–"]
    assert [format_seconds(v) for v in (None, 0.0123, 2.0, 61.2345)] == [
        "–", "12.3 ms", "2 s", "61.2 s"
    ]  # fmt: skip


def test_the_terminal_table_fits_80_columns() -> None:
    result = run_of(60)
    console = Console(width=80, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(render_table(figures(result, ideal=None, ideal_note="-")))
    text = capture.get()
    assert all(len(line) <= 80 for line in text.splitlines())
    for word in ("TTFET", "first-turn TTFT", "last-turn TBT", "end to end", "http_503 1"):
        assert word in text


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def served(gateway_class) -> Iterator:
    """A fake gateway on a thread of its own: the command runs its own event loop."""
    fake = gateway_class()
    ready = threading.Event()
    stop: list[Callable[[], None]] = []

    async def serve() -> None:
        server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        stop.append(lambda: loop.call_soon_threadsafe(over.set))
        ready.set()
        await over.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    yield fake
    stop[0]()
    thread.join(10)
    assert not thread.is_alive()


def invoke(*arguments: object):
    return CliRunner().invoke(replay, [str(a) for a in (*arguments, "--no-progress")])


def write_trace(path: Path, output_tokens: int = 5) -> Path:
    rows = [
        {"conversation_id": f"c{i}", "turn": t, "input_tokens": 100 + 25 * t,
         "new_input_tokens": 20 if t else 100, "output_tokens": output_tokens}
        for i in range(3) for t in range(2)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_the_command_writes_json_and_html(served, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl")
    out, html = tmp_path / "o.json", tmp_path / "o.html"
    done = invoke(trace, "--gateway", served.url, "--json", out, "--html", html, "--rate", 100)
    assert done.exit_code == 0, done.output
    assert "TTFET" in done.output
    data = json.loads(out.read_text())
    assert data["conversations"] == 3 and data["turns"] == 6 and data["errors"] == {}
    assert data["conditions"]["speed"] == 1000.0  # the cluster's own
    assert data["conditions"]["rate_per_s"] == 100
    assert len(data["turn_records"]["rows"]) == 6
    assert html.read_text().startswith("<!doctype html>")
    assert sorted(served.ended) == ["replay-0-c0", "replay-0-c1", "replay-0-c2"]


def test_the_command_fails_when_a_turn_fails(served, tmp_path: Path) -> None:
    served.faults = {(2, 1): ("status", 400, None)}
    done = invoke(write_trace(tmp_path / "t.jsonl"), "--gateway", served.url)
    assert done.exit_code == 1
    assert "http_400 3" in done.output


def test_conversations_are_cut_at_what_the_engines_can_hold(served, tmp_path: Path) -> None:
    out = tmp_path / "o.json"
    trace = write_trace(tmp_path / "t.jsonl", output_tokens=3980)
    done = invoke(trace, "--gateway", served.url, "--json", out)
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    assert data["turns"] == 3 and data["conditions"]["workload"]["cut_by_context"] == 3
    assert "3 conversations were cut" in done.output


def test_generated_workloads_can_be_named(served, tmp_path: Path) -> None:
    done = invoke(
        "generated:customer-service", "--gateway", served.url, "--conversations", 2,
        "--max-turns", 1, "--json", tmp_path / "o.json",
    )  # fmt: skip
    # The fake engine holds 4,096 tokens; this workload's first turns need more.
    assert done.exit_code == 1 and "no conversation is left" in done.output


def test_a_speed_that_is_not_the_engines_is_warned_of(served, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl")
    done = invoke(trace, "--gateway", served.url, "--speed", 500, "--rate", 100)
    assert "not the engines' own 1000" in done.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("missing.jsonl", "--gateway", "http://127.0.0.1:9"), "no gateway answers"),
        (("t", "--gateway", "https://x"), "http://HOST:PORT"),
        (("t", "--json", "/nowhere/at/all.json"), "its folder does not exist"),
    ],
)
def test_mistakes_are_explained(arguments: tuple[str, ...], says: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code != 0
    assert says in done.output
    assert "Traceback" not in done.output
