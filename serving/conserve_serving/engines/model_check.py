"""What the engine model refuses: settings that cannot work, requests that could never run."""

from __future__ import annotations

from conserve_serving.engines.content import Prompt
from conserve_serving.engines.errors import ModelError, RequestTooLargeError
from conserve_serving.engines.model_types import ModelConfig, ModelRequest
from conserve_serving.engines.profile import HardwareProfile


def check_config(config: ModelConfig, *, capacity_tokens: int, chunk_tokens: int) -> None:
    """Refuse a set-up under which nothing could run.

    Args:
        config: the engine's set-up.
        capacity_tokens, chunk_tokens: of its KV pool and of a step; the profile's where
            ``config`` leaves them open.

    Raises:
        ModelError: a setting is too small; the message names it.
    """
    for name, value in (
        ("page_tokens", config.page_tokens),
        ("max_running_requests", config.max_running_requests),
        ("chunk_tokens", chunk_tokens),
        ("kv_capacity_tokens", capacity_tokens // max(config.page_tokens, 1)),
    ):
        if value <= 0:
            raise ModelError(f"{name} is too small: at least one page of one request must fit")


def check_request(
    request: ModelRequest, config: ModelConfig, profile: HardwareProfile, capacity_tokens: int
) -> None:
    """Refuse a request that makes no sense, or that could never run on this engine.

    Args:
        request: as submitted.
        config: the engine's set-up.
        profile: the engine's hardware.
        capacity_tokens: its KV pool, in whole pages.

    Raises:
        RequestTooLargeError: prompt and output exceed the KV pool or the context length.
        ModelError: a field is out of range; the message names it.
    """
    rid, prompt, output = request.rid, request.prompt.tokens, request.output_tokens
    if prompt <= 0:
        raise ModelError(f"rid {rid!r}: the prompt is empty: send at least one token")
    if (output <= 0) != request.prefill_only or output < 0:
        raise ModelError(
            f"rid {rid!r}: output_tokens is {output} and prefill_only {request.prefill_only}: "
            "output_tokens is 0 exactly when prefill_only"
        )
    for name, content in (("prompt", request.prompt), ("context", request.context)):
        if content is not None and content.page_tokens != config.page_tokens:
            raise ModelError(
                f"rid {rid!r}: {name} has pages of {content.page_tokens} tokens: "
                f"this engine's are {config.page_tokens}"
            )
    if request.context is not None and request.context.tokens < prompt:
        raise ModelError(f"rid {rid!r}: context is shorter than the prompt it must begin with")
    whole = prompt + output
    if whole > profile.max_context_tokens:
        raise RequestTooLargeError(
            f"rid {rid!r}: prompt {prompt} + output {output} tokens exceed the context length "
            f"of {profile.max_context_tokens}: shorten the prompt or max_tokens"
        )
    if whole + -whole % config.page_tokens > capacity_tokens:
        raise RequestTooLargeError(
            f"rid {rid!r}: prompt {prompt} + output {output} tokens exceed the KV pool of "
            f"{capacity_tokens} tokens: use a larger engine or shorten them"
        )


def check_context(request: ModelRequest, context: Prompt, config: ModelConfig) -> None:
    """Refuse a context that cannot be that of a request in the engine.

    Raises:
        ModelError: it has other pages, or is shorter than the prompt it must begin with.
    """
    if context.page_tokens != config.page_tokens or context.tokens < request.prompt.tokens:
        raise ModelError(
            f"rid {request.rid!r}: context must extend the prompt in this engine's pages"
        )
