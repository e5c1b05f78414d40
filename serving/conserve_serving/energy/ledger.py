"""The ledger of one engine's joules: what ran in an interval pays for it. Pure, time an argument.

What an engine used between two readings of its counters is idle, active, or cannot be attributed.
Active joules are split between prefill and decode by the time the engine says it spent on each,
and within each over the requests that were there: prefill by uncached prompt tokens, decode by
the steps each request took part in. What no request of ours accounts for stays unattributed, so
that nothing is lost and nothing made: ``total = idle + prefill + decode + unattributed + pending``.

A settled interval is never opened again. What becomes known later (the counts at a request's end)
is used in the interval in which it becomes known. The whole rule: docs/energy.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from conserve_serving.energy.errors import InvariantError
from conserve_serving.energy.work import Kind, Steps, Weights, Work, equal_weights

_TOLERANCE = 1e-9


class Account:
    """The joules of one engine.

    Args:
        opened_s: from when on it counts.

    Attributes:
        weights: relative cost of prefill and decode seconds.
        total_j: everything that came in.
    """

    def __init__(self, *, opened_s: float) -> None:
        self.weights: Weights = equal_weights
        self.total_j = 0.0
        self._by_kind: dict[tuple[Kind, str], float] = {}
        self._works: dict[Work, None] = {}  # in order of arrival
        self._settled_s = opened_s
        #: Active joules whose steps have not been counted yet, over so many seconds.
        self._carry_j = 0.0
        self._carry_s = 0.0
        #: Joules and tokens of prompts that are not computed to their end.
        self._prompt_j = 0.0
        self._prompt_tokens = 0.0
        self._source = ""

    # --- what runs ---------------------------------------------------------------------------
    def begin(self, work: Work) -> None:
        """A request was sent to the engine."""
        self._works[work] = None
        work.tally.open(1)

    @property
    def quiet(self) -> bool:
        """No request was there since the last settlement, and nothing is left of earlier ones."""
        return not self._works and not self.pending_j

    @property
    def pending_j(self) -> float:
        """Joules of steps that are not counted yet, and of prompts that are not computed yet."""
        return self._carry_j + self._prompt_j

    def abandon(self, at_s: float) -> None:
        """The engine is gone: what was pending will never be explained."""
        self._give_up()
        for work in list(self._works):
            self._close(work)
        self._settled_s = at_s

    # --- settling ----------------------------------------------------------------------------
    def settle(
        self,
        at_s: float,
        *,
        idle_j: float,
        active_j: float,
        lost_j: float,
        steps: Steps,
        source: str,
        by_the_clock: bool,
    ) -> None:
        """Close the interval since the last settlement.

        Args:
            at_s: its end: when the engine's counters were asked for.
            idle_j: what the engine draws with nothing running.
            active_j: what it used beyond that.
            lost_j: what cannot be attributed, for instance of a time nobody watched.
            steps: what the engine counted meanwhile.
            source: where the joules come from.
            by_the_clock: they are what was drawn until ``at_s``, also for a step that had not
                ended by then (boards); otherwise those of the counted steps (models).
        """
        self.total_j += idle_j + active_j + lost_j
        self._book(Kind.IDLE, idle_j, source)
        self._book(Kind.UNATTRIBUTED, lost_j, source)
        if source != self._source:
            self._give_up()
            self._source = source
        since_s, self._settled_s = self._settled_s, max(at_s, self._settled_s)
        pool_j = self._carry_j + active_j
        pool_s = self._carry_s + max(0.0, at_s - since_s)
        share = self._explained(steps, at_s, pool_s if by_the_clock else 0.0)
        explained_j = pool_j * share
        self._carry_j, self._carry_s = pool_j - explained_j, pool_s * (1.0 - share)
        prefill_w, decode_w = self.weights(steps)
        prefill_part = prefill_w * steps.prefill_s
        whole = prefill_part + decode_w * steps.decode_s
        prefill_j = min(explained_j, explained_j * prefill_part / whole) if whole else 0.0
        decode_j = explained_j - prefill_j if whole else 0.0
        rest_j = explained_j - prefill_j - decode_j
        self._prompt_j += prefill_j
        self._prompt_tokens += steps.prefill_tokens
        rest_j += self._settle_prefill(steps, since_s, at_s)
        counted, claims = self._decode_claims(steps, since_s, at_s)
        rest_j += decode_j - self._pay(Kind.DECODE, decode_j, counted, claims)
        self._book(Kind.UNATTRIBUTED, rest_j, source)
        for work in [w for w in self._works if w.ended_by(at_s)]:
            self._close(work)

    def _explained(self, steps: Steps, at_s: float, pool_s: float) -> float:
        """The share of the pooled joules that the counted steps account for.

        A step is counted when it ends: while a prompt is being computed, joules of a step that
        is under way wait for it. That step began when its prompt was there, at the earliest.
        """
        running = [w for w in self._works if not w.ended_by(at_s)]
        if not running:
            return 1.0
        if not steps.busy_s:
            return 0.0
        since_s = min((w.begin_s for w in running if not w.prefilled_by(at_s)), default=at_s)
        under_way_s = max(0.0, min(at_s - since_s, pool_s - steps.busy_s))
        return steps.busy_s / (steps.busy_s + under_way_s)

    def _settle_prefill(self, steps: Steps, since_s: float, at_s: float) -> float:
        """Charge the prompts that are computed; returns what nobody can have caused.

        Joules and tokens of prompts under way are kept together until one of them is computed,
        whatever order the engine takes them in; then it pays for its tokens.
        """
        here = [w for w in self._works if w.begin_s <= at_s and not w.prefill_paid]
        self._infer_prefilled(here, steps, since_s, at_s)
        done = [w for w in here if w.prefilled_by(at_s) or w.ended_by(at_s)]
        under_way = [w for w in here if not (w.prefilled_by(at_s) or w.ended_by(at_s))]
        claims = {w: float(w.prefill_tokens) for w in done if w.prefilled_by(at_s)}
        # What prompts under way cannot account for: those that are done were estimated too short.
        spare = self._prompt_tokens - math.fsum(claims.values())
        spare -= math.fsum(w.limit_tokens for w in under_way)
        for work in done:
            work.prefill_paid = True
            more = min(spare, work.limit_tokens - claims.get(work, 0.0))
            if more > 0:
                claims[work] = claims.get(work, 0.0) + more
                spare -= more
        self._prompt_j -= self._pay(Kind.PREFILL, self._prompt_j, self._prompt_tokens, claims)
        self._prompt_tokens -= min(math.fsum(claims.values()), self._prompt_tokens)
        lost = max(0.0, spare) / self._prompt_tokens if self._prompt_tokens > 0 else 0.0
        lost = min(1.0, lost) if under_way else 1.0
        lost_j = self._prompt_j * lost
        self._prompt_j -= lost_j
        self._prompt_tokens *= 1.0 - lost
        return lost_j

    def _infer_prefilled(self, here: list[Work], steps: Steps, since_s: float, at_s: float) -> None:
        """When prompts were computed whose first token is not seen: once they are counted."""
        spare = self._prompt_tokens - sum(w.prefill_tokens for w in here if w.prefilled_by(at_s))
        counted = float(steps.prefill_tokens)
        for work in here:
            if work.prefilled_s is not None or work.streams or not work.decodes:
                continue
            if work.ended_by(at_s) or (counted and spare >= work.prefill_tokens):
                spare -= work.prefill_tokens
                share = min(1.0, max(0.0, 1.0 - spare / counted)) if counted else 0.0
                computed_s = max(work.begin_s, since_s) + steps.prefill_s * share
                work.first_token(min(computed_s, work.end_s or at_s, at_s))
            elif not counted and steps.decode_steps and work.begin_s < since_s:
                # Engines prefill before they decode: who is still there has been prefilled.
                work.first_token(since_s)

    def _decode_claims(
        self, steps: Steps, since_s: float, at_s: float
    ) -> tuple[float, dict[Work, float]]:
        """Request-steps counted, and who took part in them: who was there while they ran."""
        claims: dict[Work, float] = {}
        # A step is counted whole when it ends: they may take longer than the interval.
        decoding_s = min(steps.decode_s, at_s - since_s)
        if not steps.decode_steps or decoding_s <= 0:
            return 0.0, claims
        per_s = steps.decode_steps / decoding_s
        for work in self._works:
            if not work.decodes or work.prefilled_s is None:
                continue
            until_s = at_s if work.end_s is None else min(work.end_s, at_s)
            there_s = until_s - max(work.prefilled_s, since_s)
            if there_s <= 0:
                continue
            claim = min(float(steps.decode_steps), there_s * per_s)
            if work.output_tokens is not None:
                claim = min(claim, max(0.0, work.output_tokens - work.claimed_steps))
            if claim:
                claims[work] = claim
                work.claimed_steps += claim
        return max(steps.decode_batch_sum, float(steps.decode_steps)), claims

    # --- booking -----------------------------------------------------------------------------
    def _pay(self, kind: Kind, joules: float, counted: float, claims: dict[Work, float]) -> float:
        """Charge the claims their share of ``joules``; returns what was charged."""
        claimed = math.fsum(claims.values())
        if not joules or not claimed:
            return 0.0
        per_unit_j = joules / max(counted, claimed)
        charged_j = []
        for work, claim in claims.items():
            work.tally.charge(kind, per_unit_j * claim, self._source)
            charged_j.append(per_unit_j * claim)
        paid_j = joules if claimed >= counted else min(joules, math.fsum(charged_j))
        self._book(kind, paid_j, self._source)
        return paid_j

    def _book(self, kind: Kind, joules: float, source: str) -> None:
        if joules:
            key = (kind, source)
            self._by_kind[key] = self._by_kind.get(key, 0.0) + joules

    def _give_up(self) -> None:
        self._book(Kind.UNATTRIBUTED, self.pending_j, self._source)
        self._carry_j = self._carry_s = self._prompt_j = self._prompt_tokens = 0.0

    def _close(self, work: Work) -> None:
        del self._works[work]
        work.tally.open(-1)

    # --- looking -----------------------------------------------------------------------------
    def joules(self, kind: Kind) -> float:
        """Joules of one kind so far, of every source."""
        return math.fsum(j for (k, _), j in self._by_kind.items() if k is kind)

    def booked(self) -> Iterator[tuple[Kind, str, float]]:
        """Every kind and source, with its joules."""
        for (kind, source), joules in self._by_kind.items():
            yield kind, source, joules

    def check_invariants(self) -> None:
        """Whether every joule is somewhere.

        Raises:
            InvariantError: it is not.
        """
        parts = [*self._by_kind.values(), self._carry_j, self._prompt_j]
        if abs(math.fsum(parts) - self.total_j) > _TOLERANCE * max(1.0, self.total_j):
            raise InvariantError(f"{self.total_j} J came in, {math.fsum(parts)} J are accounted")
        if min(parts, default=0.0) < -_TOLERANCE * max(1.0, self.total_j):
            raise InvariantError(f"negative joules: {self._by_kind}, pending {self.pending_j}")
