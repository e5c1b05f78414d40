"""What a person sees, as text."""

from __future__ import annotations

import datetime
import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from conserve_serving.cli import render
from conserve_serving.cli.errors import GatewayUnreachableError
from conserve_serving.cli.gateway_http import (
    ClusterStatus,
    ConversationList,
    ConversationStatus,
    EngineStatus,
    GatewayHttp,
)
from conserve_serving.cli.live import Reporter

URL = "http://127.0.0.1:8000"


def engine(id_: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "url": "http://127.0.0.1:4000",
        "tier": "decode",
        "state": "ready",
        "kv_held_tokens": 154_000,
        "kv_capacity_tokens": 308_000,
        "parked_tokens": 12_345,
        "host_capacity_tokens": 308_000,
        "running": 3,
        "queued": 1,
        "conversations": 12,
        "learned": {"prefill_tokens_per_s": 26_000.0},
        "energy_j": 1234.5,
        "energy_source": "modelled: A40",
        **changes,
    }


def cluster(*engines: dict[str, Any], **changes: Any) -> ClusterStatus:
    answer = {
        "gateway": {
            "version": "0.1.0",
            "uptime_s": 192.4,
            "policy": "conserve",
            "tier_mode": "dedicated",
            "open_conversations": 24,
            "waiting_turns": 2,
            "draining": False,
        },
        "speed": 20.0,
        "engines": list(engines),
        "counters": {
            "turns_by_outcome": {"finished": 120, "aborted": 2, "failed": 0},
            "placements_by_reason": {"pinned": 96, "first_turn_handoff": 24},
            "transfers_by_reason": {"first_turn": 24},
            "fallbacks_by_reason": {},
            "moves_by_reason": {},
            "cached_token_shortfall_tokens": 0,
            "shortfall_turns": 0,
        },
        **changes,
    }
    return msgspec.json.decode(msgspec.json.encode(answer), type=ClusterStatus)


def conversations(count: int) -> list[ConversationStatus]:
    rows = [
        {
            "id": f"agent-[{number}]-" + "x" * 60,
            "state": "open",
            "phase": ("decode", "idle", "parked")[number % 3],
            "decode_engine": f"d{number % 2}",
            "turns": number,
            "context_tokens": 15_488,
            "transfers": 1,
            "idle_s": 63.0,
        }
        for number in range(count)
    ]
    return msgspec.json.decode(
        msgspec.json.encode({"conversations": rows}), type=ConversationList
    ).conversations


def shown(*args: Any, width: int = 80, **kwargs: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False, color_system=None)
    console.print(render.screen(*args, url=URL, **kwargs))
    return out.getvalue()


def line_with(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_screen_at_80_columns_shows_every_figure_on_one_line() -> None:
    text = shown(cluster(engine("p0", tier="prefill"), engine("d0"), engine("d1")), [])
    assert max(map(len, text.splitlines())) <= 80
    assert line_with(text, "d0").split() == [
        *("d0", "decode", "ready", "███████·······", "50%", "154k/308k", "12.3k"),
        *("3", "1", "12"),
    ]
    assert "conversations: 24 open, 2 turns waiting for room" in text
    assert "finished 120, aborted 2" in line_with(text, "turns")
    assert "pinned 96, first_turn_handoff 24" in line_with(text, "placed")
    assert "first_turn 24" in line_with(text, "transfers")
    assert "3.7kJ (modelled: A40)" in line_with(text, "energy")
    assert "fallbacks" not in text
    assert "policy conserve, dedicated tiers, time x20, up 3m12s" in text


def test_prefillers_come_first_and_engines_in_their_order() -> None:
    engines = [engine("d10"), engine("d9"), engine("p0", tier="prefill")]
    text = shown(cluster(*engines), [])
    assert text.index("p0 ") < text.index("d9 ") < text.index("d10 ")


def test_lost_and_unfit_engines_say_why_and_show_no_stale_load() -> None:
    down = engine("d1", state="lost", note="connection refused", conversations=0)
    text = shown(cluster(engine("d0"), down), [])
    assert line_with(text, "d1 ").split() == ["d1", "decode", "lost", *"-----", "0"]
    assert "d1 lost: connection refused" in text


def test_of_many_engines_those_that_are_down_are_shown() -> None:
    engines = [engine(f"d{number}") for number in range(100)]
    engines[77] |= {"state": "lost", "note": "connection refused"}
    text = shown(cluster(*engines), [])
    assert "… and 84 more; 99 of 100 are up" in text
    assert "d77 lost: connection refused" in text
    assert text.count("154k/308k") == render.ENGINES_SHOWN - 1


def test_unknown_figures_are_question_marks() -> None:
    unknown = engine("d0", kv_held_tokens=None, kv_capacity_tokens=None, parked_tokens=None)
    assert "?/?" in line_with(shown(cluster(unknown), []), "d0")


def test_no_engine_at_all() -> None:
    assert "no engine has joined" in shown(cluster(), [])


def test_conversations_are_cut_to_what_fits_and_ids_are_not_markup() -> None:
    text = shown(cluster(engine("d0")), conversations(12))
    assert "agent-[0]-xxx" in text
    assert text.count("agent-[") == render.CONVERSATIONS_SHOWN
    assert f"… and {24 - render.CONVERSATIONS_SHOWN} more" in text
    assert max(map(len, text.splitlines())) <= 80
    assert line_with(text, "agent-[1]").split()[1:] == ["idle", "d1", "1", "15.5k", "1", "1m03s"]


def test_a_small_terminal_shows_fewer_conversations_and_everything_else() -> None:
    status = cluster(engine("p0", tier="prefill"), engine("d0"), engine("d1"))
    notices = ("one", "two", "three")
    text = shown(status, conversations(12), height=24, notices=notices)
    assert len(text.splitlines()) <= 24
    assert text.count("agent-[") == 5
    for line in (*notices, "energy", "Ctrl-C"):
        assert line in text
    assert shown(status, conversations(12), height=5).count("agent-[") == 1


def test_trouble_is_shown_only_when_there_is_some() -> None:
    counters = {
        "moves_by_reason": {"engine_lost": 3},
        "fallbacks_by_reason": {"ack_late": 1},
        "cached_token_shortfall_tokens": 4096,
        "shortfall_turns": 2,
    }
    text = shown(cluster(engine("d0"), counters=counters), [])
    assert "engine_lost 3" in line_with(text, "moved")
    assert "ack_late 1" in line_with(text, "fallbacks")
    assert "4.1k tokens in 2 turns" in line_with(text, "cache short")


def test_stale_status_and_notices() -> None:
    text = shown(
        cluster(engine("d0")), [], problem="no gateway answers", notices=("10:00 d0 ended",)
    )
    assert "status not current: no gateway answers" in text
    assert "10:00 d0 ended" in text
    assert "waiting for the first status" in shown(None, [])


def test_plain_line() -> None:
    status = cluster(engine("p0", tier="prefill"), engine("d0"), engine("d1", state="lost"))
    assert render.line(status) == (
        "engines 2/3 up | conversations 24 | waiting turns 2 | KV held d0 50% d1 50%"
        " | turns finished 120 | aborted 2 | transfers 24 | energy 3.7kJ (modelled: A40)"
    )


def test_energy_names_what_it_does_not_know() -> None:
    silent = EngineStatus(id="d1")
    assert render.total_energy([silent]) is None
    known = EngineStatus(id="d0", energy_j=2e6, energy_source="NVML")
    assert render.total_energy([known, silent]) == "2MJ (NVML; 1 engine unknown)"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (950, "950"), (999.7, "1k"), (1000, "1k"), (12_345, "12.3k")),
        *((99_960, "100k"), (999_400, "999k"), (999_600, "1M"), (4_560_000, "4.56M")),
        *((2.5e9, "2.5G"), (7e12, "7T")),
    ],
)
def test_quantities(value: float, text: str) -> None:
    assert render.quantity(value) == text


def test_durations() -> None:
    assert [render.duration(s) for s in (0.4, 59.9, 60, 3599, 3600, 86_400)] == [
        *("0s", "59s", "1m00s", "59m59s", "1h00m", "24h00m")
    ]


class Scripted(GatewayHttp):
    """A gateway that gives the answers it was given; None: it does not answer."""

    def __init__(self, *answers: ClusterStatus | None) -> None:
        super().__init__(URL, timeout_s=1.0)
        self.answers = list(answers)

    def cluster(self) -> ClusterStatus:
        answer = self.answers.pop(0)
        if answer is None:
            raise GatewayUnreachableError("no gateway answers", remedy="start one")
        return answer

    def conversations(self, *, limit: int, everybody: bool = False) -> list[ConversationStatus]:
        return conversations(limit)


class DoneError(Exception):
    """Ends a reporter's loop."""


async def report(gateway: Scripted, *, live: bool, said: str = "") -> str:
    out = io.StringIO()
    console = Console(file=out, width=80, height=60, force_terminal=live, color_system=None)
    noon = datetime.datetime(2026, 11, 23, 12, 0, 0, tzinfo=datetime.UTC)
    reporter = Reporter(console, live=live, now=lambda: noon)

    async def pause(_: float) -> None:
        if said:
            reporter.notify(said)
        if not gateway.answers:
            raise DoneError

    with pytest.raises(DoneError):
        await reporter.run(gateway, sleep=pause)
    reporter.notify("drained")
    return out.getvalue()


async def test_plain_reporter_prints_only_what_changed() -> None:
    same = cluster(engine("d0"))
    text = await report(Scripted(same, same, None, None, same), live=False)
    lines = text.splitlines()
    assert lines[0].startswith("12:00:00 engines 1/1 up | conversations 24")
    assert lines[1] == "12:00:00 status not current: no gateway answers"
    assert lines[2] == lines[0]
    assert lines[3] == "12:00:00 drained"
    assert len(lines) == 4


async def test_live_reporter_keeps_the_last_status_and_shows_notices() -> None:
    text = await report(Scripted(cluster(engine("d0")), None), live=True, said="d0 ended")
    last = text[text.rindex("ConServe ") :]
    assert "status not current: no gateway answers" in last
    assert "154k/308k" in last
    assert "12:00:00 d0 ended" in last
    assert last.rstrip().endswith("12:00:00 drained")
