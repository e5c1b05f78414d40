"""What a trace is made of: conversations of turns, in token counts.

A turn's history really extends the previous turn's: its prompt is the first ``kept_tokens`` of the
previous context (that turn's prompt and answer) followed by ``new_input_tokens`` new tokens. A
compaction or a reset keeps less than the whole context, and drops its tail.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn, in tokens of whichever model answers.

    Attributes:
        input_tokens: the whole prompt.
        new_input_tokens: prompt tokens that are not in the previous turn's context.
        output_tokens: length of the answer.
        gap_s: delay on the client's side between the previous answer and this turn; 0 where
            unknown.
        at_s: earliest time of this turn since its conversation's arrival, for traces that
            recorded when requests were sent; None: the gap alone decides.
    """

    input_tokens: int
    new_input_tokens: int
    output_tokens: int
    gap_s: float = 0.0
    at_s: float | None = None

    @property
    def kept_tokens(self) -> int:
        """Leading tokens of the previous context that this prompt starts with."""
        return self.input_tokens - self.new_input_tokens

    @property
    def context_tokens(self) -> int:
        """Prompt and answer together."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A conversation; ``arrival_s`` is None where the trace does not say."""

    id: str
    turns: tuple[Turn, ...]
    arrival_s: float | None = None
