"""The gateway as one object: everything a turn needs, put together once.

Independent of HTTP: ``app`` brings requests in.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conserve_serving.core.decisions import Park, Place, Release
from conserve_serving.core.events import ConversationEnded, ConversationIdled
from conserve_serving.core.policies import make_policy
from conserve_serving.core.scheduler import Scheduler
from conserve_serving.core.types import ConversationId, Reason, Tier, TurnId
from conserve_serving.energy.nvml import Nvml, load_nvml
from conserve_serving.energy.sampler import Sampler
from conserve_serving.engines.client import EngineClient
from conserve_serving.engines.http import HttpPool
from conserve_serving.engines.http_errors import EngineHttpError
from conserve_serving.gateway.apis.store import ResponseStore
from conserve_serving.gateway.attribution import Attribution
from conserve_serving.gateway.config import Config
from conserve_serving.gateway.conversations import Conversation, Conversations, Usage
from conserve_serving.gateway.energy import EnergyBook
from conserve_serving.gateway.engine import Engine
from conserve_serving.gateway.errors import (
    ConfigError,
    NotFoundError,
    UnavailableError,
    quoted,
)
from conserve_serving.gateway.fleet import Fleet
from conserve_serving.gateway.handoffs import Handoffs
from conserve_serving.gateway.identity import Headers
from conserve_serving.gateway.metrics import Metrics
from conserve_serving.gateway.placement import PlacementSigner
from conserve_serving.gateway.relay import Client
from conserve_serving.gateway.request import TurnRequest
from conserve_serving.gateway.runtime import Journal, ModelClock, Runtime
from conserve_serving.gateway.sessions import Background, Sessions
from conserve_serving.gateway.turn import Turn

_log = logging.getLogger("conserve.gateway")

#: How often running turns are looked at for silence.
_WATCH_S = 1.0


class Gateway:
    """Everything shared by turns. Make it inside a running event loop.

    Args:
        config: checked configuration.
        wall: wall seconds, monotonic.
        make_client: an engine client for a URL; the real one by default.
        token: random text for ids that nobody must guess.
        open_nvml: NVIDIA's module, or what stands in for it.
    """

    def __init__(
        self,
        config: Config,
        *,
        wall: Callable[[], float] = time.monotonic,
        make_client: Callable[[str], EngineClient] | None = None,
        token: Callable[[], str] = lambda: secrets.token_hex(12),
        open_nvml: Callable[[], Nvml] = load_nvml,
    ) -> None:
        settings = config.gateway
        self.config = config
        self.wall = wall
        self.token = token
        self.started_s = wall()
        self.created_unix_s = int(time.time())
        self.draining = False
        self.metrics = Metrics()
        self.background = Background()
        policy = make_policy(config.scheduler.policy, config.scheduler.settings())
        self._hands_over = policy.hands_over
        loop = asyncio.get_running_loop()
        self.runtime = Runtime(
            Scheduler(config.scheduler.settings(), policy),
            ModelClock(wall),
            call_later=loop.call_later,
            on_residency=self._carry_out,
            journal=_open_journal(settings.decision_journal),
        )
        self.energy = EnergyBook(
            clock=self.runtime.clock.now_s,
            sampler=Sampler(open_nvml, period_s=settings.energy_period_s),
        )
        self.fleet = Fleet(
            settings,
            emit=self.runtime.handle,
            energy=self.energy,
            make_client=make_client or self._make_client,
            wall=wall,
            on_speed=self.runtime.clock.set_speed,
            hands_over=config.scheduler.policy == "conserve",
        )
        self.handoffs = Handoffs(on_late=self._stored_late)
        self.sessions = Sessions(
            engine_of=self.fleet.get,
            background=self.background,
            # Only for when this gateway is no longer there to end it.
            idle_timeout_s=lambda: 2 * config.scheduler.idle_timeout_s / self.runtime.clock.speed,
        )
        self.conversations = Conversations(
            clock=wall,
            new_id=lambda: f"conv-{token()}",
            max_conversations=settings.max_conversations,
            remember_turns=settings.remember_turns,
            on_forget=self._forgotten,
        )
        self.attribution = Attribution(config.identity, self.conversations)
        self.responses = ResponseStore(
            clock=wall,
            ttl_s=config.responses.ttl_s,
            max_entries=config.responses.max_stored,
            max_bytes=config.responses.max_stored_bytes,
        )
        self.signer = PlacementSigner((settings.placement_key or token()).encode())
        self._boot = token()[:8]
        self._turn_number = 0
        self._turns: dict[TurnId, Turn] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def _make_client(self, url: str) -> EngineClient:
        settings, parts = self.config.gateway, urlsplit(url)  # checked when it came in
        pool = HttpPool(
            parts.hostname or "",
            parts.port or 80,
            max_idle=settings.max_idle_connections,
            connect_timeout_s=settings.connect_timeout_s,
        )
        return EngineClient(
            url, pool=pool, api_key=settings.engine_api_key, timeout_s=settings.control_timeout_s
        )

    # --- life --------------------------------------------------------------------------------
    def start(self) -> None:
        """Begin to watch the configured engines and running turns."""
        taken: dict[str, int] = {}
        for tier in self.config.tiers:
            prefix = tier.name or ("p" if tier.role is Tier.PREFILL else "d")
            rows = tier.gpus or ((),) * len(tier.urls)
            for url, gpus in zip(tier.urls, rows, strict=True):
                number = taken.get(prefix, 0)
                taken[prefix] = number + 1
                self.fleet.add(f"{prefix}{number}", url, tier, gpus=gpus)
        self._watcher = asyncio.create_task(self._watch_turns(), name="watch turns")

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new turns and wait for running ones; returns whether all have ended."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop everything; turns still running are aborted."""
        if self._watcher is not None:
            self._watcher.cancel()
        running = [turn.task for turn in self._turns.values() if turn.task is not None]
        for turn in list(self._turns.values()):
            turn.client_gone()
        await asyncio.gather(*running, return_exceptions=True)
        await self.background.join(timeout_s=1.0)
        await self.fleet.close()
        self.runtime.close()
        await asyncio.to_thread(self.energy.close)

    async def _watch_turns(self) -> None:
        limit_s = self.config.gateway.stall_timeout_s
        while True:
            await asyncio.sleep(min(_WATCH_S, limit_s / 4))
            now_s = self.wall()
            for turn in list(self._turns.values()):
                turn.check_progress(now_s, limit_s)
            self.runtime.flush()

    # --- turns -------------------------------------------------------------------------------
    def begin_turn(
        self, request: TurnRequest, headers: Headers, client: Client, *, arrived_s: float
    ) -> Turn:
        """Find out whose turn it is and make it; the caller starts it.

        Raises:
            ApiError: draining, no engine, unknown model, or an illegal id.
        """
        self.check_model(request.model)
        origin = self.attribution.attribute(request, headers)
        self.metrics.identity[origin.tags.source] += 1
        self.metrics.relations[origin.relation] += 1
        self._turn_number += 1
        turn_id = TurnId(f"{self._boot}-{self._turn_number:x}")
        turn = Turn(self, turn_id, client, request=request, origin=origin, arrived_s=arrived_s)
        self._turns[turn_id] = turn
        self._idle.clear()
        return turn

    def check_model(self, model: str) -> None:
        """Whether a request for ``model`` can be served here at all.

        Raises:
            UnavailableError: draining, or no engine is alive.
            NotFoundError: another model is served here.
        """
        if self.draining:
            raise UnavailableError(
                "the gateway is shutting down: try again", code="draining", retry_after_s=1.0
            )
        served = self.fleet.model
        if served is None:
            raise self.no_engine()
        if model != served:
            raise NotFoundError(
                f"model {quoted(model)} is not served here: use {served!r}",
                param="model",
                code="model_not_found",
            )

    def no_engine(self) -> UnavailableError:
        """What is answered while no engine is alive."""
        return UnavailableError(
            "no engine is alive: try again later",
            code=Reason.NO_ENGINE.value,
            retry_after_s=self.config.gateway.health_interval_s,
        )

    def note_finished(self, turn: Turn, place: Place, usage: Usage, cached_tokens: int) -> None:
        """A turn finished: remember what its conversation is now, check its cached tokens."""
        conversation, metrics = turn.conversation, self.metrics
        expected = min(place.expected_cached_tokens, usage.prompt_tokens)
        engine = self.fleet.get(place.decoder)
        page_tokens = engine.page_tokens if engine is not None else 1
        if cached_tokens < expected - page_tokens - 1:
            conversation.shortfall_tokens += expected - cached_tokens
            _log.warning(
                "turn %s: %d tokens cached on %s where %d were expected",
                turn.id,
                cached_tokens,
                place.decoder,
                expected,
            )
        latest = turn.index >= conversation.turns
        conversation.note_usage(turn.request, turn.index, usage)
        conversation.note_answered(turn.tags.turn_id)
        if latest:
            conversation.mark = turn.mark
        metrics.prompt_tokens += usage.prompt_tokens
        metrics.output_tokens += usage.output_tokens
        metrics.cached_tokens += cached_tokens

    def forget_turn(self, turn: Turn) -> None:
        """A turn is over, for the gateway too."""
        self._turns.pop(turn.id, None)
        if not self._turns:
            self._idle.set()

    def may_hand_over(self) -> bool:
        """Whether a first turn's exact token ids may be needed."""
        return self._hands_over and bool(self.fleet.serving(Tier.PREFILL))

    # --- conversations -----------------------------------------------------------------------
    def idle_conversation(self, conversation: Conversation) -> None:
        """Its agent has answered and waits for a person: others wait for tools meanwhile."""
        self.runtime.handle(ConversationIdled(conversation=conversation.key))

    def end_conversation(self, conversation: Conversation) -> None:
        """A conversation is over: its KV is freed once its running turns have ended."""
        self.conversations.end(conversation)
        self.runtime.handle(ConversationEnded(conversation=conversation.key))
        self.attribution.forget(conversation)
        self.if_over(conversation)

    def if_over(self, conversation: Conversation) -> None:
        """Once a conversation has ended and none of its turns runs: clear the store."""
        if conversation.ended and not conversation.running:
            self.sessions.end(conversation, self.fleet.serving())

    def _stored_late(self, key: ConversationId) -> None:
        """Pages are kept for a conversation that may have ended meanwhile."""
        conversation = self.conversations.get(key)
        if conversation is not None:
            conversation.in_store = True
            self.if_over(conversation)

    def _forgotten(self, conversation: Conversation) -> None:
        """Memory is full: what nobody remembers must not hold KV."""
        self.runtime.handle(ConversationEnded(conversation=conversation.key))
        self.attribution.forget(conversation)
        if conversation.decoder is not None:  # parked there, perhaps
            self.sessions.release(conversation, conversation.decoder)
        self.sessions.end(conversation, self.fleet.serving())

    def _carry_out(self, decision: Park | Release) -> None:
        conversation = self.conversations.get(decision.conversation)
        if conversation is None:
            return
        if isinstance(decision, Park):
            if conversation.session is not None and conversation.session[0] == decision.engine:
                self.sessions.close(conversation)
            conversation.parked = True
            return
        self.sessions.release(conversation, decision.engine)
        if decision.reason is Reason.CONVERSATION_EXPIRED and not conversation.running:
            self.conversations.end(conversation)
            self.attribution.forget(conversation)
            self.if_over(conversation)

    # --- engines -----------------------------------------------------------------------------
    def missing(self) -> str | None:
        """Why conversations cannot be taken on now; None when they can."""
        if self.draining:
            return "the gateway is shutting down"
        scheduler = self.runtime.scheduler
        hosts = scheduler.policy.hosts
        if any(hosts(state) and not state.draining for state in scheduler.engines.values()):
            return None
        return "no decoder is ready"

    def models(self) -> list[dict[str, Any]]:
        """The served model as ``/v1/models`` shows it; empty when no engine is here."""
        served = self.fleet.model
        if served is None:
            return []
        limits = [e.description.max_context_tokens for e in self.fleet.serving() if e.description]
        return [
            {
                "id": served,
                "object": "model",
                "created": self.created_unix_s,
                "owned_by": "conserve",
                "max_model_len": max(limits, default=None),
                # What Anthropic's clients look for beside it.
                "type": "model",
                "display_name": served,
                "created_at": datetime.fromtimestamp(self.created_unix_s, UTC).isoformat(),
            }
        ]

    def abort_upstream(self, engine: Engine, rid: str) -> None:
        """Tell an engine to stop a request. Returns at once."""
        self.background.start(self._abort(engine, rid), f"abort on {engine.id}")

    async def _abort(self, engine: Engine, rid: str) -> None:
        try:
            await engine.client.abort(rid)
        except EngineHttpError as error:
            _log.info("abort of %s: %s", rid, error)

    def warn_no_cache_report(self, engine: Engine) -> None:
        """An engine does not say what was cached: say so once."""
        if not engine.told_no_cache_report:
            engine.told_no_cache_report = True
            _log.warning(
                "engine %s does not report cached tokens: start it with --enable-cache-report, "
                "or hand-offs cannot be checked",
                engine.id,
            )


def _open_journal(path: str | None) -> Journal | None:
    if path is None:
        return None
    try:
        return Journal(Path(path).open("a", encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"gateway.decision_journal: {path}: {error.strerror}: name a file that can be written, "
            "in a folder that exists"
        ) from error
