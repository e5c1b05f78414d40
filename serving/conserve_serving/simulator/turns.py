"""Conversations and turns under way: what their prompts contain, and what is known of them.

A conversation is one stream of content: its context is the stream's beginning, and a prompt that
extends the context goes on in the same stream. Only where a prompt keeps less than the whole
context (a rewritten history) does another stream begin. A prompt of any length is a run or two.
"""

from __future__ import annotations

from conserve_serving.core.decisions import Place
from conserve_serving.core.types import EngineId, TurnId
from conserve_serving.engines.content import Run, StreamPrompt
from conserve_serving.simulator.conversation import (
    SimulatedConversation,
    SimulatedTurn,
    TurnResult,
)
from conserve_serving.simulator.errors import SimulationError


class Conversation:
    """A conversation under way.

    Attributes:
        next: index of the next turn.
        context: content of prompt and output of the turn before.
        tokens: its length.
    """

    __slots__ = ("context", "next", "spec", "tokens")

    def __init__(self, spec: SimulatedConversation) -> None:
        """Raises SimulationError for counts that no conversation can have, naming the field."""
        self.spec = spec
        self.next = 0
        self.tokens = 0
        self.context: list[Run] = []
        if not spec.turns:
            raise SimulationError(f"conversation {spec.id}: turns is empty: give it at least one")
        name, shared = spec.shared_prefix or ("", 0)
        if shared:
            first = spec.turns[0].prompt_tokens
            if not 0 < shared <= first:
                raise SimulationError(
                    f"conversation {spec.id}: shared_prefix has {shared} tokens: its first prompt "
                    f"has {first}"
                )
            self.context = [(("shared", name), 0, shared)]
            self.tokens = shared

    @property
    def over(self) -> bool:
        """Whether every turn has been sent."""
        return self.next >= len(self.spec.turns)


class Turn:
    """A turn that has arrived and is not over.

    Attributes:
        id: as the scheduler knows it; a refused turn that is sent again has another.
        kept: leading prompt tokens that are the context of the turn before.
        rewritten: whether there was more of it than that.
        prompt, context: content of the prompt, and of prompt and output.
        place: the newest plan; None while it waits.
        rids: requests that run for that plan, with the engine of each.
        stored: leading prompt tokens that its decoder can read from the store.
        submitted_s: when the request that computes the prompt was sent to its engine.
        over: whether it has been closed.
    """

    __slots__ = (
        "context",
        "conversation",
        "id",
        "kept",
        "over",
        "place",
        "prompt",
        "result",
        "retry_after_s",
        "rewritten",
        "rids",
        "stored",
        "submitted_s",
        "wanted",
    )

    def __init__(self, conversation: Conversation, page_tokens: int, now_s: float) -> None:
        """The conversation's next turn arrives."""
        spec, index = conversation.spec, conversation.next
        self.conversation = conversation
        self.wanted = wanted = spec.turns[index]
        number = index + 1
        self.id = TurnId(f"{spec.id}#{number}")
        self.kept, self.rewritten = _kept(conversation, wanted)
        runs = conversation.context
        if self.rewritten:
            runs = _cut(runs, self.kept)
            stream: tuple[str, int] = (spec.id, index)
        else:
            stream = (spec.id, 0) if not runs else _stream(runs, spec.id)
        self.prompt = _extended(runs, stream, self.kept, wanted.prompt_tokens, page_tokens)
        whole = wanted.prompt_tokens + wanted.output_tokens
        self.context = _extended(runs, stream, self.kept, whole, page_tokens)
        conversation.next = number
        conversation.context = list(self.context.runs)
        conversation.tokens = whole
        if index == 0:
            self.kept = 0  # a shared prefix is nothing that the conversation itself had
        self.result = TurnResult(
            conversation=spec.id,
            index=number,
            arrived_s=now_s,
            prompt_tokens=wanted.prompt_tokens,
            new_tokens=wanted.new_tokens,
        )
        self.place: Place | None = None
        self.rids: dict[str, EngineId] = {}
        self.stored = 0
        self.submitted_s = now_s
        self.over = False
        self.retry_after_s: float | None = None

    def sent_again(self) -> None:
        """It was refused: it is sent again, under another name."""
        self.result.refusals += 1
        spec = self.conversation.spec
        self.id = TurnId(f"{spec.id}#{self.result.index}r{self.result.refusals}")
        self.place = None
        self.retry_after_s = None


def _kept(conversation: Conversation, wanted: SimulatedTurn) -> tuple[int, bool]:
    """How much of the context the turn's prompt begins with, and whether that is not all of it."""
    prompt, new = wanted.prompt_tokens, wanted.new_tokens
    if not 0 <= new <= prompt or prompt <= 0 or wanted.output_tokens <= 0:
        raise SimulationError(
            f"conversation {conversation.spec.id}, turn {conversation.next + 1}: a prompt of "
            f"{prompt} tokens, {new} of them new, and an output of {wanted.output_tokens}: give 1 "
            "token or more of each (0 new ones: the same prompt again), and no more new than all"
        )
    had = conversation.tokens
    if conversation.next == 0:
        return had, False
    kept = min(prompt - new, had)
    return kept, kept < had


def _stream(runs: list[Run], name: str) -> tuple[str, int]:
    """The stream the context ends in, if it is the conversation's own, else its first."""
    stream = runs[-1][0]
    if isinstance(stream, tuple) and stream[0] == name:
        return stream
    return (name, 0)


def _extended(
    runs: list[Run], stream: tuple[str, int], tokens: int, whole: int, page_tokens: int
) -> StreamPrompt:
    """``tokens`` of ``runs`` and then more of ``stream``, up to ``whole`` tokens."""
    return StreamPrompt([*runs, (stream, tokens, whole - tokens)], page_tokens)


def _cut(runs: list[Run], tokens: int) -> list[Run]:
    """The leading ``tokens`` of the runs."""
    kept: list[Run] = []
    for stream, offset, length in runs:
        if tokens <= 0:
            break
        kept.append((stream, offset, min(length, tokens)))
        tokens -= length
    return kept
