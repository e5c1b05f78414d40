"""What a request will generate, known in full before it runs: ids, text, deltas, finish reason.

The engine model decides only *when* tokens appear. ``Plan`` holds the output's ids and where text
and tool calls lie in them; ``PlanReader`` turns "n tokens so far" into the deltas to stream.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from conserve_serving.engines.emulated import tokenizer as tk
from conserve_serving.engines.emulated.script import Reply, filler
from conserve_serving.engines.emulated.template import ChatTemplate, call_head

#: Characters of filler per token it becomes, from below (short tokens end lines and words).
_CHARS_PER_TOKEN: Final = 4
_SENTENCE_CHARS: Final = 40
#: How SGLang 0.5.23 reserves KV for output at admission (``schedule_policy.py``): the request's
#: limit clipped to this, times a ratio that begins at 0.7 and is 1 where the end is ignored.
_RESERVE_CLIP_TOKENS: Final = 4096
_RESERVE_RATIO: Final = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds an output.

    Attributes:
        max_tokens: most tokens to generate; None: as many as fit.
        room_tokens: most that fit into context and pool beside the prompt.
        min_tokens: no end and no stop before this many.
        ignore_eos: go on to ``max_tokens`` (or the room) whatever the text says.
        stop, stop_token_ids: what ends the output early.
        keep_stop: leave the matched stop string in the text (``no_stop_trim``).
    """

    max_tokens: int | None
    room_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    keep_stop: bool = False

    @property
    def most(self) -> int:
        """The most tokens this output may have."""
        return (
            self.room_tokens if self.max_tokens is None else min(self.max_tokens, self.room_tokens)
        )

    @property
    def reserve_tokens(self) -> int:
        """Output tokens that admission keeps room for."""
        clipped = min(self.most, _RESERVE_CLIP_TOKENS)
        return clipped if self.ignore_eos else int(clipped * _RESERVE_RATIO)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSpan:
    """Where a tool call lies in the output: its name is known at ``open_at``, arguments follow."""

    name: str
    arguments: str
    open_at: int
    arguments_end: int
    end: int

    def complete(self, tokens: int) -> bool:
        """Whether the whole call lies in the first ``tokens`` tokens."""
        return self.end <= tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An output.

    Attributes:
        ids: all tokens, an end token included where the output ends by itself.
        text_tokens: how many leading tokens are text; then come the calls.
        text: that text as the client sees it (cut at a stop string).
        calls: the calls that are complete in ``ids``, and the last one if it was cut.
        finish: SGLang's ``finish_reason`` object.
    """

    ids: array[int]
    text_tokens: int
    text: str
    calls: tuple[CallSpan, ...]
    finish: dict[str, Any]

    @property
    def finish_type(self) -> str:
        """OpenAI's finish reason."""
        if self.finish["type"] == "stop" and self.calls:
            return "tool_calls"
        return str(self.finish["type"])

    def raw_text(self, tokens: int | None = None) -> str:
        """What ``/generate`` shows of the first ``tokens`` tokens: calls as plain text."""
        if not self.calls:
            reader = PlanReader(self)
            return "".join(
                d.text or "" for d in reader.upto(len(self.ids) if tokens is None else tokens)
            )
        return tk.decode(self.ids[:tokens], skip_special_tokens=False).removesuffix("<|im_end|>")


def make_plan(reply: Reply, limits: Limits, template: ChatTemplate, *, seed: int) -> Plan:
    """Cut or extend a reply to its limits.

    Args:
        reply: what the script says.
        limits: what the request allows.
        template: renders tool calls exactly as it will when they come back as history.
        seed: varies the filler that extends short text.
    """
    most = limits.most
    if most <= 0:
        return Plan(
            ids=array("I"), text_tokens=0, text="", calls=(), finish={"type": "length", "length": 0}
        )
    call_ids = template.assistant_body("", reply.calls)
    content, fixed = reply.content, len(call_ids)
    text_ids = tk.encode(content) if content else array("I")
    # The output has to reach this many tokens: text grows, calls cannot.
    reach = most if limits.ignore_eos else min(max(limits.min_tokens, 1), most)
    missing = reach - fixed - len(text_ids)
    if missing > 0:
        if reply.formatted:
            content += "\n" * missing  # a token each
        else:
            sentences = (missing + 2) * _CHARS_PER_TOKEN // _SENTENCE_CHARS + 2
            content += (" " if content else "") + filler(seed, sentences)
        text_ids = tk.encode(content)
        if limits.ignore_eos:
            text_ids = text_ids[: max(0, most - fixed)]
    ids = text_ids + call_ids
    finish: dict[str, Any] = {"type": "stop", "matched": tk.IM_END}
    if not limits.ignore_eos and len(ids) < most:
        ids.append(tk.IM_END)
    else:
        ids = ids[:most]
        finish = {"type": "length", "length": len(ids)}
    text_tokens = min(len(text_ids), len(ids))
    text = tk.decode(ids[:text_tokens])
    for place in range(limits.min_tokens, len(ids)) if limits.stop_token_ids else ():
        if ids[place] in limits.stop_token_ids:
            ids = ids[: place + 1]
            text_tokens = min(text_tokens, place)
            text = tk.decode(ids[:text_tokens])
            finish = {"type": "stop", "matched": ids[place]}
            break
    cut = _first_stop(text, ids[:text_tokens], limits)
    if cut is not None:
        matched, start, text_tokens = cut
        ids = ids[:text_tokens]
        text = text[: start + len(matched)] if limits.keep_stop else text[:start]
        finish = {"type": "stop", "matched": matched}
    return Plan(
        ids=ids,
        text_tokens=text_tokens,
        text=text,
        calls=tuple(_spans(reply.calls, len(text_ids), len(ids))),
        finish=finish,
    )


def _first_stop(text: str, ids: Sequence[int], limits: Limits) -> tuple[str, int, int] | None:
    """The earliest stop string: itself, where it begins, and after how many tokens it is seen."""
    floor = len(tk.decode(ids[: limits.min_tokens])) if limits.min_tokens else 0
    best: tuple[int, str] | None = None
    for stop in limits.stop:
        if not stop:
            continue
        start = text.find(stop, max(0, floor - len(stop) + 1))
        if start >= 0 and (best is None or start + len(stop) < best[0]):
            best = (start + len(stop), stop)
    if best is None:
        return None
    end, stop = best
    seen = 0
    for count, token in enumerate(ids, start=1):
        seen += len(tk.decode((token,)))
        if seen >= end:
            return stop, end - len(stop), count
    return None


def _spans(calls: Sequence[tuple[str, str]], start: int, total: int) -> Iterator[CallSpan]:
    at = start
    for name, arguments in calls:
        open_at = at + 1 + len(tk.encode(call_head(name)))
        arguments_end = open_at + len(tk.encode(arguments))
        end = arguments_end + len(tk.encode("}\n")) + 1
        if open_at > total:
            return
        yield CallSpan(
            name=name, arguments=arguments, open_at=open_at, arguments_end=arguments_end, end=end
        )
        at = end


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece to stream: text, or a piece of tool call ``call`` (its name in the first piece)."""

    text: str | None = None
    call: int | None = None
    name: str | None = None
    arguments: str = ""


class PlanReader:
    """Reads a plan from left to right."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._at = 0
        self._chars = 0
        self._opened = 0

    def upto(self, tokens: int) -> list[Delta]:
        """What becomes visible when ``tokens`` tokens have been generated, since the last call."""
        plan = self._plan
        tokens = min(tokens, len(plan.ids))
        deltas: list[Delta] = []
        if self._at < plan.text_tokens:
            piece = tk.decode(plan.ids[self._at : min(tokens, plan.text_tokens)])
            piece = piece[: max(0, len(plan.text) - self._chars)]
            self._chars += len(piece)
            if piece:
                deltas.append(Delta(text=piece))
        for index, call in enumerate(plan.calls):
            if tokens < call.open_at or self._at >= call.arguments_end:
                continue
            start, end = max(self._at, call.open_at), min(tokens, call.arguments_end)
            piece = tk.decode(plan.ids[start:end])
            if index == self._opened:
                self._opened += 1
                deltas.append(Delta(call=index, name=call.name))
            if piece:
                deltas.append(Delta(call=index, arguments=piece))
        self._at = max(self._at, tokens)
        return deltas
