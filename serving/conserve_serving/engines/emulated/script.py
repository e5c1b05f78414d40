"""The scripted model: deterministic answers that follow the request and say they are emulated.

Nothing here thinks. Tools that are offered and not yet used are called with arguments lifted from
the user's words; a response format is filled; otherwise plain text. An agent loop ends: each tool
is called at most once per question unless a call is forced.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from conserve_serving.engines.emulated.errors import ApiError
from conserve_serving.engines.emulated.lift import Lifter, stem, stems_of, words_of
from conserve_serving.engines.emulated.protocol import Message, ResponseFormat, Tool
from conserve_serving.engines.emulated.schema import fill
from conserve_serving.engines.emulated.template import text_of

#: Rounds of tool calls before a final answer, however many tools are offered.
MAX_ROUNDS: Final = 6
#: Longest quotation of one tool result in a final answer, in characters.
_QUOTE_CHARS: Final = 600
_PATH_WORDS: Final = frozenset({"path", "file", "filename", "filepath"})
#: Words of tool names that say nothing about what the tool is for.
_EMPTY_WORDS: Final = frozenset({"get", "do", "run", "call", "use", "tool", "function", "a", "the"})
_FILLER: Final = (
    "This sentence is scripted and carries no meaning.",
    "The engine behind it is emulated: time and memory follow a hardware profile.",
    "Its tokens are real enough to be counted, cached and streamed.",
    "A conversation keeps its history, and so does this text.",
    "One prefill, one hand-off, one decoder until the conversation ends.",
    "Longer answers repeat themselves with a different number.",
    "Nothing in these words was computed by a language model.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An assistant message: text, then tool calls as (name, JSON arguments).

    ``formatted``: the text is JSON; only white space may be added to it.
    """

    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    formatted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """What happened since the user last spoke."""

    question: str
    earlier: tuple[str, ...]
    calls: tuple[tuple[str, str], ...]
    results: tuple[tuple[str, str], ...]  # (tool name, text)
    rounds: int


def answer_chat(
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    tool_choice: str | dict[str, Any] | None = None,
    parallel_tool_calls: bool = True,
    response_format: ResponseFormat | None = None,
) -> Reply:
    """The reply to a conversation.

    Raises:
        ApiError: 400; ``tool_choice`` or ``response_format`` cannot be met, as SGLang says it.
    """
    state = _round(messages)
    lifter = Lifter(state.question, [text for _, text in state.results], state.earlier)
    forced = _forced(tools, tool_choice)
    schema = schema_of(response_format)
    if forced and schema is not None:
        raise ApiError(
            "tool_choice 'required' or a named tool cannot be combined with response_format, "
            "regex, or ebnf: the tool-call constraint and the output constraint cannot both be "
            "honored.",
            kind="BadRequest",
        )
    if forced:
        named = len(forced) == 1 and isinstance(tool_choice, dict)
        fresh = [tool for tool in forced if tool.function.name not in _called(state)]
        tool = _rank(fresh, lifter)[0] if fresh else forced[-1]
        return Reply(calls=_calls(tool, lifter, parallel=parallel_tool_calls and not named))
    if tools and tool_choice != "none":
        chosen = _wanted(tools, state, lifter)
        if chosen:
            calls: list[tuple[str, str]] = []
            for tool in chosen if parallel_tool_calls else chosen[:1]:
                calls += _calls(tool, lifter, parallel=parallel_tool_calls)
            return Reply(calls=tuple(calls))
    if schema is not None:
        return Reply(content=_json(_formatted(schema, lifter)), formatted=True)
    return Reply(content=_prose(state))


def answer_completion(text: str, response_format: ResponseFormat | None = None) -> Reply:
    """The continuation of a text prompt. Plain text begins with a newline (see ``tokenizer``)."""
    lifter = Lifter(text[-4000:])
    schema = schema_of(response_format)
    if schema is not None:
        return Reply(content=_json(_formatted(schema, lifter)), formatted=True)
    return Reply(content="\n" + filler(seed_of(text[-256:]), 4))


def schema_of(response_format: ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON schema a response format asks for; ``{}`` for any object; None for text.

    Raises:
        ApiError: 400; unknown type, or a json_schema without a schema.
    """
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return {}
    if response_format.type == "json_schema":
        given = response_format.json_schema
        if given is None or given.schema is None:
            raise ApiError("schema_ is required for json_schema response format request.")
        return given.schema
    raise ApiError(
        f"response_format.type {response_format.type!r} is not emulated: send 'text', "
        "'json_object' or 'json_schema'.",
        param="response_format",
    )


def seed_of(text: str) -> int:
    """A number that differs between texts and is the same in every process."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def filler(seed: int, sentences: int) -> str:
    """``sentences`` numbered sentences; different seeds give different texts from the start."""
    lines = (
        f"({seed % 9973}.{index}) {_FILLER[(seed + index) % len(_FILLER)]}"
        for index in range(1, sentences + 1)
    )
    return " ".join(lines)


def _round(messages: Sequence[Message]) -> _Round:
    start = max((i for i, m in enumerate(messages) if m.role.lower() == "user"), default=-1)
    question = text_of(messages[start].content) if start >= 0 else text_of(messages[0].content)
    before = messages[: max(start, 0)]
    earlier = tuple(text_of(m.content) for m in reversed(before) if m.role.lower() == "user")
    calls: list[tuple[str, str]] = []
    names: dict[str | None, str] = {}
    results: list[tuple[str, str]] = []
    rounds = 0
    for message in messages[start + 1 :]:
        role = message.role.lower()
        if role == "assistant" and message.tool_calls:
            rounds += 1
            for call in message.tool_calls:
                names[call.id] = call.function.name or ""
                calls.append((call.function.name or "", str(call.function.arguments)))
        elif role in ("tool", "function"):
            name = message.name or names.get(message.tool_call_id, "a tool")
            results.append((name, text_of(message.content)))
    return _Round(
        question=question,
        earlier=earlier[:8],
        calls=tuple(calls),
        results=tuple(results),
        rounds=rounds,
    )


def _forced(tools: Sequence[Tool] | None, choice: str | dict[str, Any] | None) -> list[Tool]:
    """The tools one of which must be called; empty when none must."""
    if choice in (None, "auto", "none"):
        return []
    if choice == "required":
        if not tools:
            raise ApiError("Tools cannot be empty if tool choice is set to required.")
        return list(tools)
    if isinstance(choice, str):
        raise ApiError(
            f"tool_choice {choice!r} is unknown: send 'auto', 'none', 'required' or "
            '{"type": "function", "function": {"name": …}}.',
            param="tool_choice",
        )
    if not tools:
        raise ApiError("Tools cannot be empty if tool choice is set to a specific tool.")
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    found = [tool for tool in tools if tool.function.name == name]
    if not found:
        raise ApiError(f"Tool '{name}' not found in tools list.")
    return found


def _called(state: _Round) -> set[str]:
    return {name for name, _ in state.calls}


def _wanted(tools: Sequence[Tool], state: _Round, lifter: Lifter) -> list[Tool]:
    """Tools to call next, of free choice; empty when it is time to answer."""
    if state.rounds >= MAX_ROUNDS:
        return []
    fresh = [tool for tool in tools if tool.function.name not in _called(state)]
    named = [tool for tool in fresh if _is_named(tool, lifter.text)]
    if not state.calls:
        return named[:4] if len(named) > 1 else _rank(fresh, lifter)[:1]
    # Something was answered already: go on only with tools the question still asks for, or that
    # take what the others have found.
    useful = [tool for tool in _rank(fresh, lifter) if tool in named or _helps(tool, lifter)]
    return useful[:1]


def _is_named(tool: Tool, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(tool.function.name)}(?!\w)", text) is not None


def _required(tool: Tool) -> list[str]:
    return list((tool.function.parameters or {}).get("required", []))


def _takes_path(tool: Tool) -> bool:
    return any(set(words_of(name)) & _PATH_WORDS for name in _required(tool))


def _name_stems(tool: Tool) -> set[str]:
    return {stem(word) for word in words_of(tool.function.name) if word not in _EMPTY_WORDS}


def _helps(tool: Tool, lifter: Lifter) -> bool:
    if _takes_path(tool):
        return lifter.has_path()
    by_name = _name_stems(tool) & lifter.all_stems
    by_description = stems_of(tool.function.description or "") & lifter.stems
    return bool(by_name) or len(by_description) >= 2


def _rank(tools: Sequence[Tool], lifter: Lifter) -> list[Tool]:
    """Most relevant first; ties in the order offered."""

    def score(tool: Tool) -> int:
        points = 3 * len(_name_stems(tool) & lifter.all_stems)
        points += len(stems_of(tool.function.description or "") & lifter.stems)
        points += 10 * _is_named(tool, lifter.text)
        if _takes_path(tool):
            points += 2 if lifter.has_path() else -6
        return points

    return sorted(tools, key=score, reverse=True)


def _calls(tool: Tool, lifter: Lifter, *, parallel: bool) -> tuple[tuple[str, str], ...]:
    """One call of the tool, or one for each value where the words list several for one argument."""
    name, schema = tool.function.name, tool.function.parameters or {}
    required = _required(tool)
    properties = schema.get("properties", {})
    if parallel and len(required) == 1:
        part = properties.get(required[0], {})
        if isinstance(part, dict) and part.get("type") == "string" and "enum" not in part:
            several = lifter.alternatives(required[0])
            if len(several) > 1:
                return tuple((name, _json({required[0]: value})) for value in several)
    arguments = fill({"type": "object", **schema}, lifter)
    return ((name, _json(arguments)),)


def _formatted(schema: dict[str, Any], lifter: Lifter) -> Any:
    if schema and schema != {"type": "object"}:
        return fill(schema, lifter)
    # Any object will do: the keys the user asked for in quotes, else one.
    keys = [key for key in lifter.quoted() if re.fullmatch(r"[A-Za-z_]\w*", key)]
    sentences = re.split(r"(?<=[.?!\n])\s+", lifter.text)
    about = [text for text in sentences if not re.search(r"(?i)\bjson\b|\bkeys?\b", text)]
    unquoted = Lifter(" ".join(about) or lifter.text)
    return {key: unquoted.string(key) for key in keys or ["answer"]}


def _prose(state: _Round) -> str:
    if state.results:
        quotes = " ".join(f"{name} returned: {_quote(text)}" for name, text in state.results)
        return (
            f"{quotes}\n\nThat is what the tools say about: {_quote(state.question, 200)} "
            "(This answer is scripted by ConServe's emulated engine.)"
        )
    seed = seed_of(state.question)
    said = f"You wrote: {_quote(state.question, 200)} " if state.question.strip() else ""
    return (
        "I am ConServe's emulated engine, so this answer is scripted, not reasoned. "
        f"{said}{filler(seed, 1 + seed % 4)}"
    )


def _quote(text: str, limit: int = _QUOTE_CHARS) -> str:
    text = text.strip()
    return f"“{text}”" if len(text) <= limit else f"“{text[:limit]}…”"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
