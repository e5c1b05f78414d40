"""The report of what a run got."""

from __future__ import annotations

import json
import urllib.error
from typing import Any

import pytest

from conserve_agents import Gateway, GatewayUnreachableError
from conserve_agents.report import Watch, summary, try_text

TURN = {"decode_engine": "d0"}
SEEN: dict[str, Any] = {
    "id": "c",
    "turns": 3,
    "parent": "p",
    "running_turns": 0,
    "prefill_engine": "p0",
    "decode_engine": "d1",
    "transfers": 2,
    "transfers_by_reason": {"first_turn": 1, "engine_lost": 1},
    "prompt_tokens": 1000,
    "cached_tokens": 750,
    "output_tokens": 60,
    "recent_turns": [TURN, TURN, {"decode_engine": "d1"}],
}


class FakeGateway:
    """Answers in turn; the last answer again and again."""

    def __init__(self, *conversations: Any, energies: tuple[Any, ...] = ()) -> None:
        self.conversations = list(conversations)
        self.energies = list(energies)
        self.slept: list[float] = []

    def watch(self) -> Watch:
        return Watch(Gateway("http://g/v1", send=self.send), sleep=self.slept.append)

    def send(self, request: Any, timeout_s: float) -> bytes:
        if request.full_url.endswith("/cluster"):
            energy = self.energies.pop(0) if self.energies else None
            engine = {"energy_j": energy, "energy_source": "modelled: x"}
            return json.dumps({"engines": [engine, {"energy_j": None}]}).encode()
        answers = self.conversations
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(found, int):
            raise urllib.error.HTTPError(request.full_url, found, "no", None, None)  # type: ignore[arg-type] # as urllib does
        return json.dumps(found).encode()


def test_everything_that_is_known_is_said() -> None:
    fake = FakeGateway(SEEN, energies=(100.0, 142.4))
    assert fake.watch().text(["c"]).splitlines() == [
        "conversation c: 3 turns, started by p",
        "  engines    prefill p0, decode d0 → d1",
        "  transfers  2 (1 × first_turn, 1 × engine_lost)",
        "  tokens     1000 in prompts, 750 of them cached (75%), 60 generated",
        "energy: 42 J on all engines meanwhile, idle included (modelled: x)",
    ]
    energy = {"total_j": 7.5, "prefill_j": 2.0, "decode_j": 5.5, "source": "nvml", "settled": True}
    said = "  energy     7.5 J (prefill 2.0, decode 5.5; nvml)"
    assert summary({**SEEN, "energy": energy}).splitlines()[-1] == said
    unsettled = summary({**SEEN, "energy": {**energy, "settled": False}})
    assert unsettled.splitlines()[-1] == f"{said}, more to come"


def test_what_is_not_known_is_left_out() -> None:
    assert summary({"id": "c", "turns": 0}).splitlines() == [
        "conversation c: 0 turns",
        "  engines    prefill (none), decode (none)",
        "  transfers  None",
        "  tokens     0 in prompts, 0 of them cached (0%), None generated",
    ]
    assert "energy" not in summary({**SEEN, "energy": {"total_j": None, "settled": True}})
    assert "energy" not in FakeGateway(SEEN).watch().text(["c"])
    unknown = FakeGateway(404).watch().text(["c"])
    assert unknown == "conversation c: no call of it reached the gateway"


def test_a_turn_that_is_still_being_booked_is_waited_for() -> None:
    running = {**SEEN, "running_turns": 1, "turns": 2}
    fake = FakeGateway(running, running, SEEN)
    assert fake.watch().text(["c"]).startswith("conversation c: 3 turns")
    assert len(fake.slept) == 2
    counted = {"total_j": None, "settled": False}
    fake = FakeGateway({**SEEN, "energy": counted}, SEEN)
    assert fake.watch().text(["c"]).startswith("conversation c: 3 turns") and len(fake.slept) == 1
    stuck = FakeGateway(running)
    assert stuck.watch().text(["c"]).startswith("conversation c: 2 turns")
    assert sum(stuck.slept) == pytest.approx(2.0)


def test_an_answer_is_not_lost_to_a_report_that_cannot_be_made() -> None:
    fake = FakeGateway(SEEN)
    watch = fake.watch()
    fake.conversations = [500]
    assert try_text(watch, ["c"]).startswith("(no report: ")

    def refuse(request: Any, timeout_s: float) -> bytes:
        raise ConnectionRefusedError("refused")

    with pytest.raises(GatewayUnreachableError):
        Watch(Gateway("http://g", send=refuse))
