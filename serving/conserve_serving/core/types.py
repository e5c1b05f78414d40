"""Names and enumerations the scheduler speaks in.

Every reason, outcome and kind of transfer the product counts is listed here once; their values
are metric labels and appear in ``conserve explain``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NewType

ConversationId = NewType("ConversationId", str)
TurnId = NewType("TurnId", str)
EngineId = NewType("EngineId", str)


class Tier(enum.StrEnum):
    """What an engine was bought for; the tier mode says whether the prefill tier also hosts."""

    PREFILL = "prefill"
    DECODE = "decode"


class TierMode(enum.StrEnum):
    """``dedicated``: the prefill tier only prefills. ``hosting``: it holds conversations too.

    ``auto``: whichever carries more, by what has been observed; for policies that can tell, for
    others the same as ``dedicated``.
    """

    DEDICATED = "dedicated"
    HOSTING = "hosting"
    AUTO = "auto"


class Reason(enum.StrEnum):
    """Why a turn was placed, held or refused, or why KV was released or parked."""

    # placements
    FIRST_TURN_HANDOFF = "first_turn_handoff"
    FIRST_TURN_SHORT = "first_turn_short"
    FIRST_TURN_NO_PREFILLER = "first_turn_no_prefiller"
    FIRST_TURN_COLLOCATED = "first_turn_collocated"
    FIRST_TURN_DEFLECTED = "first_turn_deflected"
    PINNED = "pinned"
    APPEND_REMOTE = "append_remote"
    MOVED_FOR_LOAD = "moved_for_load"
    ROUND_ROBIN = "round_robin"
    REPLACED_ENGINE_LOST = "replaced_engine_lost"
    REPLACED_ENGINE_DRAINING = "replaced_engine_draining"
    REPLACED_NO_ROOM = "replaced_no_room"
    REPLACED_KV_LOST = "replaced_kv_lost"
    RETRIED = "retried"
    # holds
    HELD_NO_ROOM = "held_no_room"
    HELD_BEHIND_FIRST_TURN = "held_behind_first_turn"
    HELD_NO_ENGINE = "held_no_engine"
    # refusals
    PROMPT_TOO_LONG = "prompt_too_long"
    QUEUE_FULL = "queue_full"
    HELD_TOO_LONG = "held_too_long"
    NO_ENGINE = "no_engine"
    # releases and parking
    CONVERSATION_ENDED = "conversation_ended"
    CONVERSATION_EXPIRED = "conversation_expired"
    CONVERSATION_MOVED = "conversation_moved"
    PARKED_FOR_ROOM = "parked_for_room"
    IDLE_DISPLACED = "idle_displaced"


class TransferReason(enum.StrEnum):
    """Why a conversation's KV crossed a link. The first is the rule, the others are counted."""

    FIRST_TURN = "first_turn"
    APPEND = "append"
    LOAD = "load"
    ENGINE_LOST = "engine_lost"
    ENGINE_DRAINING = "engine_draining"
    NO_ROOM = "no_room"
    KV_LOST = "kv_lost"
    RETRY = "retry"


class Fallback(enum.StrEnum):
    """Why a planned hand-off did not happen and the decoder prefilled by itself."""

    PREFILLER_FAILED = "prefiller_failed"
    PREFILLER_LOST = "prefiller_lost"
    SOURCE_LOST = "source_lost"
    ACK_LATE = "ack_late"
    STORE_FULL = "store_full"
    PARTIAL_PAGES = "partial_pages"
    TOKENIZE_FAILED = "tokenize_failed"
    NOT_ONLY_TOKENS = "not_only_tokens"


class Outcome(enum.StrEnum):
    """How a turn ended. Every turn that arrived ends exactly once, in exactly one of these."""

    FINISHED = "finished"
    REJECTED = "rejected"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpeeds:
    """What an engine is known to cost before it has reported anything (its profile, or a guess).

    Attributes:
        prefill_tokens_per_s: uncached prompt tokens computed per second of prefill.
        decode_step_s: one decode step at an almost empty batch.
        decode_step_s_per_kv_token: growth of a decode step per KV token read in it.
        mixed_slowdown: decode step time with prefill in the same step over the sum of its parts
            (1.0: no interference).
    """

    prefill_tokens_per_s: float
    decode_step_s: float
    decode_step_s_per_kv_token: float = 0.0
    mixed_slowdown: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Cost of one KV transfer: ``setup_s + bytes / bytes_per_s``."""

    setup_s: float
    bytes_per_s: float
    kv_bytes_per_token: int
