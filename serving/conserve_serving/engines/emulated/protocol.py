"""Request bodies, as far as the emulated engine reads them: SGLang's field names and defaults.

Unknown fields are ignored, as SGLang does; a field of a wrong type is refused by name. Fields
whose effect is not emulated and that cannot be ignored honestly are read only to be refused.
"""

from __future__ import annotations

from typing import Any

import msgspec


class FunctionCall(msgspec.Struct):
    """The call inside a ``tool_calls`` entry of the history."""

    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct):
    """A ``tool_calls`` entry of the history."""

    function: FunctionCall
    id: str | None = None


class Message(msgspec.Struct):
    """One message of a conversation."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None


class Function(msgspec.Struct):
    """An offered function; ``parameters`` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct):
    """An offered tool."""

    function: Function
    type: str = "function"


class JsonSchema(msgspec.Struct):
    """The ``json_schema`` of a response format."""

    name: str = ""
    schema: dict[str, Any] | None = None


class ResponseFormat(msgspec.Struct):
    """``response_format``: text, json_object or json_schema."""

    type: str
    json_schema: JsonSchema | None = None


class StreamOptions(msgspec.Struct):
    """``stream_options``."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class _Common(msgspec.Struct):
    """Fields of both OpenAI endpoints."""

    model: str = "default"
    n: int = 1
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    no_stop_trim: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    regex: str | None = None
    ebnf: str | None = None
    stop_regex: str | list[str] | None = None
    return_token_ids: bool = False
    return_cached_tokens_details: bool = False
    rid: str | list[str] | None = None
    session_id: str | None = None
    session_params: dict[str, Any] | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int | None = None


class ChatRequest(_Common, kw_only=True):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    continue_final_message: bool = False
    input_ids: list[int] | None = None
    return_prompt_token_ids: bool = False
    return_input_ids_in_sglext: bool = False
    return_output_ids_in_sglext: bool = False


class CompletionRequest(_Common):
    """Body of ``/v1/completions``."""

    prompt: str | list[Any] = ""
    max_tokens: int | None = 16
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    json_schema: str | None = None
    suffix: str | None = None


class SamplingParams(msgspec.Struct):
    """``sampling_params`` of ``/generate``, and what the OpenAI endpoints turn theirs into."""

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: str | list[str] | None = None
    no_stop_trim: bool = False
    ignore_eos: bool = False
    n: int = 1
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None


class GenerateRequest(msgspec.Struct):
    """Body of ``/generate``."""

    text: str | list[str] | None = None
    input_ids: list[Any] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    stream: bool = False
    return_logprob: bool | list[bool] | None = None
    routing_key: str | None = None
    rid: str | list[str] | None = None
    session_id: str | None = None
    session_params: dict[str, Any] | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int | None = None


class TokenizeRequest(msgspec.Struct):
    """Body of ``/v1/tokenize``: exactly one of ``prompt`` and ``messages``."""

    prompt: str | list[str] | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    continue_final_message: bool = False


class DetokenizeRequest(msgspec.Struct):
    """Body of ``/v1/detokenize``."""

    tokens: list[Any]
    skip_special_tokens: bool = True


class OpenSessionRequest(msgspec.Struct):
    """Body of ``/open_session``."""

    capacity_of_str_len: int
    session_id: str | None = None
    streaming: bool | None = None
    timeout: float | None = None


class CloseSessionRequest(msgspec.Struct):
    """Body of ``/close_session``."""

    session_id: str


class AbortRequest(msgspec.Struct):
    """Body of ``/abort_request``."""

    rid: str = ""
    abort_all: bool = False
