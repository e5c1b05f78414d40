"""Whether the books add up: what every engine says, and that it is the sum of its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from conserve_serving.core.errors import InvariantError
from conserve_serving.core.state import ConversationState, EngineState, Phase, TurnState
from conserve_serving.core.types import ConversationId


def check(engine: EngineState) -> None:
    """Raise ``InvariantError`` unless the engine's books add up. Walks over no conversations."""
    amounts = (
        engine.resident_tokens,
        engine.reserved_tokens,
        engine.parked_tokens,
        engine.idle_tokens,
        engine.active_tokens,
        engine.active_turns,
        engine.prefill_backlog_tokens,
        engine.tail_backlog_tokens,
        engine.egress_tokens,
        engine.foreseen_tokens,
        *engine.ages,
    )
    if min(amounts) < 0:
        raise InvariantError(f"engine {engine.id}: a negative amount in {amounts}")
    if engine.held_tokens > engine.capacity_tokens:
        raise InvariantError(
            f"engine {engine.id}: holds {engine.held_tokens} of {engine.capacity_tokens} tokens"
        )
    if engine.parked_tokens > engine.host_capacity_tokens:
        raise InvariantError(f"engine {engine.id}: parks more than its host tier has")
    if engine.idle_tokens > engine.resident_tokens:
        raise InvariantError(f"engine {engine.id}: more idle than resident")
    if not engine.turns and (
        engine.reserved_tokens or engine.active_turns or engine.prefill_backlog_tokens
    ):
        raise InvariantError(f"engine {engine.id}: something is booked for no turn")


def recount(
    engines: Iterable[EngineState],
    conversations: Iterable[ConversationState],
    turns: Iterable[TurnState],
) -> None:
    """Raise ``InvariantError`` unless every total equals the sum of its parts."""
    counted: Counter[tuple[str, int]] = Counter()
    live: Counter[ConversationId] = Counter()
    for conversation in conversations:
        home = id(conversation.home)
        counted["resident", home] += conversation.resident
        counted["parked", home] += conversation.parked
        counted["parked conversations", home] += conversation.parked > 0
        counted["conversations", home] += 1
        counted["foreseen", home] += conversation.foreseen
        if conversation.active == 0:
            counted["idle", home] += conversation.resident
        if conversation.resident and conversation.parked:
            raise InvariantError(f"conversation {conversation.id} is resident and parked")
    for turn in turns:
        decoder, prefiller, source = id(turn.decoder), id(turn.prefiller), id(turn.source)
        live[turn.conversation.id] += 1
        counted["reserved", decoder] += turn.reserved
        counted["active", decoder] += turn.context if turn.decoder is not None else 0
        counted["reserved", prefiller] += turn.prefill_reserved
        counted["handing over", prefiller] += turn.prefill_reserved
        counted["egress", prefiller] += turn.leaving
        counted["reserved", source] += turn.source_reserved
        counted["parked", source] += turn.source_parked
        counted["parked conversations", source] += turn.source_parked > 0
        where = prefiller if turn.phase is Phase.PREFILL else decoder
        counted["backlog", where] += turn.backlog
        counted["tail backlog", where] += turn.backlog if turn.index > 1 else 0
        for place in {decoder, prefiller, source}:
            counted["turns", place] += 1
        if (turn.phase is Phase.WAITING) != (turn.decoder is None):
            raise InvariantError(f"turn {turn.id} is {turn.phase.value} on {turn.decoder}")
    for engine in engines:
        booked = {
            "resident": engine.resident_tokens,
            "parked": engine.parked_tokens,
            "parked conversations": engine.parked_conversations,
            "conversations": engine.conversations,
            "foreseen": engine.foreseen_tokens,
            "idle": engine.idle_tokens,
            "reserved": engine.reserved_tokens,
            "active": engine.active_tokens,
            "handing over": engine.handing_over_tokens,
            "egress": engine.egress_tokens,
            "backlog": engine.prefill_backlog_tokens,
            "tail backlog": engine.tail_backlog_tokens,
            "turns": len(engine.turns),
        }
        for what, amount in booked.items():
            if amount != counted[what, id(engine)]:
                number = counted[what, id(engine)]
                raise InvariantError(
                    f"engine {engine.id}: {what} booked {amount}, counted {number}"
                )
    for conversation_id, number in live.items():
        if number < 0:
            raise InvariantError(f"conversation {conversation_id} has {number} live turns")
