"""``/v1/chat/completions``."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from conserve_serving.engines.emulated.completions import sampling_params
from conserve_serving.engines.emulated.errors import ApiError
from conserve_serving.engines.emulated.exchange import DONE, Exchange, submit_all, token_ids
from conserve_serving.engines.emulated.plan import Delta, PlanReader
from conserve_serving.engines.emulated.protocol import ChatRequest
from conserve_serving.engines.emulated.script import answer_chat, seed_of
from conserve_serving.engines.emulated.service import EngineService
from conserve_serving.engines.emulated.template import text_of
from conserve_serving.engines.emulated.usage import (
    cached_details,
    response_head,
    usage_of,
    weight_metadata,
)

_encode = msgspec.json.encode


class ChatExchange(Exchange):
    """A ``/v1/chat/completions`` request.

    Args:
        service: the engine.
        request: the body.
        created: seconds since the epoch.
        ids_framed: send token ids of a stream as a named event (``x-sglext-ids-framed: 1``).

    Raises:
        ApiError: 400; nothing is left running.
    """

    def __init__(
        self,
        service: EngineService,
        request: ChatRequest,
        created: int,
        *,
        ids_framed: bool = False,
    ) -> None:
        super().__init__(service, streaming=request.stream)
        self._request = request
        self._created = created
        self._ids_framed = ids_framed
        most = request.max_completion_tokens or request.max_tokens
        self._check(most)
        reply = answer_chat(
            request.messages,
            tools=request.tools,
            tool_choice=request.tool_choice,
            parallel_tool_calls=request.parallel_tool_calls,
            response_format=request.response_format,
        )
        if request.input_ids is not None:
            prompt = token_ids(request.input_ids, "input_ids")
        else:
            prompt = service.template.render(
                request.messages,
                request.tools if request.tool_choice != "none" else None,
                continue_final_message=request.continue_final_message,
            )
        self._prompt = prompt
        submit_all(
            self,
            [(prompt, reply, seed_of(text_of(request.messages[-1].content)[-256:]))],
            [sampling_params(request, most)],
            rid=request.rid,
            batched=False,
            session_id=request.session_id,
            session_params=request.session_params,
            priority=request.priority,
            extra_key=request.extra_key,
            cache_salt=request.cache_salt,
        )
        self._generation = self.generations[0]
        self._reader = PlanReader(self._generation.plan)
        self._begun = False
        self._closed = False
        options = request.stream_options
        self._usage_last = bool(options and options.include_usage)
        self._usage_each = bool(options and options.continuous_usage_stats)
        head = b"data: " + _encode(self._object("chat.completion.chunk"))[:-1]
        self._head = head + b',"choices":[{"index":0,"delta":{"reasoning_content":null'
        self._call_head = head + b',"choices":[{"index":0,"delta":'
        self._tail = b'},"logprobs":null,"finish_reason":null,"matched_stop":null}]'

    def events(self) -> bytes:
        """See :class:`Exchange`."""
        if self._closed:
            return b""
        generation = self._generation
        if not generation.emitted and not generation.ended:
            return b""
        parts: list[bytes] = []
        if not self._begun:
            self._begun = True
            parts.append(self._head + b',"role":"assistant","content":""' + self._tail + b"}\n\n")
        parts += map(self._delta, self._reader.upto(generation.emitted))
        if generation.ended:
            self._closed = True
            self._close(parts)
        return b"".join(parts)

    def result(self) -> Any:
        """See :class:`Exchange`."""
        generation, request = self._generation, self._request
        plan, count = generation.plan, generation.emitted
        calls = [
            {
                "id": self._call_id(index),
                "index": index,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for index, call in enumerate(plan.calls)
            if call.complete(count)
        ]
        # A call that was cut is no call: SGLang's parser leaves its text in the content.
        content = plan.text if count >= plan.text_tokens and len(calls) == len(plan.calls) else None
        if content is None:
            content = plan.raw_text(count) if not calls else plan.text
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content,
            "reasoning_content": None,
        }
        if calls:
            message["tool_calls"] = calls
        choice: dict[str, Any] = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": self._finish_type(),
            "matched_stop": generation.finish.get("matched"),
        }
        if request.return_prompt_token_ids or request.return_token_ids:
            choice["prompt_token_ids"] = self._prompt.tolist()
        if request.return_token_ids:
            choice["response_token_ids"] = plan.ids[:count].tolist()
        result = {
            **self._object("chat.completion"),
            "choices": [choice],
            "usage": usage_of(self.generations),
            "metadata": weight_metadata(self.generations[0]),
        }
        if sglext := {**self._details(), **self._ids()}:
            result["sglext"] = sglext
        return result

    def _check(self, most: int | None) -> None:
        request = self._request
        if not request.messages:
            raise ApiError("Messages cannot be empty.", param="messages")
        if request.logprobs:
            raise ApiError("logprobs are not emulated: leave the field out", param="logprobs")
        context = self.service.context_length
        if most is not None and most > context:
            raise ApiError(
                f"max_completion_tokens is too large: {most}."
                f"This model supports at most {context} completion tokens."
            )

    def _finish_type(self) -> str:
        generation = self._generation
        return "abort" if generation.aborted else generation.plan.finish_type

    def _delta(self, delta: Delta) -> bytes:
        usage = b""
        if self._usage_each:
            usage = b',"usage":' + _encode(usage_of(self.generations))
        if delta.text is not None:
            body = b',"content":' + _encode(delta.text)
            return self._head + body + self._tail + usage + b"}\n\n"
        call = {
            "id": self._call_id(delta.call or 0) if delta.name is not None else None,
            "index": delta.call,
            "type": "function",
            "function": {"name": delta.name, "arguments": delta.arguments},
        }
        body = _encode(
            {"role": None, "content": None, "reasoning_content": None, "tool_calls": [call]}
        )
        tail = self._tail[1:] + (usage or b',"usage":null')
        return self._call_head + body + tail + b"}\n\n"

    def _close(self, parts: list[bytes]) -> None:
        matched = self._generation.finish.get("matched")
        parts.append(
            self._head
            + b'},"logprobs":null,"finish_reason":'
            + _encode(self._finish_type())
            + b',"matched_stop":'
            + _encode(matched)
            + b"}]}\n\n"
        )
        ids, details = self._ids(), self._details()
        empty = {**self._object("chat.completion.chunk"), "choices": []}
        if self._ids_framed:
            if details:
                parts.append(_frame({**empty, "sglext": details}))
            if ids:
                parts.append(b"event: sglext_ids\n" + _frame({**empty, "sglext": ids}))
        elif ids or details:
            parts.append(_frame({**empty, "sglext": {**details, **ids}}))
        if self._usage_last:
            parts.append(_frame({**empty, "usage": usage_of(self.generations)}))
        parts.append(DONE)

    def _object(self, kind: str) -> dict[str, Any]:
        return response_head(self._generation, kind, self._created, self._request.model)

    def _call_id(self, index: int) -> str:
        """Unlike SGLang's random one: equal prompts get equal ids, so runs can be repeated."""
        digest = hashlib.blake2b(self._prompt.tobytes(), digest_size=12, salt=str(index).encode())
        return f"call_{digest.hexdigest()}"

    def _ids(self) -> dict[str, Any]:
        ids: dict[str, Any] = {}
        if self._request.return_input_ids_in_sglext:
            ids["input_ids"] = self._prompt.tolist()
        if self._request.return_output_ids_in_sglext:
            ids["output_ids"] = [self._generation.plan.ids[: self._generation.emitted].tolist()]
        return ids

    def _details(self) -> dict[str, Any]:
        if not self._request.return_cached_tokens_details:
            return {}
        with_storage = self.service.store is not None
        details = cached_details(self._generation, with_storage=with_storage)
        return {"cached_tokens_details": details} if details else {}


def _frame(content: dict[str, Any]) -> bytes:
    return b"data: " + _encode(content) + b"\n\n"
