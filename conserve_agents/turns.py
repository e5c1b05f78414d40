"""What a turn is, to the client: its number, its prompt, and what the gateway said of it."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Final

from conserve_agents import wire

#: Chat messages or Responses items, or the text of a plain completion.
Prompt = str | Sequence[Any]

#: Calls that failed, remembered to recognise an application that tries again: as many as may fail
#: at once, for instance at a gateway that is full.
MAX_FAILED: Final = 256
#: Calls in flight whose answers are waited for.
MAX_OPEN: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnReport:
    """What the gateway said about a turn in its response headers; None where it said nothing.

    Attributes:
        identity_source: which of the request's marks named the conversation.
        turn_index: 1 for the conversation's first turn, as the gateway counts.
        cached_tokens: prompt tokens whose KV was found; only on replies that are not streamed.
        transfers: KV transfers of the conversation so far, this turn's included.
        reason: why the turn was placed where it was.
        overhead_ms: time spent in the gateway before the turn was sent upstream.
        placement: opaque; echoed on the next turn.
    """

    conversation_id: str | None = None
    identity_source: str | None = None
    turn_index: int | None = None
    prefill_engine: str | None = None
    decode_engine: str | None = None
    cached_tokens: int | None = None
    transfers: int | None = None
    reason: str | None = None
    overhead_ms: float | None = None
    placement: str | None = None


def read_report(headers: Mapping[str, str]) -> TurnReport:
    """The report in a response's headers, whatever the case of their names and however odd."""
    lower = {name.lower(): value for name, value in headers.items()}

    def text(name: str) -> str | None:
        return lower.get(name.lower()) or None

    return TurnReport(
        conversation_id=text(wire.CONVERSATION_ID),
        identity_source=text(wire.IDENTITY_SOURCE),
        turn_index=_whole(text(wire.TURN_INDEX)),
        prefill_engine=text(wire.PREFILL_ENGINE),
        decode_engine=text(wire.DECODE_ENGINE),
        cached_tokens=_whole(text(wire.CACHED_TOKENS)),
        transfers=_whole(text(wire.TRANSFERS)),
        reason=text(wire.REASON),
        overhead_ms=_number(text(wire.OVERHEAD_MS)),
        placement=_echoable(text(wire.PLACEMENT)),
    )


class TurnNumbers:
    """Numbers the turns of one conversation. Not thread-safe: the conversation's lock guards it.

    The rules, in this order:

    - A call that failed and is made again with the same prompt is the same turn, id and all.
    - Any other call is a new turn, whatever its prompt: parallel calls, forks inside the
      conversation and rewritten histories do not change the count.
    - What happened elsewhere is learned: from the history of the first call here, when the
      conversation may have begun elsewhere; from every history, when it is shared with other
      processes; from the gateway's reports. Learning only ever raises the count.

    Args:
        turns: had elsewhere; None: the first call's history tells.
        examples: answers in the first turn's prompt, which are no turns (few-shot examples);
            None: what the first call's history shows beyond ``turns``.
    """

    __slots__ = ("_failed", "_open", "_seen", "answered", "examples", "shared", "turns")

    def __init__(self, turns: int | None = 0, examples: int | None = None) -> None:
        self.turns = turns or 0
        self.examples = examples
        self.shared = False
        #: Whether a turn begun here has been answered.
        self.answered = False
        self._seen = turns is not None  # whether the count is known without a history
        self._open: OrderedDict[str, int] = OrderedDict()
        # By the prompt's fingerprint: the turn's id and index, and the prompt's length.
        self._failed: OrderedDict[bytes, tuple[str, int, int]] = OrderedDict()

    def may_repeat(self, prompt: Prompt | None) -> bool:
        """Whether a prompt may be that of a call that failed, so that its :func:`fingerprint` is
        worth taking: a history that has grown is not looked at."""
        length = _length(prompt)
        return any(failed == length for _, _, failed in self._failed.values())

    def begin(
        self, prompt: Prompt | None, key: bytes | None, new_id: Callable[[], str]
    ) -> tuple[str, int]:
        """A call is made: the id and the number of its turn.

        Args:
            prompt: its prompt, None where unknown.
            key: the prompt's fingerprint, where it :meth:`may_repeat`.
            new_id: makes an id for a new turn.
        """
        failed = None if key is None else self._failed.pop(key, None)
        if failed is not None:
            turn_id, index, _ = failed
        else:
            self._learn(prompt)
            self.turns += 1
            turn_id, index = new_id(), self.turns
        self._open[turn_id] = index
        return turn_id, index

    def drop_oldest(self) -> str | None:
        """Forget the turn that has waited longest where too many wait; its id."""
        return self._open.popitem(last=False)[0] if len(self._open) > MAX_OPEN else None

    def _learn(self, prompt: Prompt | None) -> None:
        if prompt is None or (self.examples is not None and not self.shared and self._seen):
            return
        answers, _ = opening(prompt)
        if not self._seen:
            self.turns, self.examples, self._seen = max(self.turns, answers), 0, True
        elif self.examples is None:
            self.examples = max(0, answers - self.turns)
        else:
            self.turns = max(self.turns, answers - self.examples)

    def end(self, turn_id: str, *, gateway_index: int | None) -> None:
        """The turn was answered; the gateway gave it this number."""
        self._open.pop(turn_id, None)
        for key in [key for key, (failed, *_) in self._failed.items() if failed == turn_id]:
            del self._failed[key]  # sent again with the tag it had, by whoever held it
        self.answered = True
        self.turns = max(self.turns, gateway_index or 0)

    def fail(self, turn_id: str, prompt: Prompt | None, key: bytes | None) -> bool:
        """The turn was not answered. Whether it was open, so that this is news.

        Args:
            turn_id: whose.
            prompt, key: its prompt and the fingerprint of that.
        """
        index = self._open.pop(turn_id, None)
        if index is None:
            return False
        if key is not None:
            self._failed[key] = turn_id, index, _length(prompt)
            if len(self._failed) > MAX_FAILED:
                self._failed.popitem(last=False)
        return True


def fingerprint(prompt: Prompt | None) -> bytes | None:
    """Tells prompts apart, by their JSON; None for one that is unknown or has no JSON form."""
    if prompt is None:
        return None
    try:
        text = json.dumps(prompt, ensure_ascii=False, default=_plain, skipkeys=True)
    except (TypeError, ValueError, RecursionError):  # such as one that contains itself
        return None
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def is_model_call(method: str, path: str) -> bool:
    """Whether a request to an OpenAI-style API is a turn: (chat) completions and responses."""
    return method.upper() == "POST" and path.endswith(("/completions", "/responses"))


def prompt_of(body: Mapping[str, Any]) -> Prompt | None:
    """The prompt in the body of a chat completion, a completion or a response; None without one."""
    for name in ("messages", "prompt", "input"):
        if prompt := body.get(name):
            break
    else:
        return None
    if name == "input" and isinstance(instructions := body.get("instructions"), str):
        items = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [{"role": "system", "content": instructions}, *items]
    return prompt if isinstance(prompt, str | Sequence) else list(prompt)


def opening(prompt: Prompt) -> tuple[int, Prompt]:
    """How many turns a prompt shows to have been answered, and what the first of them asked.

    Returns:
        The number of answers (in a row of the model's messages, reasoning and tool calls, all are
        one answer), and what stands before the first of them (all, when there is none).
    """
    if isinstance(prompt, str):
        return 0, prompt
    answers, first, inside = 0, len(prompt), False
    for place, message in enumerate(prompt):
        is_answer = _is_answer(message)
        if is_answer and not inside:
            answers += 1
            first = min(first, place)
        inside = is_answer
    return answers, prompt[:first] if answers else prompt


def _is_answer(message: Any) -> bool:
    """Whether the model has made it: an assistant's message, or a Responses item such as a call."""
    if isinstance(message, Mapping):
        role, kind = message.get("role"), message.get("type")
    else:
        role, kind = getattr(message, "role", None), getattr(message, "type", None)
    if role is not None:
        return bool(role == "assistant")
    return isinstance(kind, str) and (kind == "reasoning" or kind.endswith("_call"))


def _length(prompt: Prompt | None) -> int:
    return len(prompt) if isinstance(prompt, Sized) else -1


def _plain(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) else repr(value)


def _echoable(value: str | None) -> str | None:
    """A token that can go back in a header; no client could send another."""
    return value if value is not None and value.isascii() and value.isprintable() else None


def _whole(value: str | None) -> int | None:
    return int(value) if value is not None and value.isdecimal() else None


def _number(value: str | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None
