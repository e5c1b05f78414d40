"""What a run leaves behind: one record per turn and conversation, and samples of the engines.

All times are model seconds since the run's start: wall seconds × speed.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from conserve_serving.replay.cluster import Cluster
from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.replay.workload import Arrivals, Workload


@dataclass(slots=True, kw_only=True)
class TurnRecord:
    """One turn as the client saw it; fields that never became known stay None.

    Attributes:
        index: 1 for the conversation's first turn.
        due_s: when it should have been sent (a late client counts against the latency).
        sent_s: when the attempt that was answered was sent.
        first_token_s, last_token_s: when its tokens came.
        prompt_tokens, output_tokens, cached_tokens: the engine's counts.
        transfers: KV transfers of the conversation so far, this turn's included.
        retries: kinds of the attempts that failed before the last one.
        error: kind of what finally went wrong, None when nothing did; a
            ``token_count_mismatch`` was answered all the same.
        output_ids: where the answer's token ids came from: ``reply``, ``tokenize`` or
            ``made up`` (an engine that tells neither).
        token_times_s, token_counts: times of the events with tokens (last turns only).
    """

    index: int
    turn: Turn
    due_s: float
    sent_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    decode_engine: str | None = None
    prefill_engine: str | None = None
    transfers: int | None = None
    reason: str | None = None
    overhead_ms: float | None = None
    output_ids: str | None = None
    retries: list[str] = field(default_factory=list)
    error: str | None = None
    error_message: str | None = None
    token_times_s: array[float] | None = None
    token_counts: array[int] | None = None

    @property
    def answered(self) -> bool:
        """Whether an answer came, whole."""
        return self.last_token_s is not None


@dataclass(slots=True, kw_only=True)
class ConversationRecord:
    """One conversation as it went."""

    conversation: Conversation
    arrival_s: float
    turns: list[TurnRecord] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every turn of the (capped) trace was answered."""
        return len(self.turns) == len(self.conversation.turns) and all(
            turn.answered for turn in self.turns
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSample:
    """The cluster at one moment of the run."""

    at_s: float
    cluster: Cluster


@dataclass(slots=True, kw_only=True)
class RunResult:
    """Everything a replay measured.

    Attributes:
        arrivals: how conversations arrived; ``rate_per_s`` is None for recorded arrivals.
        speed: model seconds per wall second.
        samples: the cluster over time, first and last reading included; empty where the server
            does not describe one.
        wall_s: from the first arrival to the last answer, in wall seconds.
        interrupted: the run was stopped before its end.
        waits_for_socket: turns that found all client connections taken.
    """

    workload: Workload
    seed: int
    arrivals: Arrivals
    rate_per_s: float | None
    speed: float
    gateway_url: str
    model: str
    connections: int
    conversations: list[ConversationRecord]
    samples: list[ClusterSample]
    wall_s: float
    interrupted: bool = False
    waits_for_socket: int = 0
    end_failures: int = 0
