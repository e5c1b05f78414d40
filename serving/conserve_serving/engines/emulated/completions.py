"""``/v1/completions``."""

from __future__ import annotations

from array import array
from typing import Any, Final

import msgspec

from conserve_serving.engines.emulated import tokenizer as tk
from conserve_serving.engines.emulated.errors import ApiError
from conserve_serving.engines.emulated.exchange import (
    DONE,
    Exchange,
    format_of,
    submit_all,
    token_ids,
)
from conserve_serving.engines.emulated.plan import PlanReader
from conserve_serving.engines.emulated.protocol import (
    ChatRequest,
    CompletionRequest,
    SamplingParams,
)
from conserve_serving.engines.emulated.runtime import Generation
from conserve_serving.engines.emulated.script import answer_completion, seed_of
from conserve_serving.engines.emulated.service import EngineService
from conserve_serving.engines.emulated.usage import (
    cached_details,
    response_head,
    usage_of,
    weight_metadata,
)

_encode = msgspec.json.encode

#: What of a prompt decides its continuation.
_TAIL_TOKENS: Final = 4096


class CompletionExchange(Exchange):
    """A ``/v1/completions`` request.

    Args:
        service: the engine.
        request: the body.
        created: seconds since the epoch.

    Raises:
        ApiError: 400; nothing is left running.
    """

    def __init__(self, service: EngineService, request: CompletionRequest, created: int) -> None:
        super().__init__(service, streaming=request.stream)
        self._request = request
        self._created = created
        if request.logprobs is not None:
            raise ApiError("logprobs are not emulated: leave the field out", param="logprobs")
        if request.max_tokens is not None and request.max_tokens <= 0:
            raise ApiError("max_tokens must be positive", kind="Bad Request", param="max_tokens")
        self._prompts, batched = _prompts(request)
        response_format = request.response_format
        if request.json_schema and response_format is None:
            response_format = format_of(request.json_schema)
        work = []
        for text, ids in self._prompts:
            tail = text or tail_text(ids)  # the same prompt, the same answer
            reply = answer_completion(tail, response_format)
            work.append((ids, reply, seed_of(tail[-256:])))
        submit_all(
            self,
            work,
            [sampling_params(request, request.max_tokens)] * len(work),
            rid=request.rid,
            batched=batched,
            session_id=request.session_id,
            session_params=request.session_params,
            priority=request.priority,
            extra_key=request.extra_key,
            cache_salt=request.cache_salt,
        )
        self._readers = [PlanReader(generation.plan) for generation in self.generations]
        self._sent = [0] * len(self.generations)
        self._finished = [False] * len(self.generations)
        options = request.stream_options
        self._usage_last = bool(options and options.include_usage)
        self._usage_each = bool(options and options.continuous_usage_stats)
        self._head = b"data: " + _encode(self._object([]))[:-2]  # up to and with "choices":[

    def events(self) -> bytes:
        """See :class:`Exchange`."""
        parts: list[bytes] = []
        for index, generation in enumerate(self.generations):
            self._events_of(index, generation, parts)
        if self.ended:
            if sglext := self._sglext():
                parts.append(self._frame({**self._object([]), "sglext": sglext}))
            if self._usage_last:
                usage = usage_of(self.generations)
                del usage["completion_tokens_details"]
                parts.append(self._frame({**self._object([]), "usage": usage}))
            parts.append(DONE)
        return b"".join(parts)

    def result(self) -> Any:
        """See :class:`Exchange`."""
        choices = []
        for index, generation in enumerate(self.generations):
            text = generation.plan.raw_text(generation.emitted)
            if self._request.echo:
                text = self._prompt_text(index) + text
            choice = self._choice(index, text, finish=generation.finish)
            if self._request.return_token_ids:
                choice["token_ids"] = generation.plan.ids[: generation.emitted].tolist()
                choice["prompt_token_ids"] = self._prompts[index][1].tolist()
            choices.append(choice)
        result = {
            **self._object(choices),
            "usage": usage_of(self.generations),
            "metadata": weight_metadata(self.generations[0]),
        }
        if sglext := self._sglext():
            result["sglext"] = sglext
        return result

    def _events_of(self, index: int, generation: Generation, parts: list[bytes]) -> None:
        count = generation.emitted
        new = count > self._sent[index]
        ending = generation.ended and not self._finished[index]
        if not new and not ending:
            return
        first = self._sent[index] == 0
        text = "".join(delta.text or "" for delta in self._readers[index].upto(count))
        if first and self._request.echo:
            text = self._prompt_text(index) + text
        choice = self._choice(index, text, finish=generation.finish if ending else None)
        if self._request.return_token_ids:
            choice["token_ids"] = generation.plan.ids[self._sent[index] : count].tolist()
            if first:
                choice["prompt_token_ids"] = self._prompts[index][1].tolist()
        self._sent[index] = count
        self._finished[index] = ending
        usage = usage_of([generation]) if self._usage_each else None
        if usage is not None:
            usage["prompt_tokens_details"] = None  # SGLang leaves it out of these here
        parts.append(self._head + _encode(choice) + b'],"usage":' + _encode(usage) + b"}\n\n")

    def _object(self, choices: list[Any]) -> dict[str, Any]:
        first = self.generations[0]
        head = response_head(first, "text_completion", self._created, self._request.model)
        return {**head, "choices": choices}

    def _choice(self, index: int, text: str, *, finish: dict[str, object] | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": finish["type"] if finish else None,
            "matched_stop": finish.get("matched") if finish else None,
        }

    def _sglext(self) -> dict[str, Any]:
        with_storage = self.service.store is not None
        details = cached_details(self.generations[0], with_storage=with_storage)
        asked = self._request.return_cached_tokens_details
        return {"cached_tokens_details": details} if asked and details else {}

    def _prompt_text(self, index: int) -> str:
        text, ids = self._prompts[index]
        return text or tk.decode(ids)

    @staticmethod
    def _frame(content: dict[str, Any]) -> bytes:
        return b"data: " + _encode(content) + b"\n\n"


def tail_text(ids: array[int]) -> str:
    """The end of a prompt, as text; ids that are out of range are refused later."""
    return tk.decode(one for one in ids[-_TAIL_TOKENS:] if one < tk.VOCAB_SIZE)


def sampling_params(
    request: ChatRequest | CompletionRequest, max_tokens: int | None
) -> SamplingParams:
    """The sampling parameters of an OpenAI request."""
    return SamplingParams(
        max_new_tokens=max_tokens,
        min_new_tokens=request.min_tokens,
        stop=request.stop,
        stop_token_ids=request.stop_token_ids,
        stop_regex=request.stop_regex,
        no_stop_trim=request.no_stop_trim,
        ignore_eos=request.ignore_eos,
        n=request.n,
        regex=request.regex,
        ebnf=request.ebnf,
    )


def _prompts(request: CompletionRequest) -> tuple[list[tuple[str, array[int]]], bool]:
    prompt = request.prompt
    if not prompt or (isinstance(prompt, list) and all(one in ("", []) for one in prompt)):
        raise ApiError("Prompt cannot be empty", param="prompt")
    if isinstance(prompt, str):
        return [(prompt, tk.encode(prompt))], False
    if all(isinstance(one, str) for one in prompt):
        return [(one, tk.encode(one)) for one in prompt], True
    if all(isinstance(one, list) for one in prompt):
        return [("", token_ids(one, "prompt")) for one in prompt], True
    return [("", token_ids(prompt, "prompt"))], False
