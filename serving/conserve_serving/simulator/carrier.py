"""Carries plans out: copies, prefills, hand-offs and decodes of the turns that are placed.

The same protocol as the gateway's. A plan with a source has the context's KV copied from there
first, to whoever computes the prompt; one with a prefiller is prefilled there and handed over when
its pages are stored; then it is decoded on the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from conserve_serving.core.decisions import Place
from conserve_serving.core.events import (
    Event,
    HandoffFinished,
    PrefillFinished,
    TurnFailed,
    TurnFinished,
)
from conserve_serving.core.types import EngineId
from conserve_serving.engines.errors import RequestTooLargeError
from conserve_serving.engines.model_types import (
    ModelEvent,
    ModelRequest,
    PagesStored,
    PrefillDone,
    RequestFinished,
)
from conserve_serving.simulator.agenda import Agenda
from conserve_serving.simulator.engines import Engine
from conserve_serving.simulator.errors import SimulationError
from conserve_serving.simulator.turns import Turn

# What a request is for: copying the context, computing the prompt elsewhere, running the turn.
_COPY: Final = "s"
_PREFILL: Final = "p"
_DECODE: Final = "d"


class Carrier:
    """Turns under way on engines.

    Args:
        agenda: the clock.
        engines: all engines, by id; filled by the caller.
        send: takes an event to the scheduler, whose decisions are carried out before it returns.
        page_tokens: page size of all engines.
    """

    __slots__ = ("_agenda", "_engines", "_page_tokens", "_requests", "_send")

    def __init__(
        self,
        agenda: Agenda,
        engines: Mapping[EngineId, Engine],
        send: Callable[[Event], None],
        page_tokens: int,
    ) -> None:
        self._agenda = agenda
        self._engines = engines
        self._send = send
        self._page_tokens = page_tokens
        # Requests of plans that are being carried out: those of others are not looked at.
        self._requests: dict[str, tuple[Turn, Place, str]] = {}

    def start(self, turn: Turn, place: Place) -> None:
        """Carry a plan out; an older one of the same turn is abandoned."""
        if turn.rids:
            self.abandon(turn)
        result = turn.result
        turn.place = place
        turn.stored = 0
        result.reason, result.transfer = place.reason, place.transfer
        result.prefiller, result.decoder = place.prefiller, place.decoder
        result.placements += 1
        if result.placed_s is None:
            result.placed_s = self._agenda.now_s
        if place.source is not None:
            self._copy(turn, place, place.source)
        elif place.prefiller is not None:
            self._prefill(turn, place, place.prefiller)
        else:
            self._decode(turn, place)

    def _copy(self, turn: Turn, place: Place, source: EngineId) -> None:
        """Have the source send what the engine that computes the prompt lacks of the context."""
        to = self._engines[place.prefiller or place.decoder]
        known = to.model.cached_tokens(turn.prompt)
        rid = self._name(turn, place, _COPY, source)
        turn.submitted_s = self._agenda.now_s
        self._engines[source].send(
            ModelRequest(rid=rid, prompt=turn.prompt, output_tokens=0), known_tokens=known
        )

    def _prefill(self, turn: Turn, place: Place, prefiller: EngineId) -> None:
        engine = self._engines[prefiller]
        if not engine.spec.config.store_writes:
            raise SimulationError(
                f"engine {prefiller} is to hand over and does not write to the store: set "
                "store_writes in its config"
            )
        # A decoder that has the context already needs only the rest.
        known = self._engines[place.decoder].model.cached_tokens(turn.prompt) if turn.kept else 0
        self._submit(
            engine,
            turn,
            ModelRequest(
                rid=self._name(turn, place, _PREFILL, prefiller),
                prompt=turn.prompt,
                output_tokens=0,
                priority=place.priority,
                stored_tokens=turn.stored,
                known_tokens=known,
                prefill_only=True,
            ),
        )

    def _decode(self, turn: Turn, place: Place) -> None:
        self._submit(
            self._engines[place.decoder],
            turn,
            ModelRequest(
                rid=self._name(turn, place, _DECODE, place.decoder),
                prompt=turn.prompt,
                output_tokens=turn.wanted.output_tokens,
                context=turn.context,
                session_id=turn.conversation.spec.id,
                priority=place.priority,
                stored_tokens=turn.stored,
                stores=False,
            ),
        )

    def _name(self, turn: Turn, place: Place, role: str, engine: EngineId) -> str:
        rid = f"{turn.id}/{place.plan}/{role}"
        self._requests[rid] = (turn, place, role)
        turn.rids[rid] = engine
        return rid

    def _submit(self, engine: Engine, turn: Turn, request: ModelRequest) -> None:
        turn.submitted_s = self._agenda.now_s
        try:
            engine.submit(request)
        except RequestTooLargeError:  # the engine's answer, as the gateway would hear it
            self._agenda.at(self._agenda.now_s, self._fail, (turn, engine.id))

    def _fail(self, failed: tuple[Turn, EngineId]) -> None:
        turn, engine = failed
        if turn.place is not None and not turn.over:
            self._send(
                TurnFailed(turn=turn.id, plan=turn.place.plan, engine=engine, retryable=False)
            )

    def abandon(self, turn: Turn) -> None:
        """Forget the requests of a plan that is not carried out any more."""
        for rid, engine in turn.rids.items():
            del self._requests[rid]
            self._engines[engine].abort(rid)
        turn.rids.clear()

    def tell(self, engine: Engine, events: list[ModelEvent]) -> None:
        requests = self._requests
        for event in events:
            if isinstance(event, PrefillDone):
                engine.note_prefilled(event)
                found = requests.get(event.rid)
                if found is not None:
                    self._prefilled(*found, event)
            elif isinstance(event, RequestFinished):
                engine.output_tokens += event.output_tokens
                found = requests.get(event.rid)
                if found is not None and found[2] == _DECODE:
                    self._finish(found[0], found[1], event)
            elif isinstance(event, PagesStored):
                found = requests.pop(event.rid, None)
                if found is not None:
                    del found[0].rids[event.rid]
                    self._stored(*found, event)

    def _prefilled(self, turn: Turn, place: Place, role: str, event: PrefillDone) -> None:
        result, at_s = turn.result, event.at_s
        if role == _DECODE:
            result.first_token_s = at_s
            result.restored_tokens = event.cached_host_tokens
        if role == _PREFILL or place.prefiller is None:
            result.prefill_began_s = turn.submitted_s + event.queued_s
            result.prefilled_s = at_s
            cached = (
                event.cached_device_tokens + event.cached_host_tokens + event.cached_storage_tokens
            )
            # Of an output's last token there is no KV until the next turn computes it.
            kept = max(0, turn.kept - (not turn.rewritten))
            kept -= kept % self._page_tokens
            result.recomputed_tokens = max(0, kept - cached)
        self._send(
            PrefillFinished(turn=turn.id, plan=place.plan, prompt_tokens=event.prompt_tokens)
        )

    def _stored(self, turn: Turn, place: Place, role: str, event: PagesStored) -> None:
        """Pages have left the engine they were on: a copy of the context, or a prompt's."""
        turn.stored = event.tokens
        turn.result.moved_tokens += event.sent_tokens
        began_s = turn.submitted_s if role == _COPY else turn.result.prefilled_s
        if role == _COPY and place.prefiller is not None:
            self._prefill(turn, place, place.prefiller)
            return
        turn.result.handed_s = event.at_s
        self._send(
            HandoffFinished(
                turn=turn.id,
                plan=place.plan,
                moved_tokens=event.sent_tokens,
                duration_s=event.at_s - (event.at_s if began_s is None else began_s),
            )
        )
        if turn.place is place and not turn.over:
            self._decode(turn, place)

    def _finish(self, turn: Turn, place: Place, event: RequestFinished) -> None:
        turn.result.cached_tokens = event.cached_tokens
        turn.result.output_tokens = event.output_tokens
        self._send(
            TurnFinished(
                turn=turn.id,
                plan=place.plan,
                prompt_tokens=event.prompt_tokens,
                output_tokens=event.output_tokens,
                cached_tokens=event.cached_tokens,
            )
        )
