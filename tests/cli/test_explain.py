"""Plain words: one sentence for everything, and a conversation told from a journal or a gateway."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conserve_serving.cli import reasons
from conserve_serving.cli.errors import BadInputError
from conserve_serving.cli.explain import explained, listing
from conserve_serving.cli.gateway_http import ConversationDetail, EnergyDetail, TurnDetail
from conserve_serving.cli.journal import read_journal
from conserve_serving.core import Scheduler, SchedulerSettings, make_policy
from conserve_serving.core.decisions import Decision, Place
from conserve_serving.core.events import (
    ConversationEnded,
    EngineJoined,
    EngineLost,
    Event,
    HandoffFinished,
    TurnArrived,
    TurnFinished,
)
from conserve_serving.core.journal import to_record
from conserve_serving.core.types import (
    ConversationId,
    EngineId,
    EngineSpeeds,
    Fallback,
    Link,
    Outcome,
    Reason,
    Tier,
    TransferReason,
    TurnId,
)

TABLES = [
    (Reason, reasons.REASONS),
    (TransferReason, reasons.TRANSFERS),
    (Fallback, reasons.FALLBACKS),
    (Outcome, reasons.OUTCOMES),
]


@pytest.mark.parametrize(("names", "sentences"), TABLES)
def test_everything_the_scheduler_can_say_has_a_sentence_of_its_own(names, sentences) -> None:
    assert set(sentences) == set(names)
    assert len(set(sentences.values())) == len(sentences)
    for sentence in sentences.values():
        assert len(sentence.split()) >= 3
        assert not sentence.endswith(".")


def test_a_name_from_a_newer_gateway_is_shown_as_it_is() -> None:
    assert (
        reasons.say_reason("moon_phase") == "for a reason this version does not know (moon_phase)"
    )
    assert reasons.say_outcome("running") == "still running"


class Recorder:
    """A real scheduler whose calls are written to a journal as the gateway writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        settings = SchedulerSettings()
        self.scheduler = Scheduler(settings, make_policy("conserve", settings))
        self.now_s = 0.0

    def send(self, event: Event) -> list[Decision]:
        decisions = self.scheduler.handle(event, now_s=self.now_s)
        with self.path.open("a") as journal:
            journal.write(json.dumps(to_record(self.now_s, event, decisions)) + "\n")
        self.now_s += 1.0
        return decisions

    def join(self, name: str, tier: Tier) -> None:
        self.send(
            EngineJoined(
                engine=EngineId(name),
                epoch=1,
                tier=tier,
                kv_capacity_tokens=100_000,
                host_capacity_tokens=0,
                page_tokens=64,
                max_context_tokens=100_000,
                speeds=EngineSpeeds(prefill_tokens_per_s=26_000.0, decode_step_s=0.013),
                link=Link(setup_s=0.005, bytes_per_s=1e11, kv_bytes_per_token=114_688),
            )
        )

    def turn(self, turn: str, conversation: str, tokens: int, fallback: Fallback | None) -> str:
        """A whole turn; the decoder it ran on."""
        key = ConversationId(f"tenant\x1fmodel\x1f{conversation}")
        arrived = TurnArrived(turn=TurnId(turn), conversation=key, prompt_tokens=tokens)
        (place,) = (d for d in self.send(arrived) if isinstance(d, Place))
        if place.prefiller is not None:
            moved = 0 if fallback else tokens
            self.send(
                HandoffFinished(
                    turn=place.turn,
                    plan=place.plan,
                    moved_tokens=moved,
                    duration_s=0.02,
                    fallback=fallback,
                )
            )
        self.send(
            TurnFinished(
                turn=place.turn,
                plan=place.plan,
                prompt_tokens=tokens,
                output_tokens=100,
                cached_tokens=0 if fallback else tokens - 64,
            )
        )
        return place.decoder


def test_a_journal_tells_every_turn(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    recorder = Recorder(journal)
    recorder.join("p0", Tier.PREFILL)
    recorder.join("d0", Tier.DECODE)
    recorder.join("d1", Tier.DECODE)
    home = recorder.turn("t1", "chat-1", 10_000, None)
    recorder.turn("t2", "chat-1", 10_200, None)
    recorder.turn("t3", "chat-2", 20_000, Fallback.ACK_LATE)
    recorder.send(EngineLost(engine=EngineId(home), epoch=1))
    moved_to = recorder.turn("t4", "chat-1", 10_400, None)
    recorder.send(ConversationEnded(conversation=ConversationId("tenant\x1fmodel\x1fchat-1")))

    with journal.open("a") as running:
        running.write('{"now_s": 9.0, "ev')  # the gateway is in the middle of a line

    chat_1, chat_2 = read_journal(journal).values()
    assert (chat_1.id, chat_1.state, chat_1.turns) == ("chat-1", "ended", 3)
    assert chat_1.decode_engine == moved_to != home
    assert chat_1.transfers_by_reason == {"first_turn": 1, "engine_lost": 1}
    assert [turn.reason for turn in chat_1.recent_turns] == [
        *("first_turn_handoff", "pinned", "replaced_engine_lost")
    ]
    assert {turn.outcome for turn in chat_1.recent_turns} == {"finished"}
    assert [turn.duration_s for turn in chat_1.recent_turns] == [2.0, 1.0, 2.0]

    text = "\n".join(explained(chat_1))
    assert f"ran on {moved_to}" in text
    assert "KV moved: 1 x the one hand-off after the first turn's prefill; 1 x" in text
    assert f"prefilled on p0, decoded on {home}; 10,000 prompt tokens, 9,936 of them" in text
    assert reasons.REASONS[Reason.PINNED] in text
    assert reasons.REASONS[Reason.REPLACED_ENGINE_LOST] in text

    text = "\n".join(explained(chat_2))
    assert "KV moved: never" in text
    assert f"but {reasons.FALLBACKS[Fallback.ACK_LATE]}" in text
    assert "prefilled on p0" not in text
    assert listing([chat_1, chat_2], source="journal")[0] == (
        f"chat-1  ended, 3 turns, on {moved_to}, 2 transfers"
    )


def test_a_refused_and_a_held_turn_are_told(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    recorder = Recorder(journal)
    recorder.join("d0", Tier.DECODE)
    for turn, tokens in (("t1", 90_000), ("t2", 90_000), ("t3", 200_000)):
        recorder.send(
            TurnArrived(turn=TurnId(turn), conversation=ConversationId(turn), prompt_tokens=tokens)
        )
    recorder.join("d1", Tier.DECODE)
    _, held, refused = read_journal(journal).values()
    assert held.recent_turns[0].held == ["held_no_room"]
    text = "\n".join(explained(held))
    assert text.index("held: no decoder had room") < text.index("first turn: prefilled on its own")
    assert "still running" in text
    assert "decoded on d1" in text
    text = "\n".join(explained(refused))
    assert "refused before it ran" in text
    assert "refused: longer than any decoder can hold" in text


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    for line in ("{", "[]", "7", '{"now_s": 1}', '{"now_s":0,"event":{"kind":"X"},"decisions":[]}'):
        journal.write_text("\n" + line + "\n")
        with pytest.raises(BadInputError, match=r"journal\.jsonl, line 2"):
            read_journal(journal)
    with pytest.raises(BadInputError, match="No such file"):
        read_journal(tmp_path / "nothing")


def test_what_a_gateway_has_forgotten_is_said() -> None:
    detail = ConversationDetail(
        id="c",
        state="open",
        turns=9,
        decode_engine="d0",
        cached_token_shortfall_tokens=640,
        recent_turns=[
            TurnDetail(
                index=9,
                outcome="finished",
                reason="pinned",
                decode_engine="d0",
                prompt_tokens=1000,
                output_tokens=10,
                cached_tokens=360,
                ttft_s=0.0512,
                duration_s=1.5,
            )
        ],
    )
    assert explained(detail) == [
        "conversation c: open, 9 turns, lives on d0",
        "  KV moved: never",
        "  cache: 640 tokens that should have been cached had to be prefilled again",
        "  (turns before 9 are not remembered)",
        "  turn 9: answered in full",
        f"    {reasons.REASONS[Reason.PINNED]}",
        "    decoded on d0; 1,000 prompt tokens, 360 of them from cache; 10 tokens out",
        "    first token after 0.0512 s, 1.5 s in all",
    ]


def test_joules_are_told_with_their_source_and_what_is_missing() -> None:
    charged = EnergyDetail(
        total_j=212.34, prefill_j=12.34, decode_j=200.0, source="measured: NVML total energy"
    )
    turn = TurnDetail(index=1, energy=EnergyDetail(total_j=0.5, decode_j=0.5, settled=False))
    silent = TurnDetail(index=2, energy=EnergyDetail(unknown_engines=["d1"]))
    lines = explained(ConversationDetail(id="c", energy=charged, recent_turns=[turn, silent]))
    assert "  energy: 212.3 J (prefill 12.3, decode 200); measured: NVML total energy" in lines
    assert "    0.5 J (prefill 0, decode 0.5) so far" in lines
    assert sum(" J (" in line for line in lines) == 2
    partly = EnergyDetail(total_j=1.0, source="modelled: x", unknown_engines=["d1", "d2"])
    told = explained(ConversationDetail(id="c", energy=partly))
    assert "    without what ran on d1, d2" in told
