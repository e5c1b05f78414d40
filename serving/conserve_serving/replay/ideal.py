"""The physical limit: a conversation's latency alone on an idle cluster, at batch 1.

Every path the cluster offers is walked: the engine that holds the conversation, and for turn 1
either the same engine or a prefiller and one hand-off. The path with the least end-to-end latency
is the limit; all of the conversation's normalised figures are ratios to that one path. Tail turns
prefill exactly their new tokens on top of cached KV. Network, gateway and client cost nothing
here, so their time shows as a ratio above 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from conserve_serving.engines.errors import ProfileError
from conserve_serving.engines.profile import HardwareProfile, load_profile
from conserve_serving.engines.steptime import StepTimes
from conserve_serving.replay.cluster import Cluster, hosts
from conserve_serving.replay.conversations import Conversation, Turn


class StepCosts(Protocol):
    """What steps cost on one kind of engine, alone; model seconds and tokens."""

    @property
    def chunk_tokens(self) -> int:
        """Prompt tokens prefilled per step at most."""

    def prefill_s(self, new_tokens: int, prefix_tokens: int) -> float:
        """One step that prefills ``new_tokens`` behind ``prefix_tokens`` of cached KV."""

    def decode_s(self, batch: int, kv_tokens: float) -> float:
        """One decode step of ``batch`` requests that read ``kv_tokens`` of KV together."""

    def handoff_s(self, tokens: int) -> float:
        """KV of ``tokens`` leaving this engine."""

    def ingress_s(self, tokens: int) -> float:
        """KV of ``tokens`` that left another engine reaching this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdealLatency:
    """Latencies of one conversation alone; gaps included, as they are in what is measured.

    ``last_turn_tbt_s`` is None where the last answer is a single token. ``gaps_s`` is the time
    spent waiting for the client, ``first_tokens_s`` that from turns' arrivals to their first
    tokens; what TTFET has beside the two is decode.
    """

    first_turn_ttft_s: float
    ttfet_s: float
    last_turn_tbt_s: float | None
    e2e_s: float
    gaps_s: float
    first_tokens_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """One way through a cluster: ``prefiller`` None when the host prefills turn 1 itself."""

    host: StepCosts
    prefiller: StepCosts | None


class ProfileCosts:
    """Step costs of a hardware profile."""

    def __init__(self, profile: HardwareProfile) -> None:
        self._profile = profile
        self._times = StepTimes(profile)
        self.prefill_s = self._times.prefill_s
        self.decode_s = self._times.decode_s
        self.handoff_s = profile.handoff_s
        self.ingress_s = profile.ingress_s

    @property
    def chunk_tokens(self) -> int:
        """Prompt tokens prefilled per step at most."""
        return self._profile.chunk_tokens


class IdealCluster:
    """The best of a cluster's paths for each conversation.

    Args:
        hosts: kinds of engines that may hold a conversation.
        prefillers: kinds of engines that may prefill its first turn and hand the KV over.

    Raises:
        ValueError: nothing can hold a conversation.
    """

    def __init__(self, *, hosts: Sequence[StepCosts], prefillers: Sequence[StepCosts]) -> None:
        if not hosts:
            raise ValueError("no engine holds conversations: the ideal latency is undefined")
        self._paths = [
            Path(host=host, prefiller=prefiller)
            for host in hosts
            for prefiller in (None, *prefillers)
        ]

    def latency(self, conversation: Conversation) -> IdealLatency:
        """The conversation's latency alone on its best path."""
        return min(
            (walk(conversation, path) for path in self._paths), key=lambda ideal: ideal.e2e_s
        )


def ideal_for(cluster: Cluster | None) -> tuple[IdealCluster | None, str]:
    """The ideal of a described cluster, and what it stands on (or why there is none).

    Only engines with a hardware profile can be computed; one without makes the whole ideal
    unknown, since the best path might be through it.
    """
    if cluster is None or not cluster.engines:
        return None, "none: the server does not describe its engines"
    unknown = [engine.id for engine in cluster.engines if engine.profile is None]
    if unknown:
        return None, f"none: no hardware profile for {', '.join(unknown)}"
    try:
        costs = {
            name: ProfileCosts(load_profile(name))
            for name in {e.profile for e in cluster.engines if e.profile is not None}
        }
    except ProfileError as error:
        return None, f"none: {error}"
    holding = {e.profile for e in hosts(cluster) if e.profile is not None}
    prefilling = {
        e.profile for e in cluster.engines if e.tier == "prefill" and e.profile is not None
    }
    if not holding:
        return None, "none: no engine of the cluster holds conversations"
    ideal = IdealCluster(
        hosts=[costs[name] for name in sorted(holding)],
        prefillers=[costs[name] for name in sorted(prefilling)],
    )
    prefill_text = f", prefilled there or on {', '.join(sorted(prefilling))}" if prefilling else ""
    return (
        ideal,
        f"computed from hardware profiles: held by {', '.join(sorted(holding))}{prefill_text}",
    )


def walk(conversation: Conversation, path: Path) -> IdealLatency:
    """One conversation alone on one path."""
    now = gaps_s = first_token_s = first_turn_ttft_s = first_tokens_s = 0.0
    tbt_s: float | None = None
    for index, turn in enumerate(conversation.turns):
        due = now + turn.gap_s if turn.at_s is None else max(now + turn.gap_s, turn.at_s)
        if index == 0:
            due = 0.0
        gaps_s += due - now
        first_token_s = due + _time_to_first_token_s(turn, path, first=index == 0)
        first_tokens_s += first_token_s - due
        if index == 0:
            first_turn_ttft_s = first_token_s
        decode_s = _decode_s(turn, path.host)
        now = first_token_s + decode_s
        tbt_s = decode_s / (turn.output_tokens - 1) if turn.output_tokens > 1 else None
    return IdealLatency(
        first_turn_ttft_s=first_turn_ttft_s,
        ttfet_s=first_token_s,
        last_turn_tbt_s=tbt_s,
        e2e_s=now,
        gaps_s=gaps_s,
        first_tokens_s=first_tokens_s,
    )


def _time_to_first_token_s(turn: Turn, path: Path, *, first: bool) -> float:
    if not first or path.prefiller is None:
        return _prefill_s(turn.new_input_tokens, turn.kept_tokens, path.host)
    tokens = turn.input_tokens
    prefill_s = _prefill_s(tokens, 0, path.prefiller)
    handoff_s = path.prefiller.handoff_s(tokens) + path.host.ingress_s(tokens)
    # The host computes the prompt's last token again to have something to sample from.
    return prefill_s + handoff_s + _prefill_s(1, tokens - 1, path.host)


def _prefill_s(new_tokens: int, prefix_tokens: int, costs: StepCosts) -> float:
    """Prefill in chunks; at least one token is always computed, to sample the next one."""
    new_tokens = max(1, new_tokens)
    seconds = 0.0
    while new_tokens > 0:
        chunk = min(new_tokens, costs.chunk_tokens)
        seconds += costs.prefill_s(chunk, prefix_tokens)
        prefix_tokens += chunk
        new_tokens -= chunk
    return seconds


def _decode_s(turn: Turn, costs: StepCosts) -> float:
    """Decode steps after the first token: the context grows by one token a step.

    Step times are close to linear in the context, so the steps are integrated over spans of 256
    by their midpoints.
    """
    seconds = 0.0
    done = 0
    steps = turn.output_tokens - 1
    while done < steps:
        span = min(256, steps - done)
        seconds += span * costs.decode_s(1, turn.input_tokens + done + (span + 1) / 2)
        done += span
    return seconds
