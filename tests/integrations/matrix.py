"""What every client of the matrix must show, whoever wrote it: its conversation is served as one.

Loaded by conftest and given to tests as fixtures: test folders are not packages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from conserve_agents import Gateway, wire

#: How far a client's count of the first turn may be from the engine's.
COUNT_TOLERANCE = 0.15


def weather_report(city: str) -> str:
    """Give the weather report of a city.

    Args:
        city: the name of the city
    """
    return f"In {city} it is sunny, 21 degrees."


def hotel_price(city: str) -> str:
    """Give the price of a hotel room in a city.

    Args:
        city: the name of the city
    """
    return f"A hotel room in {city} costs 90 francs."


#: On the emulated engine: a call of one tool, a call of the other, an answer. Three turns.
QUESTION = "What do the weather report and the hotel price say? The city is Bern."
#: Goes on in the same conversation.
FOLLOW_UP = "Thank you. Say in one sentence whether a trip is worth it."


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What was seen of a conversation: on the wire, and by the gateway.

    Attributes:
        turn_ids: one per turn, in the order of their first attempts.
        seen: the gateway's own description.
    """

    id: str
    turn_ids: list[str]
    seen: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run of the matrix: what a client is given, and how its run is judged.

    Attributes:
        proxy: a `RecordingProxy` before the gateway: point the client at its ``base_url``.
        model: the served model's name.
        question: long enough to be worth a hand-off; ends in `QUESTION`.
        tools: two plain functions, with docstrings that every framework can read.
        follow_up: a second question.
    """

    proxy: Any
    gateway: Gateway
    model: str
    question: str
    tools: tuple[Any, ...] = (weather_report, hotel_price)
    follow_up: str = FOLLOW_UP

    @property
    def turns(self) -> int:
        """Turns that went through the proxy so far."""
        return len({call.turn_id for call in self.proxy.calls})

    def served_as_one(self, *, turns: int) -> Served:
        """Assert that all calls that went through the proxy are one well-served conversation.

        One id; turn indexes from 1 on; one tag for all attempts of a turn; the first turn's length
        frozen and right; one transfer, for the first turn; every turn on one decoder.

        Args:
            turns: how many there must be.
        """
        return _served_as_one(self.proxy, self.gateway, turns=turns)


def _served_as_one(proxy: Any, gateway: Gateway, *, turns: int) -> Served:
    calls = proxy.calls
    assert calls, "no model call went through the proxy"
    (conversation,) = {call.conversation for call in calls}
    assert conversation is not None
    by_turn: dict[str, list[Any]] = {}
    for call in calls:
        by_turn.setdefault(call.turn_id, []).append(call)
    assert [attempts[0].turn_index for attempts in by_turn.values()] == list(range(1, turns + 1))
    for attempts in by_turn.values():
        # Refused attempts first, then the one that was answered, all with the same tag.
        assert [a.status == 200 for a in attempts] == [False] * (len(attempts) - 1) + [True]
        for name in (wire.TURN_INDEX, wire.FIRST_TURN_TOKENS, wire.TOKEN_COUNTER, wire.PLACEMENT):
            assert len({a.tag(name) for a in attempts}) == 1
    (first_turn_tokens,) = {int(call.tag(wire.FIRST_TURN_TOKENS)) for call in calls}
    seen = gateway.conversation(conversation)
    while seen["running_turns"]:  # the last answer is out, its turn not booked yet
        seen = gateway.conversation(conversation)
    assert seen["source"] == "conserve"
    assert seen["turns"] == turns
    remembered = list(dict.fromkeys(turn["index"] for turn in seen["recent_turns"]))
    assert remembered == list(range(1, turns + 1))[-len(remembered) :]
    counted = seen["first_turn_tokens"]  # the engine's, once it has counted
    assert abs(first_turn_tokens - counted) <= COUNT_TOLERANCE * counted, (
        first_turn_tokens,
        counted,
    )
    assert (seen["transfers"], seen["transfers_by_reason"]) == (1, {"first_turn": 1})
    assert len({turn["decode_engine"] for turn in seen["recent_turns"]}) == 1
    assert seen["cached_tokens"] > 0
    return Served(id=conversation, turn_ids=list(by_turn), seen=seen)
