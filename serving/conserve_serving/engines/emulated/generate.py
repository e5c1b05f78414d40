"""``/generate``: SGLang's native endpoint."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from conserve_serving.engines.emulated import tokenizer as tk
from conserve_serving.engines.emulated.completions import tail_text
from conserve_serving.engines.emulated.errors import ApiError
from conserve_serving.engines.emulated.exchange import (
    DONE,
    Exchange,
    format_of,
    submit_all,
    token_ids,
)
from conserve_serving.engines.emulated.protocol import GenerateRequest, SamplingParams
from conserve_serving.engines.emulated.runtime import Generation
from conserve_serving.engines.emulated.script import answer_completion, seed_of
from conserve_serving.engines.emulated.service import EngineService
from conserve_serving.engines.emulated.usage import meta_info

#: SGLang's default of ``sampling_params.max_new_tokens``.
_MAX_NEW_TOKENS: Final = 128


class GenerateExchange(Exchange):
    """A ``/generate`` request.

    Raises:
        ApiError: 400; nothing is left running.
    """

    def __init__(self, service: EngineService, request: GenerateRequest) -> None:
        super().__init__(service, streaming=request.stream)
        if request.return_logprob not in (None, False):
            raise ApiError("return_logprob is not emulated: leave it out", param="return_logprob")
        prompts, self._batched = _prompts(request)
        given = request.sampling_params or {}
        each = given if isinstance(given, list) else [given] * len(prompts)
        if len(each) != len(prompts):
            raise ApiError(
                f"sampling_params lists {len(each)} entries for {len(prompts)} prompts: "
                "give one each",
                param="sampling_params",
            )
        params = [_params(one) for one in each]
        work = []
        for (text, ids), one in zip(prompts, params, strict=True):
            tail = text or tail_text(ids)
            reply = answer_completion(tail, format_of(one.json_schema))
            work.append((ids, reply, seed_of(tail[-256:])))
        self._shown = [-1] * len(work)
        submit_all(
            self,
            work,
            params,
            rid=request.rid,
            batched=self._batched,
            session_id=request.session_id,
            session_params=request.session_params,
            priority=request.priority,
            extra_key=request.extra_key,
            cache_salt=request.cache_salt,
            conversation=request.routing_key,
        )

    def events(self) -> bytes:
        """See :class:`Exchange`. Each event repeats the whole text so far, as SGLang's do."""
        parts = []
        for index, generation in enumerate(self.generations):
            state = generation.emitted + generation.ended
            if state <= max(self._shown[index], 0):
                continue
            self._shown[index] = state
            content = self._content(generation)
            if self._batched:
                content["index"] = index
            parts.append(b"data: " + msgspec.json.encode(content) + b"\n\n")
        if self.ended:
            parts.append(DONE)
        return b"".join(parts)

    def result(self) -> Any:
        """See :class:`Exchange`."""
        contents = [self._content(generation) for generation in self.generations]
        return contents if self._batched else contents[0]

    def _content(self, generation: Generation) -> dict[str, Any]:
        count = generation.emitted
        return {
            "text": generation.plan.raw_text(count),
            "output_ids": generation.plan.ids[:count].tolist(),
            "meta_info": meta_info(
                generation,
                with_storage=self.service.store is not None,
                now_s=self.service.clock.now_s(),
            ),
        }


def _prompts(request: GenerateRequest) -> tuple[list[tuple[str, Any]], bool]:
    if request.text is None and request.input_ids is None:
        raise ApiError("At least one of text, input_ids, or input_embeds should be provided.")
    if request.text is not None and request.input_ids is None:  # of both, SGLang takes the ids
        texts = [request.text] if isinstance(request.text, str) else request.text
        return [(text, tk.encode(text)) for text in texts], isinstance(request.text, list)
    given = request.input_ids or []
    batched = bool(given) and isinstance(given[0], list)
    lists = given if batched else [given]
    return [("", token_ids(ids, "input_ids")) for ids in lists], batched


def _params(given: dict[str, Any]) -> SamplingParams:
    try:
        return msgspec.convert({"max_new_tokens": _MAX_NEW_TOKENS, **given}, SamplingParams)
    except msgspec.ValidationError as error:
        raise ApiError(f"sampling_params: {error}", param="sampling_params") from error
