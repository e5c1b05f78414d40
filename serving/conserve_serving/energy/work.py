"""What joules are charged to: requests on engines, their turns and conversations. Pure."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

#: An estimate of a prompt's uncached tokens may be short by half, or by this many tokens; counted
#: tokens beyond that are somebody else's.
_SLACK_TOKENS = 256


class Kind(enum.StrEnum):
    """What joules were used for."""

    IDLE = "idle"
    PREFILL = "prefill"
    DECODE = "decode"
    UNATTRIBUTED = "unattributed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What an engine counted in an interval (``/v1/loads``); times in the engine's seconds.

    Attributes:
        prefill_tokens: uncached prompt tokens computed, in ``prefill_s`` seconds.
        decode_steps: decode steps without prefill in them, in ``decode_s`` seconds.
        decode_batch_sum: sum over those steps of the requests in the batch: request-steps.
    """

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_s: float = 0.0
    decode_batch_sum: float = 0.0

    @property
    def busy_s(self) -> float:
        """Seconds spent on steps."""
        return self.prefill_s + self.decode_s

    def __add__(self, other: Steps) -> Steps:
        """Both, one after the other."""
        return Steps(
            prefill_tokens=self.prefill_tokens + other.prefill_tokens,
            prefill_s=self.prefill_s + other.prefill_s,
            decode_steps=self.decode_steps + other.decode_steps,
            decode_s=self.decode_s + other.decode_s,
            decode_batch_sum=self.decode_batch_sum + other.decode_batch_sum,
        )


#: Relative cost of a second of prefill and of decode, given the steps of an interval.
Weights = Callable[[Steps], tuple[float, float]]


def equal_weights(_: Steps) -> tuple[float, float]:
    """A second is a second: where no power model says better."""
    return 1.0, 1.0


class Tally:
    """The joules of a turn, or of all turns of a conversation.

    Attributes:
        prefill_j, decode_j: what it has been charged so far; idle shares are nobody's.
        sources: where the figures come from.
        metered: it ran where joules are known.
        unknown_engines: engines it ran on whose joules are not known.
        pending: requests of it whose last interval is not settled.
    """

    __slots__ = (
        "_whole",
        "decode_j",
        "metered",
        "pending",
        "prefill_j",
        "sources",
        "unknown_engines",
    )

    def __init__(self, whole: Tally | None = None) -> None:
        """Args: the conversation's tally, when this one is a turn's; it is charged as well."""
        self._whole = whole
        self.prefill_j = 0.0
        self.decode_j = 0.0
        self.metered = False
        self.sources: tuple[str, ...] = ()
        self.unknown_engines: tuple[str, ...] = ()
        self.pending = 0

    @property
    def total_j(self) -> float:
        """Prefill and decode."""
        return self.prefill_j + self.decode_j

    def describe(self) -> dict[str, object] | None:
        """As JSON; None before its first request."""
        if not (self.metered or self.unknown_engines):
            return None
        return {
            "total_j": self.total_j if self.metered else None,
            "prefill_j": self.prefill_j if self.metered else None,
            "decode_j": self.decode_j if self.metered else None,
            "source": "; ".join(self.sources) or None,
            "settled": not self.pending,
            "unknown_engines": list(self.unknown_engines),
        }

    def charge(self, kind: Kind, joules: float, source: str) -> None:
        """Add joules of a kind (prefill or decode)."""
        if kind is Kind.PREFILL:
            self.prefill_j += joules
        else:
            self.decode_j += joules
        if source not in self.sources:
            self.sources = (*self.sources, source)
        if self._whole is not None:
            self._whole.charge(kind, joules, source)

    def miss(self, engine: str) -> None:
        """It ran on an engine whose joules are not known."""
        if engine not in self.unknown_engines:
            self.unknown_engines = (*self.unknown_engines, engine)
        if self._whole is not None:
            self._whole.miss(engine)

    def open(self, change: int) -> None:
        """So many more requests of it are not settled."""
        self.metered = True
        self.pending += change
        if self._whole is not None:
            self._whole.open(change)


class Work:
    """One request on one engine, from the moment it was sent there.

    Attributes:
        begin_s: when it was sent.
        prefilled_s: when its first token came (or its prompt was computed), as far as known.
        end_s: when its last byte came; None while it runs.
        prefill_tokens: uncached prompt tokens, estimated until ``facts``.
        output_tokens: what it generated; None until ``facts``.
        decodes, streams: it generates tokens; its first one is seen when it comes.
        prefill_paid, claimed_steps: what it has been charged for.
    """

    __slots__ = (
        "_exact",
        "begin_s",
        "claimed_steps",
        "decodes",
        "end_s",
        "output_tokens",
        "prefill_paid",
        "prefill_tokens",
        "prefilled_s",
        "streams",
        "tally",
    )

    def __init__(
        self, tally: Tally, *, begin_s: float, prefill_tokens: int, decodes: bool, streams: bool
    ) -> None:
        """Record a request.

        Args:
            tally: charged for it.
            begin_s: when it was sent.
            prefill_tokens: uncached prompt tokens, as well as they are known.
            decodes: it generates tokens, or only prefills.
            streams: its first token will be seen (``first_token``).
        """
        self.tally = tally
        self.begin_s = begin_s
        self.prefilled_s: float | None = None
        self.end_s: float | None = None
        self.prefill_tokens = max(1, prefill_tokens)  # engines compute one token at least
        self.output_tokens: int | None = None
        self.decodes = decodes
        self.streams = streams
        self.prefill_paid = False
        self.claimed_steps = 0.0
        self._exact = False

    def first_token(self, now_s: float) -> None:
        """Its first token has come: its prompt is computed."""
        if self.prefilled_s is None:
            self.prefilled_s = now_s

    def facts(self, *, prefill_tokens: int, output_tokens: int) -> None:
        """The engine's own counts of it."""
        self.prefill_tokens = max(1, prefill_tokens)
        self.output_tokens = output_tokens
        self._exact = True

    def end(self, now_s: float) -> None:
        """It is over, however."""
        if self.end_s is None:
            self.end_s = now_s
            if self._exact and not self.decodes:
                self.first_token(now_s)

    @property
    def limit_tokens(self) -> float:
        """The most uncached tokens it may turn out to have had."""
        if self._exact:
            return self.prefill_tokens
        return max(2.0 * self.prefill_tokens, self.prefill_tokens + _SLACK_TOKENS)

    def prefilled_by(self, at_s: float) -> bool:
        """Whether its prompt was computed by then."""
        return self.prefilled_s is not None and self.prefilled_s <= at_s

    def ended_by(self, at_s: float) -> bool:
        """Whether it was over by then."""
        return self.end_s is not None and self.end_s <= at_s
