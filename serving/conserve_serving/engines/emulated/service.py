"""The emulated engine without HTTP: admits requests, runs the model, hands KV over, counts.

Everything an endpoint needs is a method here; the endpoints translate between SGLang's JSON and
these calls.
"""

from __future__ import annotations

import logging
import time
import uuid
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from conserve_serving.engines.content import TokenPrompt
from conserve_serving.engines.emulated import tokenizer as tk
from conserve_serving.engines.emulated.ack import AckSender
from conserve_serving.engines.emulated.config import EngineConfig
from conserve_serving.engines.emulated.errors import ApiError, StoreError
from conserve_serving.engines.emulated.plan import Limits, make_plan
from conserve_serving.engines.emulated.runtime import (
    Clock,
    EngineRuntime,
    Generation,
    Signal,
    WallClock,
)
from conserve_serving.engines.emulated.script import Reply
from conserve_serving.engines.emulated.sessions import SessionBook
from conserve_serving.engines.emulated.store import HandoffStore, Stamp
from conserve_serving.engines.emulated.template import ChatTemplate
from conserve_serving.engines.errors import ModelError
from conserve_serving.engines.model import EngineModel
from conserve_serving.engines.model_types import ModelConfig, ModelRequest, PagesStored
from conserve_serving.engines.profile import load_profile
from conserve_serving.engines.sglang import marks

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Counters:
    """What the metrics count, since the start."""

    requests: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})  # by streaming
    prompt_tokens: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    generated_tokens: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    cached_device_tokens: int = 0
    cached_host_tokens: int = 0
    cached_storage_tokens: int = 0
    aborted: int = 0
    backed_up_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One prompt to run.

    Attributes:
        prompt_ids: the prompt's token ids; not changed afterwards.
        reply: what the script answers; ignored when ``limits`` allow no tokens.
        seed: varies filler text.
        rid: request id; None: one is made.
        extra_key, cache_salt: cache namespace.
        conversation: whose prompt it is: the store keeps it until that is over, and says when it
            is there. SGLang's field for it is ``routing_key``.
        each_token: wake ``signal`` at every token rather than at the end only.
    """

    prompt_ids: array[int]
    reply: Reply
    limits: Limits
    seed: int
    rid: str | None
    session_id: str | None
    priority: int
    extra_key: str | None
    cache_salt: str | None
    signal: Signal
    each_token: bool
    conversation: str | None = None


class EngineService:
    """One emulated engine.

    Args:
        config: how it is set up.
        clock: model time; the wall clock at ``config.speed`` by default.
        acks: sends acknowledgements; made from ``config.ack_url`` by default.
        new_rid: makes request ids.

    Raises:
        ProfileError: ``config.profile`` does not exist.
        StoreError: the store's folder cannot be used, or belongs to other engines.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        clock: Clock | None = None,
        acks: AckSender | None = None,
        new_rid: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self.config = config
        self.profile = load_profile(config.profile)
        self.clock = clock or WallClock(config.speed)
        self.template = ChatTemplate()
        self.counters = Counters()
        self.new_rid = new_rid
        self.started_at = time.time()
        self.store: HandoffStore | None = None
        if config.store_dir is not None:
            self.store = HandoffStore(
                config.store_dir,
                stamp=Stamp(
                    model=config.model_name, page_size=config.page_tokens, dtype=config.dtype
                ),
                engine_id=config.engine_id,
                max_age_s=config.store_max_age_s,
                max_files=config.store_max_files,
            )
        self.acks = acks
        if acks is None and config.ack_url is not None:
            self.acks = AckSender(config.ack_url, engine_id=config.engine_id)
        model = EngineModel(
            self.profile,
            ModelConfig(
                page_tokens=config.page_tokens,
                max_running_requests=config.max_running_requests,
                store_writes=self.store is not None and config.role.writes,
                session_protection=config.session_protection,
                kv_capacity_tokens=config.kv_capacity_tokens,
                host_capacity_tokens=config.host_capacity_tokens,
            ),
        )
        self.runtime = EngineRuntime(
            model, self.clock, on_stored=self._stored, on_ended=self._ended
        )
        self.sessions = SessionBook(
            opened=self.runtime.open_session, closed=self.runtime.close_session
        )
        self.speeds = self.profile.speeds()
        self.link = self.profile.link()
        self.kv_capacity_tokens = self.runtime.stats().capacity_tokens
        self.context_length = self.profile.max_context_tokens
        #: rid → key and conversation of a prompt on its way to the store
        self._leaving: dict[str, tuple[str, str | None]] = {}

    @property
    def max_req_input_len(self) -> int:
        """Longest prompt SGLang would admit, as its worker computes it."""
        return min(self.context_length, self.kv_capacity_tokens) - 1 - 5

    def room_tokens(self, prompt_tokens: int) -> int:
        """Output tokens that fit beside a prompt."""
        whole_pages = self.kv_capacity_tokens // self.config.page_tokens * self.config.page_tokens
        return max(0, min(self.context_length, whole_pages) - 1 - prompt_tokens - 1)

    def check_length(self, prompt_tokens: int, max_tokens: int | None) -> None:
        """Refuse what SGLang refuses, in its words.

        Raises:
            ApiError: 400; prompt, or prompt and output, exceed the context or the KV pool.
        """
        context = self.context_length
        if prompt_tokens >= context:
            raise ApiError(
                f"The input ({prompt_tokens} tokens) is longer than the model's context length "
                f"({context} tokens)."
            )
        if max_tokens is not None and max_tokens + prompt_tokens > context:
            raise ApiError(
                "Requested token count exceeds the model's maximum context length of "
                f"{context} tokens. You requested a total of {max_tokens + prompt_tokens} tokens: "
                f"{prompt_tokens} tokens from the input messages and {max_tokens} tokens for the "
                "completion. Please reduce the number of tokens in the input messages or the "
                "completion to fit within the limit."
            )
        if prompt_tokens >= self.max_req_input_len:
            raise ApiError(
                f"Input length ({prompt_tokens} tokens) exceeds the maximum allowed length "
                f"({self.max_req_input_len} tokens). Use a shorter input or enable "
                "--allow-auto-truncate."
            )

    def submit(self, submission: Submission) -> Generation:
        """Start a request.

        Raises:
            ApiError: 400; empty or too long, an id that is in use, a token id out of range.
        """
        ids, limits = submission.prompt_ids, submission.limits
        if not ids:
            raise ApiError("Prompt cannot be empty")
        if max(ids) >= tk.VOCAB_SIZE:
            raise ApiError(
                f"input_ids holds {max(ids)}, out of range: ids are below {tk.VOCAB_SIZE}",
                param="input_ids",
            )
        self.check_length(len(ids), limits.max_tokens)
        if self.runtime.failed:
            raise ApiError(
                "the engine has failed: restart it", status=500, kind="InternalServerError"
            )
        rid = submission.rid or self.new_rid()
        if self.runtime.has(rid):
            raise ApiError(f"Duplicate request ID detected: {rid}", param="rid")
        plan = make_plan(submission.reply, limits, self.template, seed=submission.seed)
        prompt = TokenPrompt.of(
            ids,
            self.config.page_tokens,
            extra_key=submission.extra_key,
            cache_salt=submission.cache_salt,
        )
        stored = 0
        if self.store is not None and self.config.role.reads:
            stored = self.store.stored_tokens(prompt)
        if submission.session_id is not None:
            self.sessions.use(submission.session_id)
        generation = Generation(
            rid=rid,
            plan=plan,
            prompt_tokens=len(ids),
            signal=submission.signal,
            each_token=submission.each_token,
        )
        request = ModelRequest(
            rid=rid,
            prompt=prompt,
            output_tokens=len(plan.ids),
            max_output_tokens=max(len(plan.ids), limits.reserve_tokens),
            context=prompt.extended(plan.ids) if plan.ids else None,
            session_id=submission.session_id,
            priority=submission.priority,
            stored_tokens=stored,
            prefill_only=not plan.ids,
        )
        try:
            self.runtime.submit(request, generation)
        except ModelError as error:
            raise ApiError(str(error)) from error
        if self.store is not None and self.config.role.writes and prompt.last_key is not None:
            self._leaving[rid] = (prompt.last_key, submission.conversation)
        return generation

    def abort(self, rid: str, *, everything: bool = False) -> int:
        """Abort a request, if there is one of this id; how many ended.

        With it go those whose ids begin with its id: SGLang's scheduler compares no further.
        """
        if not everything and not self.runtime.has(rid):
            return 0
        rids = [one for one in self.runtime.rids() if everything or one.startswith(rid)]
        for one in rids:
            self.abort_one(one)
        return len(rids)

    def abort_one(self, rid: str) -> None:
        """Abort exactly this request, if it is still in the engine."""
        if self.runtime.abort(rid):
            self._leaving.pop(rid, None)

    def close_session(self, name: str) -> bool:
        """End a session, or what the mark behind its name says (``engines.sglang.marks``).

        Returns:
            False when there is no such session.
        """
        session_id, mark = marks.split(name)
        if mark is None or self.store is None:
            return self.sessions.close(name)
        if mark == marks.FREE:
            self.runtime.free_session(session_id)
        else:
            self.store.forget(session_id)
        return True

    async def close(self) -> None:
        """Abort everything, give up what has not been acknowledged."""
        self.runtime.close()
        if self.acks is not None:
            await self.acks.close()

    def _stored(self, stored: PagesStored) -> None:
        leaving, tokens = self._leaving.pop(stored.rid, None), stored.tokens
        if leaving is None or self.store is None:
            return
        key, conversation = leaving
        try:
            self.store.write(key, tokens, conversation)
        except StoreError as error:
            _log.error("%s: %s", self.config.engine_id, error)
            return
        self.counters.backed_up_tokens += tokens
        if self.acks is not None and conversation is not None:
            self.acks.send(key=key, tokens=tokens, duration_s=stored.duration_s)

    def _ended(self, generation: Generation) -> None:
        counters, streaming = self.counters, generation.each_token
        if generation.aborted:
            counters.aborted += 1
            return
        counters.requests[streaming] += 1
        counters.prompt_tokens[streaming] += generation.prompt_tokens
        counters.generated_tokens[streaming] += len(generation.plan.ids)
        found = generation.prefill
        if found is not None:
            counters.cached_device_tokens += found.cached_device_tokens
            counters.cached_host_tokens += found.cached_host_tokens
            counters.cached_storage_tokens += found.cached_storage_tokens
