"""One request and its response: what the three generating endpoints have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

from conserve_serving.engines.emulated.errors import ApiError
from conserve_serving.engines.emulated.plan import Limits
from conserve_serving.engines.emulated.protocol import JsonSchema, ResponseFormat, SamplingParams
from conserve_serving.engines.emulated.runtime import Generation, Signal
from conserve_serving.engines.emulated.script import Reply
from conserve_serving.engines.emulated.service import EngineService, Submission

DONE = b"data: [DONE]\n\n"


class Exchange(ABC):
    """A request whose prompts are in the engine.

    Attributes:
        streaming: whether the response is a stream of events.
        signal: set whenever :meth:`events` may have something new, and when all is over.
        generations: one for each prompt, in order.
    """

    def __init__(self, service: EngineService, *, streaming: bool) -> None:
        self.service = service
        self.streaming = streaming
        self.signal = Signal()
        self.generations: list[Generation] = []

    @property
    def ended(self) -> bool:
        """Whether every prompt's output is complete or aborted."""
        return all(generation.ended for generation in self.generations)

    def abort(self) -> None:
        """The client left."""
        for generation in self.generations:
            self.service.abort_one(generation.rid)

    @abstractmethod
    def events(self) -> bytes:
        """Server-sent events that became due since the last call; the closing ones at the end."""

    @abstractmethod
    def result(self) -> Any:
        """The response's JSON, once all is over."""


def submit_all(
    exchange: Exchange,
    prompts: Sequence[tuple[array[int], Reply, int]],
    params: Sequence[SamplingParams],
    *,
    rid: str | list[str] | None,
    batched: bool,
    session_id: str | None,
    session_params: dict[str, Any] | None,
    priority: int | None,
    extra_key: str | None,
    cache_salt: str | None,
    conversation: str | None = None,
) -> None:
    """Submit prompts (ids, reply, seed) and put their generations into the exchange.

    Raises:
        ApiError: 400; none of them is left running.
    """
    service = exchange.service
    rids = _rids(rid, len(prompts), batched=batched)
    session = _session(service, session_id, session_params)
    try:
        for (ids, reply, seed), one, given in zip(prompts, rids, params, strict=True):
            generation = service.submit(
                Submission(
                    prompt_ids=ids,
                    reply=reply,
                    limits=limits_of(service, len(ids), given),
                    seed=seed,
                    rid=one,
                    session_id=session,
                    priority=priority or 0,
                    extra_key=extra_key,
                    cache_salt=cache_salt,
                    conversation=conversation,
                    signal=exchange.signal,
                    each_token=exchange.streaming,
                )
            )
            exchange.generations.append(generation)
    except ApiError:
        exchange.abort()
        raise


def limits_of(service: EngineService, prompt_tokens: int, params: SamplingParams) -> Limits:
    """The limits that sampling parameters set.

    Raises:
        ApiError: 400; a parameter that is not emulated, or impossible.
    """
    if params.n != 1:
        raise ApiError(
            f"n is {params.n}: the emulated engine generates one output a prompt: send n=1",
            param="n",
        )
    for name in ("regex", "ebnf", "stop_regex"):
        if getattr(params, name):
            raise ApiError(f"{name} is not emulated: leave it out", param=name)
    if params.max_new_tokens is not None and params.max_new_tokens < 0:
        raise ApiError(
            f"max_new_tokens must be at least 0, got {params.max_new_tokens}.",
            param="max_new_tokens",
        )
    most = params.max_new_tokens
    if params.min_new_tokens < 0 or (most is not None and params.min_new_tokens > most):
        raise ApiError(
            f"min_new_tokens must be in [0, max_new_tokens({most})], got {params.min_new_tokens}.",
            param="min_new_tokens",
        )
    stop = params.stop or ()
    return Limits(
        max_tokens=most,
        room_tokens=service.room_tokens(prompt_tokens),
        min_tokens=params.min_new_tokens,
        ignore_eos=params.ignore_eos,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(params.stop_token_ids or ()),
        keep_stop=params.no_stop_trim,
    )


def format_of(json_schema: str | None) -> ResponseFormat | None:
    """SGLang's ``json_schema`` parameter, a schema as text, as a response format.

    Raises:
        ApiError: 400; it is not a JSON object.
    """
    if not json_schema:
        return None
    try:
        schema = msgspec.json.decode(json_schema, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ApiError(f"json_schema is not a JSON object: {error}", param="json_schema") from error
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=schema))


def token_ids(values: Any, param: str) -> array[int]:
    """Token ids from JSON.

    Raises:
        ApiError: 400; something in the list is not a token id.
    """
    try:
        return array("I", values)
    except (TypeError, OverflowError) as error:
        raise ApiError(
            f"{param} must be a list of token ids (integers from 0 on): {error}", param=param
        ) from error


def _rids(rid: str | list[str] | None, count: int, *, batched: bool) -> Sequence[str | None]:
    if rid is None:
        return [None] * count
    if isinstance(rid, str):
        return [f"{rid}_{index}" for index in range(count)] if batched else [rid]
    if len(rid) != count:
        raise ApiError(f"rid lists {len(rid)} ids for {count} prompts: give one each", param="rid")
    return rid


def _session(
    service: EngineService, session_id: str | None, session_params: dict[str, Any] | None
) -> str | None:
    """The session a request belongs to; ``session_params`` must name one that is open."""
    if session_params is None or session_params.get("id") is None:
        return session_id
    named = str(session_params["id"])
    if session_id is None and not service.sessions.is_open(named):
        raise ApiError(f"Invalid request: session id {named} does not exist")
    return session_id or named
