"""One tool-calling conversation in all three APIs, by the official SDKs, streamed and at once.

The engine sees the same prompt, whichever API it came in by: equal counts, and one KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

anthropic = pytest.importorskip(
    "anthropic", reason="the development environment has Anthropic's SDK, this one does not"
)

SYSTEM = "You are an agent of three tongues."
ASK = "please call get_weather for Oslo"
DESCRIPTION = "The weather of a city."
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
RESULT = "minus 3 degrees"


class Chat:
    """Chat completions."""

    def __init__(self, url: str, model: str, *, stream: bool) -> None:
        self._create = openai.OpenAI(base_url=url, api_key="conserve", max_retries=0).chat
        self._model, self._stream = model, stream
        self._messages: list[Any] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": ASK},
        ]

    def ask(self) -> tuple[Any, int]:
        """The call it makes or the text it says, and the prompt's tokens."""
        function = {"name": "get_weather", "description": DESCRIPTION, "parameters": SCHEMA}
        call: Any = {
            "model": self._model,
            "messages": self._messages,
            "tools": [{"type": "function", "function": function}],
        }
        if self._stream:
            with self._create.completions.stream(
                **call, stream_options={"include_usage": True}
            ) as stream:
                for _ in stream:
                    pass
                reply: Any = stream.get_final_completion()
        else:
            reply = self._create.completions.create(**call)
        message = reply.choices[0].message
        self._messages.append(message.model_dump(exclude_none=True, include=self._kept(message)))
        if not message.tool_calls:
            return message.content, reply.usage.prompt_tokens
        (made,) = message.tool_calls
        self._messages.append({"role": "tool", "tool_call_id": made.id, "content": RESULT})
        return (made.function.name, made.function.arguments), reply.usage.prompt_tokens

    @staticmethod
    def _kept(message: Any) -> Any:
        kept: dict[str, Any] = {"role": True, "content": True}
        if message.tool_calls:
            kept["tool_calls"] = {
                "__all__": {"id": True, "type": True, "function": {"name", "arguments"}}
            }
        return kept


class Responses:
    """Responses, each naming the one before."""

    def __init__(self, url: str, model: str, *, stream: bool) -> None:
        self._client = openai.OpenAI(base_url=url, api_key="conserve", max_retries=0)
        self._model, self._stream = model, stream
        self._input: Any = ASK
        self._previous: str | None = None

    def ask(self) -> tuple[Any, int]:
        """See `Chat`."""
        tool = {"name": "get_weather", "description": DESCRIPTION, "parameters": SCHEMA}
        call: Any = {
            "model": self._model,
            "instructions": SYSTEM,
            "input": self._input,
            "tools": [{"type": "function", "strict": False, **tool}],
        }
        if self._previous:
            call["previous_response_id"] = self._previous
        if self._stream:
            with self._client.responses.stream(**call) as stream:
                for _ in stream:
                    pass
                reply: Any = stream.get_final_response()
        else:
            reply = self._client.responses.create(**call)
        self._previous = reply.id
        made = [item for item in reply.output if item.type == "function_call"]
        if not made:
            return reply.output_text, reply.usage.input_tokens
        self._input = [
            {"type": "function_call_output", "call_id": made[0].call_id, "output": RESULT}
        ]
        return (made[0].name, made[0].arguments), reply.usage.input_tokens


class Messages:
    """Anthropic's Messages."""

    def __init__(self, url: str, model: str, *, stream: bool) -> None:
        self._client = anthropic.Anthropic(
            base_url=url.removesuffix("/v1"), api_key="conserve", max_retries=0
        )
        self._model, self._stream = model, stream
        self._messages: list[Any] = [{"role": "user", "content": ASK}]

    def ask(self) -> tuple[Any, int]:
        """See `Chat`."""
        tool = {"name": "get_weather", "description": DESCRIPTION, "input_schema": SCHEMA}
        call: Any = {
            "model": self._model,
            "system": SYSTEM,
            "messages": self._messages,
            "tools": [tool],
            "max_tokens": 500,
        }
        if self._stream:
            with self._client.messages.stream(**call) as stream:
                reply: Any = stream.get_final_message()
        else:
            reply = self._client.messages.create(**call)
        usage = reply.usage
        tokens = usage.input_tokens + usage.cache_read_input_tokens
        self._messages.append({"role": "assistant", "content": reply.content})
        made = [block for block in reply.content if block.type == "tool_use"]
        if not made:
            return reply.content[0].text, tokens
        result = {"type": "tool_result", "tool_use_id": made[0].id, "content": RESULT}
        self._messages.append({"role": "user", "content": [result]})
        return (made[0].name, made[0].input), tokens


@pytest.fixture(params=[False, True], ids=["at once", "streamed"])
def speakers(request: Any, cluster: str, model_name: str) -> Iterator[list[Any]]:
    yield [kind(cluster, model_name, stream=request.param) for kind in (Chat, Responses, Messages)]


def test_three_apis_are_one_conversation_for_the_engine(speakers: list[Any]) -> None:
    calls = [speaker.ask() for speaker in speakers]
    assert calls[0][0] == calls[1][0] == ("get_weather", '{"city": "Oslo"}')
    assert calls[2][0] == ("get_weather", {"city": "Oslo"})
    assert len({tokens for _, tokens in calls}) == 1
    answers = [speaker.ask() for speaker in speakers]
    assert len({text for text, _ in answers}) == 1
    assert RESULT in answers[0][0]
    assert len({tokens for _, tokens in answers}) == 1
    assert answers[0][1] > calls[0][1]
