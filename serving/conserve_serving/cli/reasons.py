"""What every reason of the scheduler means, in plain words: one sentence for each, here only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

from conserve_serving.core.types import Fallback, Outcome, Reason, TransferReason

REASONS: Mapping[Reason, str] = MappingProxyType(
    {
        Reason.FIRST_TURN_HANDOFF: "first turn: prefilled on the prefiller with the least work"
        " waiting, then its KV was handed over to the decoder that keeps the conversation",
        Reason.FIRST_TURN_SHORT: "first turn: prefilled on its own decoder, because that cost"
        " less than a hand-off would have",
        Reason.FIRST_TURN_NO_PREFILLER: "first turn: prefilled on its own decoder, because no"
        " prefiller was up",
        Reason.FIRST_TURN_COLLOCATED: "first turn: prefilled on the engine that keeps the"
        " conversation, because this policy never hands KV over",
        Reason.FIRST_TURN_DEFLECTED: "first turn: prefilled on its own decoder, because that was"
        " done sooner than the prefillers' queue and a hand-off would have been",
        Reason.PINNED: "later turn: ran where the conversation's KV is, and only the appended"
        " tokens were prefilled",
        Reason.APPEND_REMOTE: "later turn: what it appended was prefilled on a prefiller and handed"
        " to the decoder that keeps the conversation",
        Reason.MOVED_FOR_LOAD: "later turn: the conversation's KV was copied to a less loaded"
        " engine, where it lives from then on",
        Reason.ROUND_ROBIN: "the next engine in turn, because this policy looks at nothing else",
        Reason.REPLACED_ENGINE_LOST: "placed anew with the full history, because its engine was"
        " lost and the KV with it",
        Reason.REPLACED_ENGINE_DRAINING: "placed anew, because its engine is draining and takes"
        " no further turns",
        Reason.REPLACED_NO_ROOM: "placed anew, because its engine had no room left for the turn",
        Reason.REPLACED_KV_LOST: "placed anew, because its KV was no longer on its engine",
        Reason.RETRIED: "placed again, because the attempt before failed and nothing of it had"
        " reached the client",
        Reason.HELD_NO_ROOM: "held: no decoder had room for its KV",
        Reason.HELD_BEHIND_FIRST_TURN: "held: another turn of it was bringing the"
        " conversation's KV to its engine",
        Reason.HELD_NO_ENGINE: "held: no engine that could take it was up",
        Reason.PROMPT_TOO_LONG: "refused: longer than any decoder can hold",
        Reason.QUEUE_FULL: "refused: as many turns were waiting as the settings allow",
        Reason.HELD_TOO_LONG: "refused: held for as long as the settings allow",
        Reason.NO_ENGINE: "refused: no engine that could take it was up",
        Reason.CONVERSATION_ENDED: "KV freed: the conversation ended",
        Reason.CONVERSATION_EXPIRED: "KV freed: the conversation had no turn for longer than the"
        " settings allow",
        Reason.CONVERSATION_MOVED: "KV freed: the conversation lives on another engine now",
        Reason.IDLE_DISPLACED: "KV freed: the conversation had been idle for longer than it is"
        " protected, and the room was needed",
        Reason.PARKED_FOR_ROOM: "KV parked in host memory: the conversation was the longest idle"
        " and the room was needed",
    }
)

TRANSFERS: Mapping[TransferReason, str] = MappingProxyType(
    {
        TransferReason.FIRST_TURN: "the one hand-off after the first turn's prefill",
        TransferReason.APPEND: "what a later turn appended was prefilled on a prefiller",
        TransferReason.LOAD: "the conversation moved to a less loaded engine",
        TransferReason.ENGINE_LOST: "the conversation's engine was lost",
        TransferReason.ENGINE_DRAINING: "the conversation's engine was draining",
        TransferReason.NO_ROOM: "the conversation's engine had no room left",
        TransferReason.KV_LOST: "the conversation's KV was no longer on its engine",
        TransferReason.RETRY: "the attempt before failed",
    }
)

FALLBACKS: Mapping[Fallback, str] = MappingProxyType(
    {
        Fallback.PREFILLER_FAILED: "the prefiller answered with an error, so the decoder"
        " prefilled by itself",
        Fallback.PREFILLER_LOST: "the prefiller was lost, so the decoder prefilled by itself",
        Fallback.SOURCE_LOST: "the engine that had the conversation's KV was lost, so the new one"
        " prefilled all of it",
        Fallback.ACK_LATE: "the acknowledgement of the stored KV came too late, so the decoder"
        " prefilled what it did not find",
        Fallback.STORE_FULL: "the hand-off store had no room, so the decoder prefilled by itself",
        Fallback.PARTIAL_PAGES: "only a part of the KV was stored, so the decoder prefilled the"
        " rest",
        Fallback.TOKENIZE_FAILED: "the prompt could not be tokenized beforehand, so the decoder"
        " prefilled by itself",
        Fallback.NOT_ONLY_TOKENS: "the prompt is more than its token ids (pictures, an adapter, a"
        " salted cache), so the decoder prefilled by itself",
    }
)

OUTCOMES: Mapping[Outcome, str] = MappingProxyType(
    {
        Outcome.FINISHED: "answered in full",
        Outcome.REJECTED: "refused before it ran",
        Outcome.ABORTED: "the client left before the answer was complete",
        Outcome.FAILED: "broke and could not be tried again",
    }
)


def say_reason(value: str) -> str:
    """The sentence for a reason as the gateway spells it; an unknown one is shown as it is."""
    return _say(value, Reason, REASONS)


def say_transfer(value: str) -> str:
    """The same for the reason of a transfer."""
    return _say(value, TransferReason, TRANSFERS)


def say_fallback(value: str) -> str:
    """The same for the reason why a hand-off did not happen."""
    return _say(value, Fallback, FALLBACKS)


def say_outcome(value: str) -> str:
    """The same for how a turn ended; ``running`` has not ended yet."""
    return "still running" if value == "running" else _say(value, Outcome, OUTCOMES)


_Name = TypeVar("_Name", Reason, TransferReason, Fallback, Outcome)


def _say(value: str, names: type[_Name], sentences: Mapping[_Name, str]) -> str:
    try:
        return sentences[names(value)]
    except ValueError:
        return f"for a reason this version does not know ({value})"
