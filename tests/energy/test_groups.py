"""Boards and engines: tensor parallelism, shared boards, MIG, idle power, engines that go away."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_serving.energy.groups import BoardGroup, Reading
from conserve_serving.energy.ledger import Account
from conserve_serving.energy.work import Kind, Steps, Tally, Work

NVML = "measured: NVML total energy"
BUSY = Steps(decode_steps=100, decode_s=1.0, decode_batch_sum=100)


class Cluster:
    """Engines on boards that draw what a test says, settled once a second."""

    def __init__(self, idle_w: float | None = None, **boards: list[str]) -> None:
        self.group = BoardGroup()
        self.accounts: dict[str, Account] = {}
        self.now_s = 0.0
        self.drawn_j = 0.0
        names = sorted({board for row in boards.values() for board in row})
        self.readings = {name: Reading(joules=0.0, at_s=0.0, source=NVML) for name in names}
        for engine, row in boards.items():
            self.accounts[engine] = Account(opened_s=0.0)
            known = dict.fromkeys(row, idle_w)
            self.group.add(engine, self.accounts[engine], known, at_s=0.0)
        for name, reading in self.readings.items():
            self.group.rebase(name, reading)

    def draw(self, seconds: float = 1.0, **watts: float) -> None:
        self.now_s += seconds
        for name, reading in self.readings.items():
            joules = watts.get(name, 0.0) * seconds
            self.drawn_j += joules
            self.readings[name] = Reading(
                joules=reading.joules + joules,
                at_s=self.now_s,
                source=reading.source,
                shared=reading.shared,
            )

    def report(self, **steps: Steps) -> None:
        for engine in sorted(steps):
            self.group.report(engine, self.now_s, steps[engine], self.readings)

    def second(self, steps: dict[str, Steps] | None = None, **watts: float) -> None:
        """A second in which boards draw this much and engines count this much."""
        self.draw(1.0, **watts)
        self.report(**{engine: (steps or {}).get(engine, Steps()) for engine in self.accounts})

    def decoding(self, engine: str) -> Work:
        """A turn that decodes there from now on."""
        work = Work(Tally(), begin_s=self.now_s, prefill_tokens=1, decodes=True, streams=True)
        work.first_token(self.now_s)
        self.accounts[engine].begin(work)
        return work

    def joules(self, engine: str) -> dict[Kind, float]:
        return {kind: self.accounts[engine].joules(kind) for kind in Kind}

    def check(self) -> None:
        for account in self.accounts.values():
            account.check_invariants()
        booked = math.fsum(account.total_j for account in self.accounts.values())
        assert booked == pytest.approx(self.drawn_j)


def test_idle_power_is_what_quiet_seconds_show() -> None:
    cluster = Cluster(d0=["a"])
    assert cluster.group.idle_w("d0") == (None, False)
    for _ in range(3):
        cluster.second(a=70.0)
    assert cluster.group.idle_w("d0") == (pytest.approx(70.0), True)
    turn = cluster.decoding("d0")
    cluster.second({"d0": BUSY}, a=370.0)
    assert turn.tally.decode_j == pytest.approx(300.0)
    assert cluster.joules("d0")[Kind.IDLE] == pytest.approx(280.0)
    cluster.check()


def test_the_second_after_work_does_not_teach_idle_power() -> None:
    cluster = Cluster(d0=["a"])
    for _ in range(3):
        cluster.second(a=70.0)
    turn = cluster.decoding("d0")
    cluster.second({"d0": BUSY}, a=370.0)
    turn.end(cluster.now_s)
    cluster.second(a=200.0)  # the turn is settled with what it left
    cluster.second(a=150.0)  # quiet, but the clocks are still high
    assert cluster.group.idle_w("d0")[0] == pytest.approx(70.0)
    for _ in range(300):
        cluster.second(a=60.0)
    assert cluster.group.idle_w("d0")[0] == pytest.approx(60.0, abs=0.2)


def test_without_any_idle_power_all_of_a_busy_second_is_active() -> None:
    cluster = Cluster(d0=["a"])
    turn = cluster.decoding("d0")
    cluster.second({"d0": BUSY}, a=370.0)
    assert turn.tally.decode_j == pytest.approx(370.0)
    cluster = Cluster(idle_w=100.0, d0=["a"])  # a profile's word is taken until then
    turn = cluster.decoding("d0")
    cluster.second({"d0": BUSY}, a=370.0)
    assert turn.tally.decode_j == pytest.approx(270.0)
    assert cluster.group.idle_w("d0") == (100.0, False)


def test_an_engine_over_two_boards_is_charged_for_both() -> None:
    cluster = Cluster(idle_w=50.0, d0=["a", "b"])
    turn = cluster.decoding("d0")
    cluster.second({"d0": BUSY}, a=350.0, b=250.0)
    assert turn.tally.decode_j == pytest.approx(500.0)
    assert cluster.joules("d0")[Kind.IDLE] == pytest.approx(100.0)
    assert cluster.group.source("d0") == NVML
    cluster.check()


def test_a_board_of_two_engines_is_split_by_busy_time_and_says_so() -> None:
    cluster = Cluster(idle_w=60.0, d0=["a"], d1=["a"])
    one, other = cluster.decoding("d0"), cluster.decoding("d1")
    short = Steps(decode_steps=25, decode_s=0.25, decode_batch_sum=25)
    cluster.second({"d0": BUSY, "d1": short}, a=310.0)
    assert one.tally.decode_j == pytest.approx(200.0)
    assert other.tally.decode_j == pytest.approx(50.0)
    assert cluster.joules("d0")[Kind.IDLE] == cluster.joules("d1")[Kind.IDLE] == 30.0
    assert cluster.group.source("d0") == f"{NVML}, split by busy time: 2 engines on one board"
    cluster.check()


def test_a_shared_board_waits_for_every_engine_on_it() -> None:
    cluster = Cluster(idle_w=0.0, d0=["a"], d1=["a"])
    cluster.decoding("d0")
    cluster.draw(a=100.0)
    assert not cluster.group.report("d0", cluster.now_s, BUSY, cluster.readings)
    assert cluster.accounts["d0"].total_j == 0.0
    assert cluster.group.report("d1", cluster.now_s, Steps(), cluster.readings)
    assert cluster.accounts["d0"].total_j == pytest.approx(100.0)
    cluster.group.down("d1", cluster.now_s)  # one that is gone is not waited for
    cluster.draw(a=100.0)
    assert cluster.group.report("d0", cluster.now_s, BUSY, cluster.readings)
    cluster.check()


def test_a_board_that_others_may_use_is_charged_to_no_turn() -> None:
    cluster = Cluster(idle_w=60.0, d0=["a"])
    cluster.readings["a"] = Reading(joules=0.0, at_s=0.0, source="whole board", shared=True)
    turn = cluster.decoding("d0")
    cluster.second({"d0": BUSY}, a=310.0)
    turn.end(cluster.now_s)
    cluster.second(a=310.0)
    cluster.second(a=310.0)  # quiet for us: somebody else is at work
    assert turn.tally.total_j == 0.0
    assert cluster.joules("d0")[Kind.UNATTRIBUTED] == pytest.approx(750.0)
    assert cluster.joules("d0")[Kind.IDLE] == pytest.approx(180.0)
    assert cluster.group.idle_w("d0") == (60.0, False)
    cluster.check()


def test_nothing_is_settled_before_the_board_was_read_again() -> None:
    cluster = Cluster(d0=["a"])
    turn = cluster.decoding("d0")
    cluster.now_s += 0.05
    cluster.report(d0=Steps(decode_steps=5, decode_s=0.05, decode_batch_sum=5))
    assert turn.tally.sources == ()
    cluster.draw(a=300.0)
    cluster.report(d0=BUSY)
    assert turn.tally.decode_j == pytest.approx(300.0)


def test_a_lost_board_leaves_a_hole_and_its_return_is_not_charged_to_those_present() -> None:
    cluster = Cluster(idle_w=50.0, d0=["a", "b"])
    turn = cluster.decoding("d0")
    kept = cluster.readings.pop("b")
    for _ in range(10):
        cluster.second({"d0": BUSY}, a=150.0)
    assert turn.tally.decode_j == pytest.approx(1000.0)
    cluster.now_s += 1.0
    cluster.readings["a"] = Reading(
        joules=cluster.readings["a"].joules + 150.0, at_s=cluster.now_s, source=NVML
    )
    back_j = 11 * 150.0  # its counter went on
    cluster.readings["b"] = Reading(joules=kept.joules + back_j, at_s=cluster.now_s, source=NVML)
    cluster.drawn_j += 150.0 + back_j
    cluster.report(d0=BUSY)
    assert turn.tally.decode_j == pytest.approx(1000.0 + 100.0 + 100.0)
    assert cluster.joules("d0")[Kind.UNATTRIBUTED] == pytest.approx(10 * 100.0)
    cluster.check()


def test_a_sampler_that_is_stuck_does_not_keep_turns_open_for_ever() -> None:
    cluster = Cluster(d0=["a"])
    turn = cluster.decoding("d0")
    turn.end(0.0)
    for _ in range(15):
        cluster.now_s += 1.0
        cluster.report(d0=Steps())
    assert cluster.accounts["d0"].quiet


def test_what_is_drawn_while_an_engine_is_down_is_no_turns_and_teaches_nothing() -> None:
    cluster = Cluster(idle_w=50.0, d0=["a"])
    turn = cluster.decoding("d0")
    cluster.second({"d0": BUSY}, a=150.0)
    cluster.group.down("d0", cluster.now_s)
    cluster.draw(20.0, a=250.0)  # it loads its weights again
    cluster.group.up("d0", cluster.readings, cluster.now_s)
    assert cluster.joules("d0")[Kind.UNATTRIBUTED] == pytest.approx(20 * 200.0)
    assert cluster.joules("d0")[Kind.IDLE] == pytest.approx(21 * 50.0)
    assert turn.tally.total_j == pytest.approx(100.0)
    assert cluster.group.idle_w("d0") == (50.0, False)
    cluster.second(a=60.0)
    assert cluster.joules("d0")[Kind.IDLE] == pytest.approx(21 * 50.0 + 60.0)
    cluster.check()


def test_boards_without_any_engine_up_are_settled_all_the_same() -> None:
    cluster = Cluster(idle_w=50.0, d0=["a"])
    cluster.group.down("d0", cluster.now_s)
    cluster.draw(2.0, a=80.0)
    cluster.group.away(cluster.readings, cluster.now_s)
    assert cluster.joules("d0")[Kind.IDLE] == pytest.approx(100.0)
    assert cluster.joules("d0")[Kind.UNATTRIBUTED] == pytest.approx(60.0)
    cluster.check()


def test_an_engine_that_is_silent_holds_its_neighbours_up_for_a_while_only() -> None:
    cluster = Cluster(idle_w=0.0, d0=["a"], d1=["a"])
    turn = cluster.decoding("d0")
    for _ in range(12):
        cluster.draw(a=100.0)
        cluster.report(d0=BUSY)
    assert turn.tally.decode_j == pytest.approx(1100.0)
    cluster.draw(a=100.0)
    cluster.report(d0=BUSY, d1=Steps())
    cluster.check()


def test_groups_that_meet_become_one() -> None:
    left, right = BoardGroup(), BoardGroup()
    accounts = {name: Account(opened_s=0.0) for name in ("x", "y", "z")}
    left.add("x", accounts["x"], {"a": None}, at_s=0.0)
    right.add("y", accounts["y"], {"b": None}, at_s=0.0)
    joined = BoardGroup()
    joined.absorb(left)
    joined.absorb(right)
    joined.add("z", accounts["z"], {"a": None, "b": None}, at_s=0.0)
    assert joined.engines == {"x", "y", "z"} and joined.boards == {"a", "b"}
    joined.remove("z")
    joined.remove("y")
    assert joined.boards == {"a"}


_draws = st.floats(min_value=0.0, max_value=1400.0)
_counted = st.builds(
    Steps,
    prefill_tokens=st.integers(min_value=0, max_value=10_000),
    prefill_s=st.floats(min_value=0.0, max_value=2.0),
    decode_steps=st.integers(min_value=0, max_value=200),
    decode_s=st.floats(min_value=0.0, max_value=2.0),
    decode_batch_sum=st.floats(min_value=0.0, max_value=1e4),
)
_layouts = st.sampled_from(
    [
        {"d0": ["a"]},
        {"d0": ["a", "b"]},
        {"d0": ["a"], "d1": ["a"]},
        {"d0": ["a", "b"], "d1": ["b", "c"], "d2": ["c"]},
    ]
)


@settings(max_examples=75, deadline=None)  # the machine may be busy
@given(_layouts, st.none() | st.floats(min_value=0.0, max_value=200.0), st.data())
def test_what_boards_used_is_what_engines_are_booked(
    layout: dict[str, list[str]], idle_w: float | None, data: Any
) -> None:
    cluster = Cluster(idle_w, **layout)
    works: list[Work] = []
    down: set[str] = set()
    for _ in range(data.draw(st.integers(min_value=1, max_value=15))):
        cluster.draw(
            data.draw(st.floats(min_value=0.01, max_value=5.0)),
            **{board: data.draw(_draws) for board in cluster.readings},
        )
        engine = data.draw(st.sampled_from(sorted(layout)))
        match data.draw(st.sampled_from(["begin", "end", "down", "up", "steps"])):
            case "begin" if engine not in down:
                works.append(cluster.decoding(engine))
            case "end" if works:
                works[data.draw(st.integers(0, len(works) - 1))].end(cluster.now_s)
            case "down" if engine not in down:
                cluster.group.down(engine, cluster.now_s)
                down.add(engine)
            case "up" if engine in down:
                cluster.group.up(engine, cluster.readings, cluster.now_s)
                down.discard(engine)
        up = [name for name in layout if name not in down]
        cluster.report(**{name: data.draw(_counted) for name in up})
        if up:
            cluster.check()
            parts = [account.joules(kind) for account in cluster.accounts.values() for kind in Kind]
            charged = math.fsum(work.tally.total_j for work in works)
            active = math.fsum(
                account.joules(kind)
                for account in cluster.accounts.values()
                for kind in (Kind.PREFILL, Kind.DECODE)
            )
            pending = math.fsum(account.pending_j for account in cluster.accounts.values())
            assert charged == pytest.approx(active, rel=1e-9, abs=1e-9)
            assert math.fsum(parts) + pending == pytest.approx(cluster.drawn_j)
