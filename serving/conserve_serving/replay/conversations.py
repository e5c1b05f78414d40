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
    """A conversation.

    Attributes:
        id: unique in its trace.
        turns: at least one.
        arrival_s: when it began; None where the trace does not say.
        shared_prefix_tokens: leading tokens of the first prompt that other conversations of the
            same ``shared_prefix_name`` begin with, too (tools, a system prompt).
        shared_prefix_name: which prefix that is; empty where nothing is shared.
        parent: the conversation whose sub-agent this one is; None: nobody's.
        parent_turns: turns of the parent that had begun when this one did.
        offset_s: seconds from the parent's beginning to this one's, as recorded.
    """

    id: str
    turns: tuple[Turn, ...]
    arrival_s: float | None = None
    shared_prefix_tokens: int = 0
    shared_prefix_name: str = ""
    parent: str | None = None
    parent_turns: int = 0
    offset_s: float = 0.0
