"""A decision journal as conversations with their turns: what `conserve explain` shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from conserve_serving.cli.errors import BadInputError
from conserve_serving.cli.gateway_http import ConversationDetail, TurnDetail
from conserve_serving.core import decisions as d
from conserve_serving.core import events as e
from conserve_serving.core.errors import JournalError
from conserve_serving.core.journal import from_record

#: Separates tenant, model and the conversation's own id in the ids the gateway gives the core.
_SCOPE = "\x1f"


@dataclass(slots=True)
class _Turn:
    index: int = 0
    arrived_s: float = 0.0
    outcome: str = "running"
    reason: str | None = None
    held: list[str] = field(default_factory=list)
    place: d.Place | None = None
    fallback: str | None = None
    finished: e.TurnFinished | None = None
    ended_s: float | None = None

    def detail(self) -> TurnDetail:
        place, finished = self.place, self.finished
        handed_over = place is not None and self.fallback is None and place.prefiller is not None
        return TurnDetail(
            index=self.index,
            outcome=self.outcome,
            reason=self.reason,
            held=self.held,
            fallback=self.fallback,
            prefill_engine=place.prefiller if place and handed_over else None,
            decode_engine=place.decoder if place else None,
            prompt_tokens=finished.prompt_tokens if finished else 0,
            output_tokens=finished.output_tokens if finished else 0,
            cached_tokens=finished.cached_tokens if finished else None,
            duration_s=None if self.ended_s is None else self.ended_s - self.arrived_s,
        )


@dataclass(slots=True)
class _Conversation:
    ended: bool = False
    transfers: dict[str, int] = field(default_factory=dict)
    turns: dict[str, _Turn] = field(default_factory=dict)

    def detail(self, id_: str) -> ConversationDetail:
        turns = [turn.detail() for turn in self.turns.values()]
        placed = [turn.decode_engine for turn in turns if turn.decode_engine is not None]
        return ConversationDetail(
            id=id_.rpartition(_SCOPE)[2],
            state="ended" if self.ended else "open",
            turns=max((turn.index for turn in turns), default=0),
            decode_engine=placed[-1] if placed else None,
            transfers=sum(self.transfers.values()),
            transfers_by_reason=self.transfers,
            recent_turns=turns,
        )


def read_journal(path: Path) -> dict[str, ConversationDetail]:
    """The conversations of a decision journal, in the order of their first turns.

    Args:
        path: JSON lines, as the gateway writes them.

    Returns:
        Conversations by the id the scheduler knows them by.

    Raises:
        BadInputError: the file cannot be read, or a line is no journal record; it is named.
    """
    reader = _Reader()
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                # A last line without an end is still being written.
                if line.strip() and line.endswith(b"\n"):
                    try:
                        reader.read(*from_record(msgspec.json.decode(line)))
                    except (msgspec.DecodeError, JournalError, TypeError, AttributeError) as error:
                        raise BadInputError(
                            f"{path}, line {number}: {error}",
                            remedy="give a journal that this version wrote"
                            " (setting gateway.decision_journal)",
                        ) from error
    except OSError as failure:
        raise BadInputError(
            f"{path}: {failure.strerror}", remedy="give an existing decision journal"
        ) from failure
    return {id_: conversation.detail(id_) for id_, conversation in reader.conversations.items()}


class _Reader:
    """Follows the turns through events and decisions."""

    def __init__(self) -> None:
        self.conversations: dict[str, _Conversation] = {}
        self._of_turn: dict[str, _Turn] = {}
        self._transfer: dict[tuple[str, int], tuple[_Conversation, str]] = {}

    def read(self, now_s: float, event: e.Event, decisions: list[d.Decision]) -> None:
        match event:
            case e.TurnArrived():
                conversation = self.conversations.setdefault(event.conversation, _Conversation())
                conversation.ended = False
                turn = self._of_turn.setdefault(event.turn, _Turn(arrived_s=now_s))
                conversation.turns.setdefault(event.turn, turn)
            case e.HandoffFinished():
                self._handed_over(event)
            case e.TurnFinished() if event.turn in self._of_turn:
                self._of_turn[event.turn].finished = event
            case e.ConversationEnded() if event.conversation in self.conversations:
                self.conversations[event.conversation].ended = True
            case _:
                pass
        for decision in decisions:
            self._decided(now_s, decision)

    def _handed_over(self, event: e.HandoffFinished) -> None:
        turn = self._of_turn.get(event.turn)
        if event.fallback is not None and turn is not None:
            turn.fallback = event.fallback.value
        planned = self._transfer.pop((event.turn, event.plan), None)
        if event.fallback is None and planned is not None:
            conversation, reason = planned
            conversation.transfers[reason] = conversation.transfers.get(reason, 0) + 1

    def _decided(self, now_s: float, decision: d.Decision) -> None:
        turn: Any = self._of_turn.get(getattr(decision, "turn", ""))
        if turn is None:
            return
        match decision:
            case d.Place():
                turn.place, turn.reason, turn.fallback = decision, decision.reason.value, None
                turn.index = decision.turn_index
                if decision.transfer is not None:
                    conversation = self.conversations[decision.conversation]
                    planned = (conversation, decision.transfer.value)
                    self._transfer[decision.turn, decision.plan] = planned
            case d.Hold():
                turn.held.append(decision.reason.value)
            case d.Reject():
                turn.reason = decision.reason.value
            case d.CloseTurn():
                if turn.outcome == "running":
                    turn.ended_s = now_s
                turn.outcome = decision.outcome.value
            case _:
                pass
